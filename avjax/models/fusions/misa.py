"""MISA: shared and private representations of modalities, separated by losses.

Hazarika et al., "MISA: Modality-Invariant and -Specific Representations for Multimodal Sentiment Analysis", ACM MM
2020. Shapes: b clip, n step of a stream, s number of streams, d width, c class.

Similarity and difference are losses of a whole batch: they couple clips in training, not in prediction. A missing
modality is an all-False mask: the transformer does not read it, and its reconstruction costs nothing. Without any
stream only biases predict.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from avjax.layers import Dropout, LstmEncoder, PostNormBlock, Project, masked_mean, stream_inputs
from avjax.models.base import Batch, Fusion, Output, head_loss
from avjax.models.fusions.base import FusionModule, counted, for_clips, named, of_kind

# Loss weights for MOSI, the defaults of the released code.
SIMILARITY, DIFFERENCE, RECONSTRUCTION = 1.0, 0.3, 1.0
# K of the central moment discrepancy.
MOMENT_ORDERS = 5


class Misa(FusionModule):
    """MISA (Hazarika et al. 2020): two vectors per stream, in a shared and in a private space.

    Text is averaged over its real tokens (the released code includes BERT's padding). Any other stream goes through two
    bidirectional LSTMs, the second on the normalised states of the first, and their last states are concatenated; the
    paper's LSTMs are as wide as their inputs, 47 and 74. All vectors attend to each other in one transformer layer (as
    in PyTorch, without inner dropout) and are concatenated for the head.

    Attributes:
      width: d of both spaces; heads: of the transformer, divides it; inner: its feed-forward width.
      recurrent: width of the LSTMs per direction.
      dropout: rate before the head.
    """

    width: int = 128
    heads: int = 2
    inner: int = 2048
    recurrent: int = 64
    dropout: float = 0.5

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features hold "utterance_<stream>", "private_<stream>", "shared_<stream>" and "rebuilt_<stream>", (b, d) each.
        """
        steps, masks = stream_inputs(batch, self.streams, self.dtype)
        utterance = {s: self._utterance(s, steps[s], masks[s]) for s in self.streams}
        private = {s: jax.nn.sigmoid(self._dense(f"private_{s}")(x)) for s, x in utterance.items()}
        shared_map = self._dense("shared")
        shared = {s: jax.nn.sigmoid(shared_map(x)) for s, x in utterance.items()}
        rebuilt = {s: self._dense(f"rebuild_{s}")(private[s] + shared[s]) for s in self.streams}
        present = jnp.stack([jnp.any(masks[s], -1) for s in self.streams], -1)
        vectors = jnp.stack([*private.values(), *shared.values()], 1)  # b 2s d
        fused = self._fuse(vectors, jnp.concatenate([present, present], -1), train)
        features = named("utterance", utterance) | named("rebuilt", rebuilt)
        return self.predict(fused, features | named("private", private) | named("shared", shared))

    def _dense(self, name: str) -> Project:
        return Project((self.width,), dtype=self.dtype, name=name)

    def _utterance(self, stream: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes a stream in one vector: (b, d)."""
        norm = functools.partial(nn.LayerNorm, 1e-5, self.dtype, use_fast_variance=False)
        read = functools.partial(LstmEncoder, self.recurrent, bidirectional=True, dtype=self.dtype)
        if stream == "text":
            vector = masked_mean(x, mask)
        else:
            states, first = read(name=f"{stream}_first")(x, mask)
            _, second = read(name=f"{stream}_second")(norm(name=f"{stream}_states_norm")(states), mask)
            vector = jnp.concatenate([first, second], -1)
        return norm(name=f"{stream}_norm")(jax.nn.relu(self._dense(f"project_{stream}")(vector)))

    def _fuse(self, vectors: jax.Array, real: jax.Array, train: bool) -> jax.Array:
        """Maps vectors (b, 2s, d), present or not (b, 2s), by the transformer to (b, s·d)."""
        block = PostNormBlock(self.heads, self.inner, jax.nn.relu, 1e-5, self.dtype, name="transformer")
        joint = jnp.where(real[..., None], block(vectors, real), 0).reshape(len(vectors), -1)
        hidden = Project((joint.shape[-1] // 2,), dtype=self.dtype, name="fuse")(joint)
        return jax.nn.relu(Dropout(self.dropout, train)(hidden))


def moment_discrepancy(x: jax.Array, y: jax.Array, rows: jax.Array) -> jax.Array:
    """Computes the central moment discrepancy (Zellinger et al. 2017) of vectors in [0, 1] up to `MOMENT_ORDERS`.

    Args:
      x: (b, d).
      y: (b, d).
      rows: (b,), which rows are samples of the two distributions.

    Returns:
      () float32.
    """
    means = [masked_mean(v, rows) for v in (x, y)]
    away = [v - mean[None] for v, mean in zip((x, y), means, strict=True)]
    distances = [optax.safe_norm(means[0] - means[1], 0.0)]
    for order in range(2, MOMENT_ORDERS + 1):
        first, second = (masked_mean(v**order, rows) for v in away)
        distances.append(optax.safe_norm(first - second, 0.0))
    return sum(distances)


def overlap(x: jax.Array, y: jax.Array, rows: jax.Array) -> jax.Array:
    """Computes the paper's soft orthogonality of two spaces, as released: ().

    Vectors (b, d) are centred over `rows` (b,) and scaled to unit length. The result is the mean square of the products
    of channels of x and y, summed over clips. No gradient flows through the lengths.
    """
    units = []
    for v in (x, y):
        v = jnp.where(rows[:, None], v - masked_mean(v, rows)[None], 0)
        units.append(v / (jax.lax.stop_gradient(optax.safe_norm(v, 0.0, axis=-1, keepdims=True)) + 1e-6))
    return jnp.mean((units[0].T @ units[1]) ** 2)


def misa_loss(output: Output, batch: Batch, task: str) -> dict[str, jax.Array]:
    """Computes the cross entropy and the paper's three further losses, weighted as released for MOSI.

    similarity: the mean of `moment_discrepancy` over pairs of streams in the shared space.
    difference: the sum of `overlap` over each stream's two vectors, and over pairs of streams in their private spaces.
    reconstruction: mean squared error of each stream's vector, averaged over the streams; 0 for missing ones.
    """
    private, shared = of_kind(output, "private"), of_kind(output, "shared")
    pairs = [(s, o, counted(batch, s, o)) for s, o in itertools.combinations(private, 2)]
    similarity = [moment_discrepancy(shared[s], shared[o], rows) for s, o, rows in pairs]
    difference = [overlap(private[s], shared[s], counted(batch, s)) for s in private]
    difference += [overlap(private[s], private[o], rows) for s, o, rows in pairs]
    return {
        "fusion": head_loss(output, batch, "fusion", task),
        "similarity": for_clips(batch, SIMILARITY * sum(similarity) / len(similarity)),
        "difference": for_clips(batch, DIFFERENCE * sum(difference)),
        "reconstruction": RECONSTRUCTION * _misa_reconstruction(output, batch),
    }


def _misa_reconstruction(output: Output, batch: Batch) -> jax.Array:
    rebuilt, utterance = of_kind(output, "rebuilt"), of_kind(output, "utterance")
    errors = [jnp.mean((rebuilt[s] - utterance[s]) ** 2, -1) * counted(batch, s) for s in rebuilt]
    return sum(errors) / len(errors)


FUSIONS: dict[str, Fusion] = {
    "misa": Fusion(
        module=Misa,
        loss=misa_loss,
        least=2,
        recipe={"optimizer": "adam", "learning_rate": 1e-4, "batch_size": 64, "weight_decay": 0.0, "epochs": 500},
        paper="Hazarika, Zimmermann, Poria 2020, ACM MM",
    ),
}

"""Factors: what modalities share and what each keeps to itself, taken apart by the losses.

MISA: Hazarika et al., "MISA: Modality-Invariant and -Specific Representations for Multimodal Sentiment Analysis",
ACM MM 2020.
MFM: Tsai et al., "Learning Factorized Multimodal Representations", ICLR 2019.
Shapes: b clip, n step of a stream, s number of streams, d width, c class.

Both losses hold terms of a whole batch (similarity and difference in MISA, the prior in MFM): training couples its
clips, answers do not. Each clip carries the batch's value. Rows of `weight` 0 take no part, nor do clips that lack a
stream that a term is about.

A missing modality is an all-False mask. It is not among the vectors that MISA's transformer reads, and MFM's memory
never hears of it; what would rebuild it costs nothing. Without any stream both answer what their biases say.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers.dropout import Dropout
from avjax.layers.linear import Project
from avjax.layers.lstm import Recurrence
from avjax.layers.masking import enter, masked_mean
from avjax.layers.transformer import PostNormBlock
from avjax.models.base import Fusion, Output, head_loss
from avjax.models.fusions.gates import length
from avjax.models.fusions.memory import Mfn, Perceptron
from avjax.models.fusions.simple import States

Batch = Mapping[str, jax.Array]
Vectors = dict[str, jax.Array]


def named(kind: str, vectors: Vectors) -> Vectors:
    """The vectors of a kind as features "<kind>_<stream>"."""
    return {f"{kind}_{s}": x for s, x in vectors.items()}


def of_kind(output: Output, kind: str) -> Vectors:
    """What `named` put into the features, in float32: stream → (b, d)."""
    found = {name: x for name, x in output.features.items() if name.startswith(f"{kind}_")}
    return {name.removeprefix(f"{kind}_"): x.astype(jnp.float32) for name, x in found.items()}


def counted(batch: Batch, *streams: str) -> jax.Array:
    """(b,): whether a clip is no padding of the batch and has all these streams."""
    has = [jnp.any(batch[f"{s}_mask"], -1) for s in streams]
    return functools.reduce(jnp.logical_and, [*has, *([batch["weight"] > 0] if "weight" in batch else [])])


def for_clips(batch: Batch, value: jax.Array) -> jax.Array:
    """A value of the batch (), given to each of its clips: (b,)."""
    return jnp.broadcast_to(value, batch["weight"].shape)


# ---- MISA ---------------------------------------------------------------------------------------------------------

# Weights of the terms for MOSI, which are the defaults of the released code.
SIMILARITY, DIFFERENCE, RECONSTRUCTION = 1.0, 0.3, 1.0
# K of the central moment discrepancy.
MOMENTS = 5


class Misa(nn.Module):
    """MISA (Hazarika et al. 2020): two vectors per stream, one in a space that all share, one in its own.

    Text is averaged over its real tokens (the released code averages BERT's padding in). Any other stream goes through
    two bidirectional LSTMs, the second on the normalised states of the first, whose last states join; the paper's are
    as wide as its inputs, 47 and 74, and here they have a width of their own. All vectors attend to each other in one
    transformer layer (PyTorch's, without the dropout inside) and are joined for the head.

    Attributes:
      classes: number of classes c.
      streams: two or more of text, audio, video.
      width: d of both spaces; heads: of the transformer, divides it; inner: its feed-forward width.
      recurrent: width of the LSTMs, each way.
      dropout: rate before the head.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("text", "audio", "video")
    width: int = 128
    heads: int = 2
    inner: int = 2048
    recurrent: int = 64
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features hold "utterance_<stream>", "private_<stream>", "shared_<stream>" and "rebuilt_<stream>", (b, d) each.
        """
        steps, masks = enter(batch, self.streams, self.dtype)
        utterance = {s: self._utterance(s, steps[s], masks[s]) for s in self.streams}
        private = {s: jax.nn.sigmoid(self._dense(f"private_{s}")(x)) for s, x in utterance.items()}
        share = self._dense("shared")
        shared = {s: jax.nn.sigmoid(share(x)) for s, x in utterance.items()}
        rebuilt = {s: self._dense(f"rebuild_{s}")(private[s] + shared[s]) for s in self.streams}
        present = jnp.stack([jnp.any(masks[s], -1) for s in self.streams], -1)
        vectors = jnp.stack([*private.values(), *shared.values()], 1)  # b 2s d
        fused = self._fuse(vectors, jnp.concatenate([present, present], -1), train)
        logits = nn.Dense(self.classes, name="head")(fused.astype(jnp.float32))
        features = {"fusion": fused} | named("utterance", utterance) | named("rebuilt", rebuilt)
        return Output({"fusion": logits}, features | named("private", private) | named("shared", shared), {})

    def _dense(self, name: str) -> Project:
        return Project((self.width,), dtype=self.dtype, name=name)

    def _utterance(self, stream: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        """One vector of a stream: (b, d)."""
        norm = functools.partial(nn.LayerNorm, 1e-5, self.dtype, use_fast_variance=False)
        read = functools.partial(States, self.recurrent, bidirectional=True, dtype=self.dtype)
        if stream == "text":
            vector = masked_mean(x, mask)
        else:
            states, first = read(name=f"{stream}_first")(x, mask)
            _, second = read(name=f"{stream}_second")(norm(name=f"{stream}_states_norm")(states), mask)
            vector = jnp.concatenate([first, second], -1)
        return norm(name=f"{stream}_norm")(jax.nn.relu(self._dense(f"project_{stream}")(vector)))

    def _fuse(self, vectors: jax.Array, real: jax.Array, train: bool) -> jax.Array:
        """Vectors (b, 2s, d), of which `real` (b, 2s) are there, through the transformer to (b, s·d)."""
        block = PostNormBlock(self.heads, self.inner, jax.nn.relu, 1e-5, self.dtype, name="transformer")
        joint = jnp.where(real[..., None], block(vectors, real), 0).reshape(len(vectors), -1)
        hidden = Project((joint.shape[-1] // 2,), dtype=self.dtype, name="fuse")(joint)
        return jax.nn.relu(Dropout(self.dropout, train)(hidden))


def moment_discrepancy(x: jax.Array, y: jax.Array, rows: jax.Array) -> jax.Array:
    """Central moment discrepancy (Zellinger et al. 2017) of vectors within [0, 1], up to the moment `MOMENTS`.

    Args:
      x, y: (b, d).
      rows: (b,), which of them are drawn from the two distributions.
    Returns:
      () float32.
    """
    means = [masked_mean(v, rows) for v in (x, y)]
    away = [v - mean[None] for v, mean in zip((x, y), means, strict=True)]
    distances = [length(means[0] - means[1])]
    for order in range(2, MOMENTS + 1):
        first, second = (masked_mean(v**order, rows) for v in away)
        distances.append(length(first - second))
    return sum(distances)[0]


def overlap(x: jax.Array, y: jax.Array, rows: jax.Array) -> jax.Array:
    """The paper's soft orthogonality between two spaces, as released: ().

    Vectors (b, d) are centred over `rows` (b,) and scaled to unit length; the mean square of all products of a channel
    of x with one of y, summed over clips. No gradient flows through the lengths.
    """
    units = []
    for v in (x, y):
        v = jnp.where(rows[:, None], v - masked_mean(v, rows)[None], 0)
        units.append(v / (jax.lax.stop_gradient(length(v)) + 1e-6))
    return jnp.mean((units[0].T @ units[1]) ** 2)


def misa_loss(output: Output, batch: Batch, prior: jax.Array) -> dict[str, jax.Array]:
    """Cross entropy and the paper's three further terms, weighted as released for MOSI.

    similarity: the mean of `moment_discrepancy` over pairs of streams in the shared space.
    difference: the sum of `overlap` over each stream's two vectors, and over pairs of streams in their own spaces.
    reconstruction: mean squared error of each stream's vector, averaged over the streams; 0 for one that is missing.
    """
    private, shared = of_kind(output, "private"), of_kind(output, "shared")
    pairs = [(s, o, counted(batch, s, o)) for s, o in itertools.combinations(private, 2)]
    similarity = [moment_discrepancy(shared[s], shared[o], rows) for s, o, rows in pairs]
    difference = [overlap(private[s], shared[s], counted(batch, s)) for s in private]
    difference += [overlap(private[s], private[o], rows) for s, o, rows in pairs]
    return {
        "fusion": head_loss(output, batch, "fusion"),
        "similarity": for_clips(batch, SIMILARITY * sum(similarity) / len(similarity)),
        "difference": for_clips(batch, DIFFERENCE * sum(difference)),
        "reconstruction": RECONSTRUCTION * _misa_reconstruction(output, batch),
    }


def _misa_reconstruction(output: Output, batch: Batch) -> jax.Array:
    rebuilt, utterance = of_kind(output, "rebuilt"), of_kind(output, "utterance")
    errors = [jnp.mean((rebuilt[s] - utterance[s]) ** 2, -1) * counted(batch, s) for s in rebuilt]
    return sum(errors) / len(errors)


# ---- MFM ----------------------------------------------------------------------------------------------------------

# Weights of reconstruction and prior of the released run that `Mfm` takes its widths from.
REBUILT: Mapping[str, float] = {"text": 1.0, "audio": 0.01, "video": 0.5}
PRIOR = 1.0


def _sizes(**sizes):
    return dataclasses.field(default_factory=lambda: sizes)


class Mfm(nn.Module):
    """Multimodal factorization model (Tsai et al. 2019).

    A memory fusion network (`Mfn`) reads all streams and gives the latent variable of the label; an LSTM reads each
    stream and gives that stream's own. Each goes through a perceptron to a factor. The label's factor alone is
    classified; with the factor of a stream it rebuilds that stream: its mean over the real steps, where the paper
    rebuilds every step. The latent variable of the label leaves the memory network through the network's own output
    layers, one more than in the released code.

    The defaults are a point of the authors' grid, the run of best accuracy that their code records (MOSI). The paper's
    second model of missing modalities, which guesses the missing latent variables, is not built.

    Attributes:
      classes: number of classes c.
      streams: any of text, audio, video.
      latents: widths of the latent variables of the label and of each stream; factors: of their factors.
      dropouts: rates between the layers from the one to the other.
      widths: of the memory network's LSTMs; memory: of its memory; hidden: of its inner layers; memory_dropout: there.
      segment_count: spans of its common clock.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("text", "audio", "video")
    latents: Mapping[str, int] = _sizes(label=32, text=32, audio=8, video=80)
    factors: Mapping[str, int] = _sizes(label=16, text=88, audio=8, video=8)
    dropouts: Mapping[str, float] = _sizes(label=0.0, text=0.2, audio=0.2, video=0.7)
    widths: Mapping[str, int] = _sizes(text=88, audio=64, video=48)
    memory: int = 64
    hidden: int = 128
    memory_dropout: float = 0.5
    segment_count: int = 20
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features hold "latent_label" and "latent_<stream>", and "rebuilt_<stream>" (b, w), the means.
        """
        steps, masks = enter(batch, self.streams, self.dtype)
        latents = {"label": self._memory()(batch, train).logits["fusion"]}
        latents |= {s: self._latent(s, steps[s], masks[s]) for s in self.streams}
        factors = {name: self._factor(name, x, train) for name, x in latents.items()}
        rebuilt = {}
        for s in self.streams:
            both = jnp.concatenate([factors["label"], factors[s]], -1)
            decoder = Perceptron(both.shape[-1], batch[s].shape[-1], 0.0, self.dtype, name=f"rebuild_{s}")
            rebuilt[s] = decoder(both)
        fused = jax.nn.relu(Project((self.factors["label"],), dtype=self.dtype, name="fuse")(factors["label"]))
        logits = nn.Dense(self.classes, name="head")(fused.astype(jnp.float32))
        return Output({"fusion": logits}, {"fusion": fused} | named("latent", latents) | named("rebuilt", rebuilt), {})

    def _memory(self) -> Mfn:
        inner = dict.fromkeys(("attention", "proposal", "retain", "update", "output"), self.hidden)
        return Mfn(
            self.latents["label"], self.streams, self.widths, self.memory, **inner,
            dropouts=(self.memory_dropout,) * 5, segment_count=self.segment_count,
            dtype=self.dtype, name="memory_network",
        )  # fmt: skip

    def _latent(self, stream: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = self.latents[stream]
        hidden, _ = Recurrence(width, dtype=self.dtype, name=f"{stream}_states")(x, mask)
        return Project((width,), dtype=self.dtype, name=f"{stream}_latent")(hidden[:, -1])

    def _factor(self, name: str, latent: jax.Array, train: bool) -> jax.Array:
        width = self.factors[name]
        return jax.nn.relu(
            Perceptron(width, width, self.dropouts[name], self.dtype, name=f"{name}_factor")(latent, train)
        )


def normal_discrepancy(z: jax.Array, rows: jax.Array) -> jax.Array:
    """Squared maximum mean discrepancy between latent variables and the standard normal distribution.

    The kernel is the released one, exp(-|x - y|² / d²). The released code draws as many normal vectors as there are
    clips; here their part is the exact expectation, which their draws have for a mean, up to a constant:
    E k(x, z) = (d²/(d²+2))^(d/2) · exp(-|z|²/(d²+2)) and E k(x, x') = (d²/(d²+4))^(d/2).

    Args:
      z: (b, d) float32.
      rows: (b,), which of them count.
    Returns:
      () float32; 0 where none does.
    """
    width = z.shape[-1]
    square, half = float(width**2), width / 2
    count = jnp.sum(rows)
    pairs = rows[:, None] & rows[None]
    alike = jnp.exp(-jnp.sum((z[:, None] - z[None]) ** 2, -1) / square)
    among = jnp.sum(jnp.where(pairs, alike, 0)) / jnp.maximum(count, 1) ** 2
    near = jnp.exp(-jnp.sum(z**2, -1, keepdims=True) / (square + 2))
    across = (square / (square + 2)) ** half * masked_mean(near, rows)[0]
    return jnp.where(count > 0, among - 2 * across + (square / (square + 4)) ** half, 0.0)


def mfm_loss(output: Output, batch: Batch, prior: jax.Array) -> dict[str, jax.Array]:
    """Cross entropy, the mean squared error of each stream's rebuilt mean, and the latent variables' prior.

    Weighted as in the run that the defaults come from (released code). A missing stream is not rebuilt, and the prior
    of the label's latent variable is over clips that have any stream.
    """
    rebuilt, latents = of_kind(output, "rebuilt"), of_kind(output, "latent")
    rows = {s: counted(batch, s) for s in rebuilt}
    rows["label"] = functools.reduce(jnp.logical_or, list(rows.values()))
    terms = {"fusion": head_loss(output, batch, "fusion")}
    for s, x in rebuilt.items():
        target = masked_mean(batch[s].astype(jnp.float32), batch[f"{s}_mask"])
        terms[f"{s}_rebuilt"] = REBUILT[s] * jnp.where(rows[s], jnp.mean((x - target) ** 2, -1), 0.0)
    discrepancy = sum(normal_discrepancy(z, rows[name]) for name, z in latents.items())
    return terms | {"prior": for_clips(batch, PRIOR * discrepancy)}


FUSIONS: dict[str, Fusion] = {
    "misa": Fusion(
        module=Misa,
        loss=misa_loss,
        least=2,
        recipe={"optimizer": "adam", "learning_rate": 1e-4, "batch_size": 64, "weight_decay": 0.0, "epochs": 500},
        paper="Hazarika, Zimmermann, Poria 2020, ACM MM",
    ),
    "mfm": Fusion(
        module=Mfm,
        small={"segment_count": 8},
        loss=mfm_loss,
        recipe={"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 32, "weight_decay": 0.0, "epochs": 200},
        paper="Tsai, Liang, Zadeh, Morency, Salakhutdinov 2019, ICLR",
    ),
}

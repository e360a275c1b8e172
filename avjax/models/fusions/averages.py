"""Plain baselines on the streams' averages: concatenated, or weighted by additive attention or by one number each.

Additive attention: Bahdanau et al., "Neural Machine Translation by Jointly Learning to Align and Translate", ICLR 2015.
Shapes: b clip, n step of a stream, s stream, d width, c class.

A missing modality is an all-False mask. Its vector is zero, and it gets no attention weight. Without any stream
only biases predict.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import Dropout, Project, masked_mean, masked_softmax, stream_inputs
from avjax.models.base import Batch, Fusion, Output
from avjax.models.fusions.base import FusionModule


class Averages(FusionModule):
    """The projected mean of each stream's real steps; subclasses combine these vectors.

    As projections are affine, the projected mean is the mean of the projected steps. Utterance features are streams of
    one step.

    Attributes:
      width: d of a projected stream; hidden: width of the layer before the head.
      dropout: rate on the input of that layer.
    """

    width: int = 256
    hidden: int = 256
    dropout: float = 0.5

    def combine(self, vectors: jax.Array, present: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Maps streams (b, s, d), present or not (b, s), to a vector (b, ·) and attention weights."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features also hold the combined vector as "joint".
        """
        steps, masks = stream_inputs(batch, self.streams, self.dtype)
        present = jnp.stack([jnp.any(masks[s], -1) for s in self.streams], -1)
        means = {s: masked_mean(steps[s], masks[s]) for s in self.streams}
        vectors = [Project((self.width,), dtype=self.dtype, name=f"project_{s}")(x) for s, x in means.items()]
        joint, attention = self.combine(jnp.where(present[..., None], jnp.stack(vectors, 1), 0), present)
        hidden = Dropout(self.dropout, train)(joint)
        hidden = jax.nn.relu(Project((self.hidden,), dtype=self.dtype, name="hidden")(hidden))
        return self.predict(hidden, {"joint": joint}, attention)


class Concat(Averages):
    """`Averages`, concatenated."""

    def combine(self, vectors: jax.Array, present: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Concatenates the streams, without weights."""
        return vectors.reshape(len(vectors), -1), {}


def weighted_sum(vectors: jax.Array, scores: jax.Array, present: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sums vectors (b, s, d) by the softmax of scores (b, s) over those present (b, s); also returns the softmax."""
    weights = masked_softmax(scores.astype(jnp.float32), present)
    return jnp.einsum("bs,bsd->bd", weights.astype(vectors.dtype), vectors), {"streams": weights}


class Additive(Averages):
    """`Averages`, summed by additive attention (Bahdanau et al. 2015, appendix A.1.2): scores v·tanh(W x + b).

    There is no query besides the learned v. Attention "streams" (b, s) in the order of `streams`.
    """

    def combine(self, vectors: jax.Array, present: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Sums the streams by additive attention."""
        hidden = jnp.tanh(Project((self.width,), dtype=self.dtype, name="attention")(vectors))
        scores = Project((1,), dtype=self.dtype, bias=False, name="score")(hidden)[..., 0]
        return weighted_sum(vectors, scores, present)


class WeightedSum(Averages):
    """`Averages`, summed by one learned weight per stream: a softmax, over the streams that a clip has.

    Attention "streams" (b, s) in the order of `streams`. All start with the same weight.
    """

    def combine(self, vectors: jax.Array, present: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Sums the streams by one learned weight each."""
        scores = self.param("scores", nn.initializers.zeros, (len(self.streams),))
        return weighted_sum(vectors, jnp.broadcast_to(scores, present.shape), present)


FUSIONS: dict[str, Fusion] = {
    "concat": Fusion(
        module=Concat,
        paper="plain baseline",
    ),
    "additive": Fusion(
        module=Additive,
        least=2,
        paper="Bahdanau, Cho, Bengio 2015, ICLR",
    ),
    "weighted_sum": Fusion(
        module=WeightedSum,
        least=2,
        paper="plain baseline",
    ),
}

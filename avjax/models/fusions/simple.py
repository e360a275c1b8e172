"""Plain baselines on the streams' averages, and attention that hops between streams (AMH).

Additive attention: Bahdanau et al., "Neural Machine Translation by Jointly Learning to Align and Translate", ICLR 2015.
AMH: Yoon et al., "Attentive Modality Hopping Mechanism for Speech Emotion Recognition", ICASSP 2020.
Shapes: b clip, n step of a stream, s stream, d width, c class.

A missing modality is an all-False mask. Its vector is zero, and where streams share attention it takes no share.
Without any stream nothing is left but the biases of the layers behind.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers.dropout import Dropout
from avjax.layers.linear import Project
from avjax.layers.lstm import Recurrence
from avjax.layers.masking import enter, masked_mean, masked_softmax
from avjax.models.base import Fusion, Output

# ---- Baselines ----------------------------------------------------------------------------------------------------


class Averages(nn.Module):
    """The mean of each stream's real steps, projected; what becomes of these vectors is up to the subclasses.

    A projection is affine, so that the projected mean is the mean of the projected steps. Utterance features are
    streams of one step.

    Attributes:
      classes: number of classes c.
      streams: any of text, audio, video.
      width: d of a projected stream; hidden: of the layer before the head.
      dropout: rate on what that layer reads.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("text", "audio", "video")
    width: int = 256
    hidden: int = 256
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32

    def combine(self, vectors: jax.Array, present: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Vectors (b, s, d) and which of them a clip has (b, s) → a vector (b, ·) and weights for pictures."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features hold the combined vector as "joint", beside what the head reads.
        """
        steps, masks = enter(batch, self.streams, self.dtype)
        present = jnp.stack([jnp.any(masks[s], -1) for s in self.streams], -1)
        means = {s: masked_mean(steps[s], masks[s]) for s in self.streams}
        vectors = [Project((self.width,), dtype=self.dtype, name=f"project_{s}")(x) for s, x in means.items()]
        joint, attention = self.combine(jnp.where(present[..., None], jnp.stack(vectors, 1), 0), present)
        hidden = Dropout(self.dropout, train)(joint)
        hidden = jax.nn.relu(Project((self.hidden,), dtype=self.dtype, name="hidden")(hidden))
        logits = nn.Dense(self.classes, name="head")(hidden.astype(jnp.float32))
        return Output({"fusion": logits}, {"fusion": hidden, "joint": joint}, attention)


class Concat(Averages):
    """`Averages`, joined end to end."""

    def combine(self, vectors: jax.Array, present: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return vectors.reshape(len(vectors), -1), {}


def weigh(vectors: jax.Array, scores: jax.Array, present: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of vectors (b, s, d) by the softmax of scores (b, s) over those present (b, s), and that softmax."""
    weights = masked_softmax(scores.astype(jnp.float32), present)
    return jnp.einsum("bs,bsd->bd", weights.astype(vectors.dtype), vectors), {"streams": weights}


class Additive(Averages):
    """`Averages`, summed by additive attention (Bahdanau et al. 2015, appendix A.1.2): scores v·tanh(W x + b).

    There is no query but what v has learned. Attention "streams" (b, s) in the order of `streams`.
    """

    def combine(self, vectors: jax.Array, present: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden = jnp.tanh(Project((self.width,), dtype=self.dtype, name="attention")(vectors))
        scores = Project((1,), dtype=self.dtype, bias=False, name="score")(hidden)[..., 0]
        return weigh(vectors, scores, present)


class WeightedSum(Averages):
    """`Averages`, summed by one learned weight per stream: a softmax, over the streams that a clip has.

    Attention "streams" (b, s) in the order of `streams`. All start with the same weight.
    """

    def combine(self, vectors: jax.Array, present: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores = self.param("scores", nn.initializers.zeros, (len(self.streams),))
        return weigh(vectors, jnp.broadcast_to(scores, present.shape), present)


# ---- AMH ----------------------------------------------------------------------------------------------------------


class States(nn.Module):
    """An LSTM over the real steps of a stream, beside one from behind if `bidirectional`."""

    width: int
    bidirectional: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps x (b, n, w) under mask (b, n) to the states after each step (b, n, d) and the last of each way (b, d).

        d is `width`, or twice that. States are in `dtype`, and zeros for a clip without a real step.
        """
        states, _ = Recurrence(self.width, dtype=self.dtype, name="forth")(x, mask)
        last = states[:, -1]
        if self.bidirectional:
            behind, _ = Recurrence(self.width, reverse=True, dtype=self.dtype, name="back")(x, mask)
            states, last = jnp.concatenate([states, behind], -1), jnp.concatenate([last, behind[:, 0]], -1)
        return states.astype(self.dtype), last.astype(self.dtype)


# The order in which the paper's hops go round.
ROUND = ("video", "audio", "text")


class Amh(nn.Module):
    """Attentive modality hopping (Yoon et al. 2020).

    Every stream is encoded by an LSTM (the paper's are GRUs), whose last state is its vector. Each hop attends to the
    states of one stream, asked for by the vectors of the others (Eqs. 2–4), and puts the answer in that vector's place:
    first video, then audio, then text, and round again, with new weights for every hop. The head reads all vectors.
    Widths and dropouts are those of the released script.

    The released code turns the backward states round once more, so that a bidirectional encoder joins the first step
    to the last; here every step is joined to itself. Paper and script read forwards alone.

    Attributes:
      classes: number of classes c.
      streams: two or more of text, audio, video.
      hops: how many; the paper goes up to 7.
      widths: of the streams' LSTMs; dropouts: rates on what these read.
      bidirectional: with an LSTM from behind, which doubles the widths.
      dtype: compute dtype.
    """

    classes: int
    streams: tuple[str, ...] = ("text", "audio", "video")
    hops: int = 7
    widths: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"text": 200, "audio": 200, "video": 128})
    dropouts: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"text": 0.7, "audio": 0.3, "video": 0.3})
    bidirectional: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features hold each stream's last vector by its name; attention "hop_<i>_<stream>" (b, n), i from 1.
        """
        steps, masks = enter(batch, self.streams, self.dtype)
        states, vectors, attention = {}, {}, {}
        for s in self.streams:
            dropped = Dropout(self.dropouts[s], train)(steps[s])
            encoder = States(self.widths[s], self.bidirectional, self.dtype, name=f"{s}_states")
            states[s], vectors[s] = encoder(dropped, masks[s])
        order = [s for s in ROUND if s in self.streams]
        for i in range(self.hops):
            s = order[i % len(order)]
            others = jnp.concatenate([vectors[o] for o in self.streams if o != s], -1)
            weights = self._ask(f"hop_{i + 1}", others, states[s], masks[s])
            vectors[s] = jnp.einsum("bn,bnd->bd", weights.astype(self.dtype), states[s])
            attention[f"hop_{i + 1}_{s}"] = weights
        fused = jnp.concatenate([vectors[s] for s in self.streams], -1)
        logits = nn.Dense(self.classes, name="head")(fused.astype(jnp.float32))
        return Output({"fusion": logits}, {"fusion": fused} | vectors, attention)

    def _ask(self, name: str, others: jax.Array, states: jax.Array, mask: jax.Array) -> jax.Array:
        """The weights (b, n) of the steps of one stream, given the vectors of the others (b, ·)."""
        query = Project(states.shape[-1:], dtype=self.dtype, name=name)(others)
        return masked_softmax(jnp.einsum("bd,bnd->bn", query, states).astype(jnp.float32), mask)


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
    "amh": Fusion(
        module=Amh,
        least=2,
        recipe={"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 128, "weight_decay": 0.0},
        paper="Yoon, Dey, Lee, Jung 2020, ICASSP",
    ),
}

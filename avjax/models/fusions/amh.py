"""AMH: attention that hops between streams.

Yoon et al., "Attentive Modality Hopping Mechanism for Speech Emotion Recognition", ICASSP 2020.
Shapes: b clip, n step of a stream, d width, c class.

A missing modality is an all-False mask. Its vector is zero, and so is any answer that is asked of it.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import Dropout, LstmEncoder, Project, masked_softmax, stream_inputs
from avjax.models.base import Batch, Fusion, Output
from avjax.models.fusions.base import FusionModule

# The order in which the paper's hops go round.
ROUND = ("video", "audio", "text")


class Amh(FusionModule):
    """Attentive modality hopping (Yoon et al. 2020).

    Every stream is encoded by an LSTM (the paper's are GRUs), whose last state is its vector. Each hop attends to the
    states of one stream, asked for by the vectors of the others (Eqs. 2–4), and puts the answer in that vector's place:
    first video, then audio, then text, and round again, with new weights for every hop. The head reads all vectors.
    Widths and dropouts are those of the released script.

    The released code turns the backward states round once more, so that a bidirectional encoder joins the first step
    to the last; here every step is joined to itself. Paper and script read forwards alone.

    Attributes:
      hops: how many; the paper goes up to 7.
      widths: of the streams' LSTMs; dropouts: rates on what these read.
      bidirectional: with an LSTM from behind, which doubles the widths.
    """

    hops: int = 7
    widths: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"text": 200, "audio": 200, "video": 128})
    dropouts: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"text": 0.7, "audio": 0.3, "video": 0.3})
    bidirectional: bool = False

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features hold each stream's last vector by its name; attention "hop_<i>_<stream>" (b, n), i from 1.
        """
        steps, masks = stream_inputs(batch, self.streams, self.dtype)
        states, vectors, attention = {}, {}, {}
        for s in self.streams:
            dropped = Dropout(self.dropouts[s], train)(steps[s])
            encoder = LstmEncoder(self.widths[s], self.bidirectional, self.dtype, name=f"{s}_states")
            states[s], vectors[s] = encoder(dropped, masks[s])
        order = [s for s in ROUND if s in self.streams]
        for i in range(self.hops):
            s = order[i % len(order)]
            others = jnp.concatenate([vectors[o] for o in self.streams if o != s], -1)
            weights = self._ask(f"hop_{i + 1}", others, states[s], masks[s])
            vectors[s] = jnp.einsum("bn,bnd->bd", weights.astype(self.dtype), states[s])
            attention[f"hop_{i + 1}_{s}"] = weights
        fused = jnp.concatenate([vectors[s] for s in self.streams], -1)
        return self.predict(fused, vectors, attention)

    def _ask(self, name: str, others: jax.Array, states: jax.Array, mask: jax.Array) -> jax.Array:
        """The weights (b, n) of the steps of one stream, given the vectors of the others (b, ·)."""
        query = Project(states.shape[-1:], dtype=self.dtype, name=name)(others)
        return masked_softmax(jnp.einsum("bd,bnd->bn", query, states).astype(jnp.float32), mask)


FUSIONS: dict[str, Fusion] = {
    "amh": Fusion(
        module=Amh,
        least=2,
        recipe={"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 128, "weight_decay": 0.0},
        paper="Yoon, Dey, Lee, Jung 2020, ICASSP",
    ),
}

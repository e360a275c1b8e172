"""AMH: attention that hops between streams.

Yoon et al., "Attentive Modality Hopping Mechanism for Speech Emotion Recognition", ICASSP 2020.
Shapes: b clip, n step of a stream, d width, c class.

A missing modality is an all-False mask. Its vector is zero, and so is what hops read from it.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import Dropout, LstmEncoder, Project, masked_softmax, stream_inputs
from avjax.models.base import Batch, Fusion, Output
from avjax.models.fusions.base import FusionModule

# The order of the paper's hops.
ROUND = ("video", "audio", "text")


class Amh(FusionModule):
    """Attentive modality hopping (Yoon et al. 2020).

    Every stream is encoded by an LSTM (the paper's are GRUs), whose last state is its vector. Each hop attends to the
    states of one stream with the vectors of the others as query (Eqs. 2–4), and replaces the stream's vector by the
    result: first video, then audio, then text, and again, with new weights for every hop. The head reads all vectors.
    Widths and dropouts are those of the released script.

    The released code reverses the backward states a second time, so that a bidirectional encoder concatenates the first
    step with the last; this one aligns them. Paper and script use forward LSTMs only.

    Attributes:
      hops: number of hops; the paper goes up to 7.
      widths: of the streams' LSTMs; dropouts: rates on their inputs.
      bidirectional: whether to add a backward LSTM, which doubles the widths.
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
            weights = self._attend(f"hop_{i + 1}", others, states[s], masks[s])
            vectors[s] = jnp.einsum("bn,bnd->bd", weights.astype(self.dtype), states[s])
            attention[f"hop_{i + 1}_{s}"] = weights
        fused = jnp.concatenate([vectors[s] for s in self.streams], -1)
        return self.predict(fused, vectors, attention)

    def _attend(self, name: str, others: jax.Array, states: jax.Array, mask: jax.Array) -> jax.Array:
        """Computes the weights (b, n) of the steps of one stream from the vectors of the others (b, ·)."""
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

"""bc-LSTM: each turn is classified in the context of the turns before and after it.

Poria et al., "Context-Dependent Sentiment Analysis in User-Generated Videos", ACL 2017.
Shapes: b conversation, u turn, n step of a stream, d width, c class; batches as `masking.turns` reads them.

A turn that lacks a stream keeps the LSTM states of its neighbours.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import Dropout, Project, Recurrence, turns
from avjax.models.base import Batch, Fusion, Output, heads_loss, stream_heads
from avjax.models.fusions.base import FusionModule


class Context(nn.Module):
    """A bidirectional LSTM over turns and a dense layer with tanh (Poria et al. 2017, section 3.2)."""

    hidden: int
    width: int
    dropout: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """Maps x (b, u, w) under mask (b, u) to (b, u, width)."""
        drop = Dropout(self.dropout, train)
        directions = {"forward": False, "backward": True}
        states = [Recurrence(self.hidden, back, self.dtype, name=name)(x, mask)[0] for name, back in directions.items()]
        x = drop(jnp.concatenate(states, -1).astype(self.dtype))
        return drop(jnp.tanh(Project((self.width,), dtype=self.dtype, name="dense")(x)))


class BcLstm(FusionModule):
    """Hierarchical bc-LSTM (Poria et al. 2017, section 3.3): a context LSTM per stream, and one on top of them.

    The authors train the streams' LSTMs first and then the upper one on their outputs. This module trains all at once,
    without a gradient from the upper one to the others, which is equivalent.

    Attributes:
      hidden: width of each LSTM; width: of the dense layers after them.
      dropout: rate after the LSTMs and the dense layers.
    """

    hidden: int = 300
    width: int = 100
    dropout: float = 0.6

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Computes logits (b, u, c) of the head "fusion" and of one per stream; see `masking.turns` for the batch."""
        means, present = turns(batch, self.streams, self.dtype)
        features = {s: self._context(f"{s}_context")(means[s], present[s], train) for s in self.streams}
        below = jax.lax.stop_gradient(jnp.concatenate(list(features.values()), -1))
        features = {"fusion": self._context("context")(below, batch["turn_mask"], train)} | features
        logits = {s: nn.Dense(self.classes, name=f"head_{s}")(x.astype(jnp.float32)) for s, x in features.items()}
        return Output(logits, features, {})

    def _context(self, name: str) -> Context:
        return Context(self.hidden, self.width, self.dropout, self.dtype, name=name)


FUSIONS: dict[str, Fusion] = {
    "bc_lstm": Fusion(
        module=BcLstm,
        paper="Poria et al. 2017, ACL",
        loss=heads_loss,
        heads=stream_heads,
        turns=True,
        recipe={"batch_size": 10},
    ),
}

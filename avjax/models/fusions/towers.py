"""A transformer per stream with gates between layers: the common part of MMTM and MSAF.

Shapes: b clip, n step of a stream, d width, c class. A missing modality is an all-False mask: its average is zero, as
is its part of the concatenated vector.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import Dropout, PreNormBlock, Project, masked_mean, stream_inputs
from avjax.models.base import Batch, Output
from avjax.models.fusions.base import FusionModule


class Towers(FusionModule):
    """A transformer per stream, gates between layers, and a head on the concatenated averages.

    The papers put their blocks between stages of convolutional networks; on feature sequences, transformer layers
    replace the stages. Subclasses define the block.

    Attributes:
      width: d of a projected stream; heads: divides it; layers: of each tower.
      dropout: rate on the projected streams and the concatenated averages.
    """

    width: int = 128
    heads: int = 4
    layers: int = 2
    dropout: float = 0.2

    def gate(self, name: str) -> nn.Module:
        """Returns the block between two layers: (steps, masks, train) → steps."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams."""
        drop = Dropout(self.dropout, train)
        steps, masks = stream_inputs(batch, self.streams, self.dtype)
        steps = {s: drop(Project((self.width,), dtype=self.dtype, name=f"project_{s}")(steps[s])) for s in steps}
        for i in range(self.layers):
            if i:
                steps = self.gate(f"gate_{i}")(steps, masks, train)
            steps = {s: self._layer(f"{s}_{i}")(x, masks[s]) for s, x in steps.items()}
        fused = drop(jnp.concatenate([masked_mean(steps[s], masks[s]) for s in self.streams], -1))
        return self.predict(fused)

    def _layer(self, name: str) -> PreNormBlock:
        return PreNormBlock(self.heads, 4 * self.width, jax.nn.relu, 1e-5, self.dtype, name=name)

"""MMTM: averages of all streams gate the channels of each one.

Joze et al., "MMTM: Multimodal Transfer Module for CNN Fusion", CVPR 2020. Shapes and missing modalities as in `Towers`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import Project, masked_mean
from avjax.models.base import Fusion, Streams
from avjax.models.fusions.towers import Towers


class MmtmBlock(nn.Module):
    """Multimodal transfer module (Joze et al. 2020, section 3.2): averages of all streams gate each one's channels.

    Squeeze: a dense layer on the concatenated averages over time, with 1/`reduction` of their width. Excitation: twice
    the sigmoid of a dense layer per stream, so that an excitation of zero changes nothing.
    """

    reduction: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, steps: Streams, masks: Streams, train: bool = False) -> Streams:
        """Rescales streams (b, n, d) with masks (b, n)."""
        squeezed = jnp.concatenate([masked_mean(x, masks[s]) for s, x in steps.items()], -1)
        width = max(squeezed.shape[-1] // self.reduction, 1)
        joint = jax.nn.relu(Project((width,), dtype=self.dtype, name="squeeze")(squeezed))
        excited = {s: Project(x.shape[-1:], dtype=self.dtype, name=f"excite_{s}")(joint) for s, x in steps.items()}
        return {s: x * 2 * jax.nn.sigmoid(excited[s])[:, None] for s, x in steps.items()}


class Mmtm(Towers):
    """`Towers` gated by `MmtmBlock`s; `reduction` as in these."""

    reduction: int = 4

    def gate(self, name: str) -> MmtmBlock:
        """Returns an `MmtmBlock`."""
        return MmtmBlock(self.reduction, self.dtype, name=name)


FUSIONS: dict[str, Fusion] = {
    "mmtm": Fusion(
        module=Mmtm,
        recipe={"learning_rate": 1e-3},
        paper="Joze et al. 2020, CVPR",
    ),
}

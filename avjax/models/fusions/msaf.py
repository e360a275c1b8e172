"""MSAF: blocks of channels of all streams compete for attention.

Su et al., "MSAF: Multimodal Split Attention Fusion", 2020. Shapes and missing modalities as in `Towers`, g channel
block; the blocks of a missing modality get no attention.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import Dropout, Project, masked_mean, masked_softmax
from avjax.models.base import Fusion, Streams
from avjax.models.fusions.towers import Towers


class MsafBlock(nn.Module):
    """Multimodal split attention (Su et al. 2020, section 3): blocks of channels of all streams compete.

    Every stream is split into blocks of `block` channels, the last one zero-padded. The sums of blocks,
    averaged over time and summed over streams, give each block a weight per channel; these sum to 1 over all blocks.

    The released block has a batch norm on the joint vector, which makes clips depend on each other; in evaluation it
    folds into the dense layer before it, so this one has none. `dropout` drops whole blocks.
    """

    block: int
    reduction: int = 4
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, steps: Streams, masks: Streams, train: bool = False) -> Streams:
        """Rescales streams (b, n, d) with masks (b, n)."""
        drop = Dropout(self.dropout, train, shared=(1, 3))
        split = {s: drop(self._split(x)) for s, x in steps.items()}  # b n g block
        joint = sum(masked_mean(jnp.sum(x, 2), masks[s]) for s, x in split.items())
        joint = jax.nn.relu(Project((max(self.block // self.reduction, 1),), dtype=self.dtype, name="joint")(joint))
        present = {s: jnp.any(masks[s], -1, keepdims=True) for s in split}
        present = jnp.concatenate([jnp.broadcast_to(present[s], (len(joint), x.shape[2])) for s, x in split.items()], 1)
        scores = Project((self.block, present.shape[1]), dtype=self.dtype, name="attention")(joint)
        weights = jnp.moveaxis(masked_softmax(scores, present[:, None]), 1, 2)  # b g block
        by_stream = self._split_weights(weights, {s: x.shape[2] for s, x in split.items()})
        scaled = {s: (x * by_stream[s][:, None]).reshape(*x.shape[:2], -1) for s, x in split.items()}
        return {s: x[..., : steps[s].shape[-1]] for s, x in scaled.items()}

    def _split(self, x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % self.block)))
        return padded.reshape(*x.shape[:2], -1, self.block)

    def _split_weights(self, weights: jax.Array, counts: dict[str, int]) -> Streams:
        """Splits the weights of all blocks (b, g, block) by stream."""
        ends = [sum(list(counts.values())[: i + 1]) for i in range(len(counts) - 1)]
        return dict(zip(counts, jnp.split(weights, ends, 1), strict=True))


class Msaf(Towers):
    """`Towers` gated by `MsafBlock`s; `block`, `reduction` and `block_dropout` as in these."""

    block: int = 16
    reduction: int = 4
    block_dropout: float = 0.2

    def gate(self, name: str) -> MsafBlock:
        """Returns an `MsafBlock`."""
        return MsafBlock(self.block, self.reduction, self.block_dropout, self.dtype, name=name)


FUSIONS: dict[str, Fusion] = {
    "msaf": Fusion(
        module=Msaf,
        recipe={"learning_rate": 1e-3, "batch_size": 4, "epochs": 70},
        paper="Su et al. 2020",
    ),
}

"""T-MEP: a transformer for each stream, then layers of cross- and self-attention over all.

Zhang et al., "Transformer-Based Multimodal Emotional Perception for Dynamic Facial Expression Recognition in the Wild",
IEEE Transactions on Circuits and Systems for Video Technology 2024. Shapes: b clip, n step of a stream, d width, c
class.

There is no public code. Blocks and their attention follow our reading of the paper; the sizes are ours, as the paper's
depend on its encoders.

Positions are sinusoids, counted from a clip's first real step. A missing modality is an all-False mask: it is not
attended to and not part of the mean. Without any modality the prediction is the head's bias.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import CrossBlock, CrossmodalEncoder, Project, masked_mean, stream_inputs
from avjax.models.base import Batch, Fusion, Output, Streams
from avjax.models.fusions.base import FusionModule


class JointLayer(nn.Module):
    """Cross-attention of every stream to all others, then self-attention over the concatenated streams."""

    heads: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, steps: Streams, masks: Streams, train: bool = False) -> Streams:
        """Maps streams (b, n, d) with masks (b, n) to the same shapes; a single stream has no cross-attention."""
        inner = 4 * next(iter(steps.values())).shape[-1]
        block = functools.partial(CrossBlock, self.heads, inner, dtype=self.dtype, dropout=self.dropout)
        if len(steps) > 1:
            others = {s: _joined(steps, masks, [o for o in steps if o != s]) for s in steps}
            steps = {s: block(name=f"{s}_asks")(x, *others[s], train) for s, x in steps.items()}
        joint, mask = _joined(steps, masks, list(steps))
        joint = block(name="together")(joint, joint, mask, train)
        lengths = [x.shape[1] for x in steps.values()]
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]
        return dict(zip(steps, jnp.split(joint, ends, 1), strict=True))


def _joined(steps: Streams, masks: Streams, names: list[str]) -> tuple[jax.Array, jax.Array]:
    """Concatenates the steps of the named streams, and their masks."""
    return jnp.concatenate([steps[s] for s in names], 1), jnp.concatenate([masks[s] for s in names], 1)


class Tmep(FusionModule):
    """T-MEP (Zhang et al. 2024): a transformer for each stream, then layers of cross- and self-attention over all.

    The paper maps audio and text into the space of video; this model maps all streams to one width. The fused vector is
    the mean over the streams that a clip has, each averaged over its real steps, so that long streams count no more
    than short ones.

    Attributes:
      width: d of a projected stream; heads: divides it.
      layers: of each stream's own transformer; joint_layers: number of `JointLayer`s after them.
      dropout: rate in the residual branches.
    """

    width: int = 256
    heads: int = 8
    layers: int = 2
    joint_layers: int = 2
    dropout: float = 0.1

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams; features also hold their vectors."""
        steps, masks = stream_inputs(batch, self.streams, self.dtype)
        steps = {s: Project((self.width,), dtype=self.dtype, name=f"project_{s}")(x) for s, x in steps.items()}
        own = functools.partial(
            CrossmodalEncoder, self.layers, self.heads, causal=False, dropout=self.dropout, dtype=self.dtype
        )
        steps = {s: own(name=s)(x, masks[s], train=train) for s, x in steps.items()}
        for i in range(self.joint_layers):
            steps = JointLayer(self.heads, self.dropout, self.dtype, name=f"joint_{i}")(steps, masks, train)
        norm = nn.LayerNorm(1e-5, use_fast_variance=False, name="norm")
        vectors = {s: masked_mean(norm(steps[s].astype(jnp.float32)), masks[s]) for s in self.streams}
        present = jnp.stack([jnp.any(masks[s], -1) for s in self.streams], -1)  # b stream
        fused = masked_mean(jnp.stack(list(vectors.values()), 1), present)
        return self.predict(fused, vectors)


FUSIONS: dict[str, Fusion] = {
    "tmep": Fusion(
        module=Tmep,
        small={"width": 128, "layers": 1, "joint_layers": 1},
        paper="Zhang et al. 2024, IEEE TCSVT",
    ),
}

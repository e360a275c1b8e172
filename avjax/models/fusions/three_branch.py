"""Three transformer branches: one for each of two streams, and one for both attending to each other.

John and Kawanishi, "Audio and video-based emotion recognition using multimodal transformers", ICPR 2022.
Shapes: b clip, n step of a stream, d width, c class.

There is no public code. Blocks and their attention follow our reading of the paper; the sizes are ours, as the paper's
depend on its encoders.

Positions are sinusoids, counted from a clip's first real step. A missing modality is an all-False mask: it is not
attended to, and its own vector is zero. Without any modality the prediction is the head's bias.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import CrossmodalEncoder, Dropout, Project, masked_mean, stream_inputs
from avjax.models.base import Batch, Fusion, Output, Streams
from avjax.models.fusions.base import FusionModule


class ThreeBranch(FusionModule):
    """Three transformer branches (John and Kawanishi 2022): one per stream, and one for both attending to each other.

    The averages over real steps of the two self-attention branches and of both directions of the cross-attention branch
    are concatenated for the head. The paper gives the patches of one frame a common time embedding; as a frame is one
    step, positions do the same. If a clip lacks a stream, the cross-attention branch is zero.

    Attributes:
      streams: two of text, audio, video.
      width: d of a projected stream; heads: divides it; layers: of every transformer.
      dropout: rate in the residual branches and on the concatenated vectors.
    """

    streams: tuple[str, ...] = ("audio", "video")
    width: int = 128
    heads: int = 8
    layers: int = 2
    dropout: float = 0.1

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features also hold the branches: each stream's (b, d), and "cross" (b, 2d).
        """
        steps, masks = stream_inputs(batch, self.streams, self.dtype)
        steps = {s: Project((self.width,), dtype=self.dtype, name=f"project_{s}")(x) for s, x in steps.items()}
        pairs = zip(self.streams, self.streams[::-1], strict=True)
        branches = {s: self._alone(s, steps[s], masks[s], train) for s in self.streams}
        branches["cross"] = jnp.concatenate([self._cross(s, o, steps, masks, train) for s, o in pairs], -1)
        joined = jnp.concatenate(list(branches.values()), -1)
        fused = Dropout(self.dropout, train)(joined)
        return self.predict(fused, branches)

    def _alone(self, stream: str, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        x = self._encoder(stream)(x, mask, train=train)
        return masked_mean(x.astype(jnp.float32), mask)

    def _cross(self, stream: str, other: str, steps: Streams, masks: Streams, train: bool) -> jax.Array:
        encoder = self._encoder(f"{stream}_asks_{other}")
        x = encoder(steps[stream], masks[stream], steps[other], masks[other], train)
        real = masks[stream] & jnp.any(masks[other], -1, keepdims=True)
        return masked_mean(x.astype(jnp.float32), real)

    def _encoder(self, name: str) -> CrossmodalEncoder:
        return CrossmodalEncoder(
            self.layers, self.heads, causal=False, dropout=self.dropout, dtype=self.dtype, name=name
        )


FUSIONS: dict[str, Fusion] = {
    "three_branch": Fusion(
        module=ThreeBranch,
        least=2,
        most=2,
        paper="John and Kawanishi 2022, ICPR",
    ),
}

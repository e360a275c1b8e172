"""AVT-CA as in its paper: transformer blocks on audio and video, then cross-attention in both directions.

Venkatraman et al. 2024, "Multimodal Emotion Recognition using Audio-Video Transformer Fusion with Cross Attention".
The authors' released code differs from it, see `avtca_released.AvtCaReleased`. Shapes: b clip, t video step, s audio
step, n frame of any clip, h row or head, w column or input width, d width, c class.

Choices where the paper is silent:
- Convolutions over time read zeros beyond the ends of a clip, and pooling keeps an unpaired last step, so that a clip
  may have a single step. All padding is removed first.
- Batch norms are `StepNorm`s: they use running statistics unless the caller makes "batch_stats" mutable. In the frame
  network they count the pixels of real frames. So no prediction depends on the batch or on padding.
- Channel attention has a ReLU between its layers. The spatial weights are multiplied by the number of pixels, by which
  the softmax would shrink the features; their convolution is 3 x 3, the only kernel size in the paper.
- Local features are computed from the pooled map, as in the released code, and each quarter keeps its position: the
  paper's psi.
- Inverted residual blocks are those of MobileNetV2. Both halve the map, so neither has a residual.
- Attention scales the scores but has no biases and no positions: the equations have none.

A missing modality is an all-False mask. The other one then gets nothing from cross-attention, and the vector of the
missing one is zero; without either the prediction is the head's bias.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.errors import AvjaxError
from avjax.layers import (
    Dropout,
    FrameConvolution,
    Project,
    StepNorm,
    TimeConvolution,
    attend,
    halved,
    masked_max,
    pack,
)
from avjax.models.base import Batch, Fusion, Output, Stream
from avjax.models.fusions.base import FusionModule
from avjax.models.fusions.mmer import softhard

_BLOCKS = ("both", "self", "cross")
_REDUCTION = 16  # of the channels inside channel attention
_EXPANSION = 4  # of the width inside inverted residual blocks and feed-forward networks


class PooledBlock(nn.Module):
    """Convolution over 3 steps, norm, ReLU, maximum of every 2 steps (Eqs. 1a–1d)."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> Stream:
        """Maps x (b, s, d), real steps first, to (b, ceil(s / 2), width), and its mask likewise."""
        x = TimeConvolution(self.width, 3, dtype=self.dtype, name="conv")(jnp.where(mask[..., None], x, 0))
        x = nn.relu(StepNorm(dtype=self.dtype, name="norm")(x, mask))
        # `jnp.maximum` for the reason given in `masked_max`. After a ReLU, padding zeros never exceed a real step.
        pairs = _pairs(jnp.where(mask[..., None], x, 0))
        return jnp.maximum(pairs[:, :, 0], pairs[:, :, 1]), _pairs(mask).any(2)


def _pairs(x: jax.Array) -> jax.Array:
    """Pairs up steps: (b, s, ...) → (b, ceil(s / 2), 2, ...), an odd last one with zeros or False."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, 2, *x.shape[2:])


# ---- Frames -------------------------------------------------------------------------------------------------------


class Refinement(nn.Module):
    """Channel attention times spatial attention times the map, plus local features (section III-A2)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (n, h, w, d) to the same shape."""
        channel = nn.sigmoid(self._channels(jnp.mean(x, (1, 2))))[:, None, None]
        return channel * self._spatial(x).astype(self.dtype) * x + self._local(x)

    def _channels(self, x: jax.Array) -> jax.Array:
        project = functools.partial(Project, dtype=self.dtype)
        narrow = max(x.shape[-1] // _REDUCTION, 1)
        return project(x.shape[-1:], name="channel_out")(nn.relu(project((narrow,), name="channel")(x)))

    def _spatial(self, x: jax.Array) -> jax.Array:
        """Computes the weight of each pixel, 1 on average: (n, h, w, 1)."""
        # Without a bias, which cancels in the softmax.
        scores = FrameConvolution(1, bias=False, dtype=self.dtype, name="place")(x)
        return nn.softmax(scores.astype(jnp.float32), (1, 2)) * (x.shape[1] * x.shape[2])

    def _local(self, x: jax.Array) -> jax.Array:
        """Convolves each of the four quarters separately; the first half of an odd side is the larger one."""
        n, h, w, d = x.shape
        # The padding equals the zeros that the convolution reads beyond the edge of the smaller half.
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        half = (x.shape[1] // 2, x.shape[2] // 2)
        quarters = x.reshape(n, 2, half[0], 2, half[1], d).swapaxes(2, 3).reshape(4 * n, *half, d)
        quarters = FrameConvolution(d, dtype=self.dtype, name="local")(quarters)
        return quarters.reshape(n, 2, 2, *half, d).swapaxes(2, 3).reshape(x.shape)[:, :h, :w]


class InvertedResidual(nn.Module):
    """Expansion, depthwise 3 x 3 convolution with stride 2, linear projection (MobileNetV2, table 1)."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x (n, h, w, d), whose real frames are those of mask (n,), to (n, ceil(h / 2), ceil(w / 2), width)."""
        inner = _EXPANSION * x.shape[-1]
        project = functools.partial(Project, bias=False, dtype=self.dtype)
        x = nn.relu6(self._norm("expand_norm", project((inner,), name="expand")(x), mask))
        x = FrameConvolution(inner, stride=2, channelwise=True, bias=False, dtype=self.dtype, name="depthwise")(x)
        x = nn.relu6(self._norm("depthwise_norm", x, mask))
        return self._norm("norm", project((self.width,), name="project")(x), mask)

    def _norm(self, name: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        pixels = x.reshape(x.shape[0], -1, x.shape[-1])
        real = jnp.broadcast_to(mask[:, None], pixels.shape[:2])
        return StepNorm(dtype=self.dtype, name=name)(pixels, real).reshape(x.shape)


class FrameBranch(nn.Module):
    """The video branch on frames: maps each frame to a vector (section III-A2)."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, frames: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps frames (n, h, w, 3), RGB from 0 to 255, uint8 or float, under mask (n,) to (n, width).

        Raises:
          AvjaxError: height or width is odd.
        """
        if frames.shape[1] % 2 or frames.shape[2] % 2:
            raise AvjaxError(
                f"frames of {frames.shape[1]} x {frames.shape[2]} pixels cannot be halved by AVT-CA: "
                "resize them to even sides, such as 112 x 112"
            )
        x = (jnp.where(mask[:, None, None, None], frames, 0) / 255).astype(self.dtype)
        x = nn.relu(FrameConvolution(self.width // 2, stride=2, dtype=self.dtype, name="stem")(x))
        x = halved(x)
        x = Refinement(self.dtype, name="refinement")(x)
        for i in range(2):
            x = InvertedResidual(self.width, self.dtype, name=f"inverted_{i}")(x, mask)
        return jnp.mean(x, (1, 2))


# ---- Fusion -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention without biases from one sequence to the real steps of another (Eqs. 2, 3a, 3b)."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps x (b, q, d) and source (b, k, d) under mask (b, k) to a context (b, q, d) and weights (b, h, q, k).

        Both are zeros where the source has no real step.
        """
        project = functools.partial(Project, bias=False, dtype=self.dtype)
        split = (self.heads, x.shape[-1] // self.heads)
        query, key, value = (
            project(split, name=name)(sequence) for name, sequence in (("query", x), ("key", source), ("value", source))
        )
        context, weights = attend(query, key, value, mask)
        return project(x.shape[-1:], inputs=2, name="out")(context), weights


class TransformerBlock(nn.Module):
    """Self-attention, a norm and a feed-forward network, both with residuals (Eqs. 2–6)."""

    heads: int
    dropout: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        """Maps x (b, n, d) under mask (b, n) to (b, n, d)."""
        width = x.shape[-1]
        project = functools.partial(Project, dtype=self.dtype)
        attended, _ = Attention(self.heads, self.dtype, name="attention")(x, x, mask)
        # Flax computes statistics and affine map in float32, whatever the `dtype`.
        x = nn.LayerNorm(1e-5, self.dtype, use_fast_variance=False, name="norm")(attended + x)
        hidden = nn.gelu(project((_EXPANSION * width,), name="up")(x), approximate=False)
        return x + project((width,), name="down")(Dropout(self.dropout, train)(hidden))


class AvtCa(FusionModule):
    """AVT-CA (Algorithm 1 of the paper).

    Attributes:
      streams: audio and video, in any order.
      frames: whether video is frames (b, t, h, w, 3) from 0 to 255; else it is a feature sequence (b, t, w), which a
        linear layer maps to `width` instead of the frame network.
      width: d, even; the first convolution of each branch has half of it.
      heads: number of attention heads; must divide width.
      dropout: rate inside the feed-forward networks (Eq. 5b), training only.
      blocks: "both", or "self" or "cross" alone (rows IT and CT of Table V).
      softhard: whether training uses the modality dropout of `mmer.softhard` (rng "dropout").
    """

    streams: tuple[str, ...] = ("audio", "video")
    frames: bool = False
    width: int = 128
    heads: int = 4
    dropout: float = 0.1
    blocks: str = "both"
    softhard: bool = False

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `audio (b, s, w)`, `video`, and their masks (b, s) and (b, t); head "fusion".

        With cross blocks, attention holds the weights of "audio" (b, ceil(s / 4), t) on video, and of "video"
        (b, t, ceil(s / 4)) on audio, averaged over heads, zeros where either is masked. An audio step is then four
        input steps.

        Raises:
          AvjaxError: the shape of video does not fit `frames`.
        """
        if train and self.softhard:
            batch = softhard(batch, ("audio", "video"), self.make_rng("dropout"))
        audio, video, weights = self._audio(batch), self._video(batch), {}
        if self.blocks != "cross":
            audio, video = self._self_attend("audio", audio, train), self._self_attend("video", video, train)
        if self.blocks != "self":
            audio, video, weights = self._cross_attend(audio, video)
        fused = masked_max(*audio) + masked_max(*video)
        return self.predict(fused, {}, weights)

    def _audio(self, batch: Batch) -> Stream:
        x, mask = pack(batch["audio"].astype(self.dtype), batch["audio_mask"])
        for i, width in enumerate((self.width // 2, self.width)):
            x, mask = PooledBlock(width, self.dtype, name=f"audio_{i}")(x, mask)
        return x, mask

    def _video(self, batch: Batch) -> Stream:
        x, mask = batch["video"], batch["video_mask"]
        if x.ndim != (5 if self.frames else 3):
            wanted = "frames (clip, frame, row, column, 3)" if self.frames else "features (clip, step, width)"
            raise AvjaxError(
                f"the video stream has shape {x.shape}; AVT-CA with frames={self.frames} reads {wanted}: "
                f"give them, or set frames to {not self.frames}"
            )
        if not self.frames:
            x = jnp.where(mask[..., None], x, 0)
            return Project((self.width,), dtype=self.dtype, name="video")(x), mask
        vectors = FrameBranch(self.width, self.dtype, name="video")(x.reshape(-1, *x.shape[2:]), mask.reshape(-1))
        return vectors.reshape(*mask.shape, self.width), mask

    def _self_attend(self, name: str, stream: Stream, train: bool) -> Stream:
        x, mask = stream
        block = TransformerBlock(self.heads, self.dropout, self.dtype, name=f"{name}_block")
        return block(x, mask, train), mask

    def _cross_attend(self, audio: Stream, video: Stream) -> tuple[Stream, Stream, dict[str, jax.Array]]:
        """Adds to each stream its cross-attention to the other (section III-C; Algorithm 1, lines 17–20)."""
        attention = lambda name: Attention(self.heads, self.dtype, name=f"{name}_asks")  # noqa: E731
        a, a_weights = attention("audio")(audio[0], *video)
        v, v_weights = attention("video")(video[0], *audio)
        weights = {"audio": _head_mean(a_weights, audio[1]), "video": _head_mean(v_weights, video[1])}
        return (a + audio[0], audio[1]), (v + video[0], video[1]), weights


def _head_mean(weights: jax.Array, mask: jax.Array) -> jax.Array:
    """Averages weights (b, h, q, k) over heads, zeros for masked queries: (b, q, k)."""
    return jnp.where(mask[..., None], jnp.mean(weights, 1), 0)


# The rows of Table V, and the full model with modality dropout: name → settings.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "it1": {"blocks": "self", "heads": 1},
    "it4": {"blocks": "self", "heads": 4},
    "ct1": {"blocks": "cross", "heads": 1},
    "ct4": {"blocks": "cross", "heads": 4},
    "full": {"blocks": "both", "heads": 4},
    "softhard": {"softhard": True},
}
FUSIONS: dict[str, Fusion] = {
    "avt_ca": Fusion(
        module=AvtCa,
        needs=("audio", "video"),
        reads=("audio", "video"),
        least=2,
        most=2,
        choices={"blocks": _BLOCKS},
        attention_maps=(("audio", "audio", "video"), ("video", "video", "audio")),
        recipe={"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 1e-3, "batch_size": 8, "epochs": 128},
        paper="Venkatraman et al. 2024, Audio-Video Transformer Fusion with Cross Attention",
    ),
}

"""AVT-CA as its paper has it: transformer blocks on sound and pictures, then cross-attention in both directions.

Venkatraman et al. 2024, "Multimodal Emotion Recognition using Audio-Video Transformer Fusion with Cross Attention".
What its authors released differs from it and is `avtca_released.AvtCaReleased`. Shapes: b clip, t video step, s audio
step, n frame of any clip, h row or head, w column or width of what enters, d width, c class.

What the paper leaves open is settled so:
- Convolutions over time see zeros beyond the ends of a clip, and pooling keeps a last step that has no partner, so a
  clip of one step passes. Padding anywhere is taken out before them.
- Batch norms are `StepNorm`s, by running statistics unless the caller makes "batch_stats" mutable; those of pictures
  count the places of real frames. So no clip's answer depends on its batch or on padding.
- Channel attention has a ReLU between its layers; the spatial weights are multiplied by the number of places, for else
  they would fade features by it; their convolution spans 3 x 3 places, the one kernel that the paper states.
- Local features are those of the pooled map, as in the released code. Each quarter's stand where the quarter was: the
  paper's psi.
- Inverted residual blocks are those of MobileNetV2. Both halve the map, so neither has a residual.
- In attention only the scores' scale, no bias and no positions: the equations have none.

A missing modality is an all-False mask. The other one then gets nothing from cross-attention, and the missing one's
vector is zero; without either the answer is the head's bias.
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
_REDUCTION = 16  # of the channels, between the layers of channel attention
_EXPANSION = 4  # of the width, inside inverted residual blocks and feed-forward networks


class PooledBlock(nn.Module):
    """Convolution over 3 steps, norm, ReLU, maximum of every 2 steps (Eqs. 1a–1d)."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> Stream:
        """Maps x (b, s, d), real steps first, to (b, ceil(s / 2), width), and its mask alike."""
        x = TimeConvolution(self.width, 3, dtype=self.dtype, name="conv")(jnp.where(mask[..., None], x, 0))
        x = nn.relu(StepNorm(dtype=self.dtype, name="norm")(x, mask))
        # `jnp.maximum` for the reason given in `masked_max`. After a ReLU zeros never win against a real step.
        pairs = _pairs(jnp.where(mask[..., None], x, 0))
        return jnp.maximum(pairs[:, :, 0], pairs[:, :, 1]), _pairs(mask).any(2)


def _pairs(x: jax.Array) -> jax.Array:
    """(b, s, ...) → (b, ceil(s / 2), 2, ...), zeros or False in place of a missing partner."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, 2, *x.shape[2:])


# ---- Pictures -----------------------------------------------------------------------------------------------------


class Refinement(nn.Module):
    """Channel attention times spatial attention times the map, plus local features (section III-A2)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (n, h, w, d) to the same shape."""
        channel = nn.sigmoid(self._channels(jnp.mean(x, (1, 2))))[:, None, None]
        return channel * self._places(x).astype(self.dtype) * x + self._local(x)

    def _channels(self, x: jax.Array) -> jax.Array:
        project = functools.partial(Project, dtype=self.dtype)
        narrow = max(x.shape[-1] // _REDUCTION, 1)
        return project(x.shape[-1:], name="channel_out")(nn.relu(project((narrow,), name="channel")(x)))

    def _places(self, x: jax.Array) -> jax.Array:
        """The weight of each place, 1 on average: (n, h, w, 1)."""
        # Without a bias, which a softmax would not see.
        scores = FrameConvolution(1, bias=False, dtype=self.dtype, name="place")(x)
        return nn.softmax(scores.astype(jnp.float32), (1, 2)) * (x.shape[1] * x.shape[2])

    def _local(self, x: jax.Array) -> jax.Array:
        """One convolution for each of the four quarters by itself; of odd sides the first half is the larger."""
        n, h, w, d = x.shape
        # Zeros behind the smaller half are what the convolution reads beyond its edge anyway.
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        half = (x.shape[1] // 2, x.shape[2] // 2)
        quarters = x.reshape(n, 2, half[0], 2, half[1], d).swapaxes(2, 3).reshape(4 * n, *half, d)
        quarters = FrameConvolution(d, dtype=self.dtype, name="local")(quarters)
        return quarters.reshape(n, 2, 2, *half, d).swapaxes(2, 3).reshape(x.shape)[:, :h, :w]


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution over 3 x 3 places with stride 2, linear projection (MobileNetV2, table 1)."""

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
        places = x.reshape(x.shape[0], -1, x.shape[-1])
        real = jnp.broadcast_to(mask[:, None], places.shape[:2])
        return StepNorm(dtype=self.dtype, name=name)(places, real).reshape(x.shape)


class FrameBranch(nn.Module):
    """The video branch on pictures: each frame by itself becomes a vector (section III-A2)."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pictures: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps pictures (n, h, w, 3), RGB from 0 to 255, uint8 or float, under mask (n,) to (n, width).

        Raises:
          AvjaxError: height or width is odd.
        """
        if pictures.shape[1] % 2 or pictures.shape[2] % 2:
            raise AvjaxError(
                f"frames of {pictures.shape[1]} x {pictures.shape[2]} pixels cannot be halved by AVT-CA: "
                "resize them to even sides, such as 112 x 112"
            )
        x = (jnp.where(mask[:, None, None, None], pictures, 0) / 255).astype(self.dtype)
        x = nn.relu(FrameConvolution(self.width // 2, stride=2, dtype=self.dtype, name="stem")(x))
        x = halved(x)
        x = Refinement(self.dtype, name="refinement")(x)
        for i in range(2):
            x = InvertedResidual(self.width, self.dtype, name=f"inverted_{i}")(x, mask)
        return jnp.mean(x, (1, 2))


# ---- Fusion -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention without any bias, of one sequence to the real steps of another (Eqs. 2, 3a, 3b)."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x (b, q, d) asks source (b, k, d) under mask (b, k): the answer (b, q, d) and its weights (b, h, q, k).

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
    """Self-attention, one norm, feed-forward network, both with residuals (Eqs. 2–6)."""

    heads: int
    dropout: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        """Maps x (b, n, d) under mask (b, n) to (b, n, d)."""
        width = x.shape[-1]
        project = functools.partial(Project, dtype=self.dtype)
        attended, _ = Attention(self.heads, self.dtype, name="attention")(x, x, mask)
        # Flax computes statistics and affine in float32 here, whatever `dtype` it returns.
        x = nn.LayerNorm(1e-5, self.dtype, use_fast_variance=False, name="norm")(attended + x)
        hidden = nn.gelu(project((_EXPANSION * width,), name="up")(x), approximate=False)
        return x + project((width,), name="down")(Dropout(self.dropout, train)(hidden))


class AvtCa(FusionModule):
    """AVT-CA of the paper (Algorithm 1).

    Attributes:
      streams: audio and video, in any order.
      frames: whether video is pictures (b, t, h, w, 3) from 0 to 255; else it is a feature sequence (b, t, w), which a
        linear layer brings to `width` where the frame network would end.
      width: d, even; the first convolution of either branch has half of it.
      heads: of each attention; must divide width.
      dropout: rate inside the feed-forward networks (Eq. 5b), training only.
      blocks: "both", or "self" or "cross" alone (rows IT and CT of Table V).
      softhard: whether training has the modality dropout of `mmer.softhard` (rng "dropout").
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

        Attention, none with self blocks alone, holds the weights by which "audio" (b, ceil(s / 4), t) asks video, and
        "video" (b, t, ceil(s / 4)) audio, mean over heads, zeros where either is masked; there an audio step is four
        real ones.

        Raises:
          AvjaxError: video is not what `frames` says.
        """
        if train and self.softhard:
            batch = softhard(batch, ("audio", "video"), self.make_rng("dropout"))
        audio, video, weights = self._audio(batch), self._video(batch), {}
        if self.blocks != "cross":
            audio, video = self._itself("audio", audio, train), self._itself("video", video, train)
        if self.blocks != "self":
            audio, video, weights = self._meet(audio, video)
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

    def _itself(self, name: str, stream: Stream, train: bool) -> Stream:
        x, mask = stream
        block = TransformerBlock(self.heads, self.dropout, self.dtype, name=f"{name}_block")
        return block(x, mask, train), mask

    def _meet(self, audio: Stream, video: Stream) -> tuple[Stream, Stream, dict[str, jax.Array]]:
        """Cross-attention in both directions, added to what asked (section III-C; Algorithm 1, lines 17–20)."""
        attention = lambda name: Attention(self.heads, self.dtype, name=f"{name}_asks")  # noqa: E731
        a, a_weights = attention("audio")(audio[0], *video)
        v, v_weights = attention("video")(video[0], *audio)
        weights = {"audio": _pictured(a_weights, audio[1]), "video": _pictured(v_weights, video[1])}
        return (a + audio[0], audio[1]), (v + video[0], video[1]), weights


def _pictured(weights: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over heads of weights (b, h, q, k), zeros for what asks without being real: (b, q, k)."""
    return jnp.where(mask[..., None], jnp.mean(weights, 1), 0)


# The rows of Table V, and the whole with modality dropout: name → settings.
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

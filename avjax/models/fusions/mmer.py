"""MMER's three fusions: audio and video are fused between or after two convolutional stages.

Chumachenko, Iosifidis, Gabbouj 2022, "Self-attention fusion for audiovisual emotion recognition with incomplete data".
Shapes: b clip, s step of the first stream (audio), t of the second (video), d width, h head, c class.

The first stream goes through unpadded convolutions, which need `LEAST` steps: shorter clips are extended by zeros. The
second goes through padded ones; with `frames` it is frames, which `EfficientFace` maps to vectors first. All padding is
removed before the convolutions, so it never counts.

A missing stream is an all-False mask. The fusion then leaves the other one unchanged, and the missing one's half of the
concatenated vector is zero; without either the prediction is the classifier's bias. Batch norms are `StepNorm`s: they
use running statistics unless the caller makes "batch_stats" mutable; those of the frame network are fixed.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import Project, StepNorm, TimeConvolution, attend, masked_mean, masked_softmax, pack
from avjax.models.base import Batch, Fusion, Output, Stream
from avjax.models.efficientface import EfficientFace
from avjax.models.fusions.base import FusionModule

_SHRINK = 3  # steps lost by an unpadded convolution over 3 and a maximum over 2
_FIRST = ((64, 128), (256, 128))  # widths of the two blocks of each stage
_SECOND = ((64, 64), (128, 128))
LEAST = 1 + _SHRINK * sum(len(stage) for stage in _FIRST)


class UnpaddedBlock(nn.Module):
    """Convolution over 3 steps without padding, norm, ReLU, maximum over 2 steps: 3 steps fewer."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> Stream:
        """Maps x (b, s, w) under mask (b, s) to (b, s − 3, width) and its mask."""
        x = TimeConvolution(self.width, 3, "VALID", dtype=self.dtype, name="conv")(x)
        x = nn.relu(StepNorm(dtype=self.dtype, name="norm")(x, mask[:, 2:]))
        return jnp.maximum(x[:, :-1], x[:, 1:]), mask[:, _SHRINK:]


class PaddedBlock(nn.Module):
    """Convolution over 3 steps with zeros around the clip, norm, ReLU."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> Stream:
        """Maps x (b, t, w) under mask (b, t) to (b, t, width) and its mask."""
        x = TimeConvolution(self.width, 3, dtype=self.dtype, name="conv")(jnp.where(mask[..., None], x, 0))
        return nn.relu(StepNorm(dtype=self.dtype, name="norm")(x, mask)), mask


class CrossAttentionBlock(nn.Module):
    """Pre-norm cross-attention without a residual, then a perceptron with one; as wide as the queries."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, other: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps x (b, q, d) and other (b, k, e) under mask (b, k) to (b, q, d) and weights (b, h, q, k)."""
        norm = functools.partial(nn.LayerNorm, 1e-5, self.dtype, use_fast_variance=False)
        project = functools.partial(Project, dtype=self.dtype)
        width = x.shape[-1]
        split = (self.heads, width // self.heads)
        other = norm(name="key_norm")(other)
        query = project(split, bias=False, name="query")(norm(name="query_norm")(x))
        key, value = (project(split, bias=False, name=name)(other) for name in ("key", "value"))
        context, weights = attend(query, key, value, mask)
        x = project((width,), inputs=2, name="out")(context)
        hidden = project((2 * width,), name="up")(norm(name="norm")(x))
        return x + project((width,), name="down")(nn.gelu(hidden, approximate=False)), weights


class CrossGate(nn.Module):
    """Gates each step of `other` by the attention weights that it gets from `x`, summed over the steps of `x`."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, x_mask: jax.Array, other: jax.Array, mask: jax.Array) -> Stream:
        """Maps x (b, q, d) and other (b, k, e), with masks, to the gate (b, k) and weights (b, h, q, k)."""
        split = (self.heads, x.shape[-1] // self.heads)
        query, key = (
            Project(split, dtype=self.dtype, bias=False, name=name)(y) for name, y in (("query", x), ("key", other))
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * split[1] ** -0.5
        weights = masked_softmax(scores, mask[:, None, None])
        return jnp.sum(jnp.mean(weights, 1), 1, where=x_mask[..., None]), weights


def softhard(batch: Batch, streams: tuple[str, str], key: jax.Array) -> Batch:
    """Applies the modality dropout "softhard" of Chumachenko et al. 2022 to a batch.

    With equal probability, each clip stays unchanged, its streams are scaled by u and 1 − u, or it loses the first or
    the second stream.
    """
    count = batch[f"{streams[0]}_mask"].shape[0]
    part, kind = jax.random.split(key)
    u = jax.random.uniform(part, (count,), minval=0.01, maxval=0.99)
    one, none = jnp.ones(count), jnp.zeros(count)
    choices = jnp.stack([jnp.stack(c) for c in ((one, one), (u, 1 - u), (none, one), (one, none))])  # 4 2 b
    scales = choices[jax.random.randint(kind, (count,), 0, 4), :, jnp.arange(count)]  # b 2
    dropped = dict(batch)
    for s, scale in zip(streams, scales.T, strict=True):
        dropped[s] = batch[s] * scale.reshape(-1, *[1] * (batch[s].ndim - 1))
        dropped[f"{s}_mask"] = batch[f"{s}_mask"] & (scale[:, None] > 0)
    return dropped


class TwoStages(FusionModule):
    """The common part of the fusions, which define what happens between and after the stages.

    Attributes:
      streams: first and second stream, in the roles of audio and video in the paper.
      heads: number of attention heads; must divide 64 and 128.
      frames: whether the second stream is frames (b, t, height, width, 3), uint8, read by a frame network in the
        model; else it is features (b, t, w).
      softhard: whether training uses the paper's modality dropout (rng "dropout").
    """

    streams: tuple[str, ...] = ("audio", "video")
    heads: int = 1
    frames: bool = False
    softhard: bool = True

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream>` and `<stream>_mask (b, n)`; head "fusion"."""
        if train and self.softhard:
            batch = softhard(batch, self.streams, self.make_rng("dropout"))
        first, second = self._inputs(batch)
        first, second = self._convolve(0, _extended(*first), second)
        first, second, attention = self.between(first, second)
        first, second = self._convolve(1, first, second)
        first, second, late = self.after(first, second)
        joined = jnp.concatenate([masked_mean(x.astype(jnp.float32), mask) for x, mask in (first, second)], -1)
        return self.predict(joined, {}, attention | late)

    def between(self, first: Stream, second: Stream) -> tuple[Stream, Stream, dict[str, jax.Array]]:
        """Fuses the streams after the first stage; returns them and attention weights."""
        return first, second, {}

    def after(self, first: Stream, second: Stream) -> tuple[Stream, Stream, dict[str, jax.Array]]:
        """Fuses the streams after the second stage; returns them and attention weights."""
        return first, second, {}

    def _inputs(self, batch: Batch) -> list[Stream]:
        inputs = []
        for i, s in enumerate(self.streams):
            x, mask = batch[s], batch[f"{s}_mask"]
            if self.frames and i == 1:
                vectors = EfficientFace(dtype=self.dtype, name="frame_network")(x.reshape(-1, *x.shape[2:]) / 255)
                x = vectors.reshape(*mask.shape, -1)
            inputs.append(pack(x.astype(self.dtype), mask))
        return inputs

    def _convolve(self, stage: int, first: Stream, second: Stream) -> tuple[Stream, Stream]:
        for i, width in enumerate(_FIRST[stage]):
            first = UnpaddedBlock(width, self.dtype, name=f"{self.streams[0]}_{stage}_{i}")(*first)
        for i, width in enumerate(_SECOND[stage]):
            second = PaddedBlock(width, self.dtype, name=f"{self.streams[1]}_{stage}_{i}")(*second)
        return first, second


def _extended(x: jax.Array, mask: jax.Array) -> Stream:
    """Extends the clips of a stream by zeros to at least `LEAST` real steps, except those without any."""
    lacking = max(LEAST - x.shape[1], 0)
    x, mask = jnp.pad(x, ((0, 0), (0, lacking), (0, 0))), jnp.pad(mask, ((0, 0), (0, lacking)))
    some = jnp.any(mask, -1, keepdims=True)
    return x, mask | (some & (jnp.arange(x.shape[1]) < LEAST)[None])


def _where_any(mask: jax.Array, x: jax.Array, otherwise: jax.Array | float) -> jax.Array:
    """Selects `x` for clips with any step of the other stream, by its `mask` (b, k), else `otherwise`."""
    return jnp.where(jnp.any(mask, -1).reshape(-1, *[1] * (x.ndim - 1)), x, otherwise)


class MmerIa(TwoStages):
    """Intermediate attention: each stream's steps are multiplied by the attention that the other pays (section III-C).

    The values and output map of the released module are unused and left out.
    """

    def between(self, first: Stream, second: Stream) -> tuple[Stream, Stream, dict[str, jax.Array]]:
        """Multiplies each stream by the other's gate."""
        (a, a_mask), (v, v_mask) = first, second
        gate = lambda name: CrossGate(self.heads, self.dtype, name=name)  # noqa: E731
        v_gate, a_weights = gate("first_asks")(a, a_mask, v, v_mask)
        a_gate, v_weights = gate("second_asks")(v, v_mask, a, a_mask)
        a = a * _where_any(v_mask, a_gate, 1.0)[..., None]
        v = v * _where_any(a_mask, v_gate, 1.0)[..., None]
        return (a, a_mask), (v, v_mask), dict(zip(self.streams, (a_weights, v_weights), strict=True))


class MmerIt(TwoStages):
    """Intermediate transformer: cross-attention is added to each stream (section III-B)."""

    def between(self, first: Stream, second: Stream) -> tuple[Stream, Stream, dict[str, jax.Array]]:
        """Adds cross-attention to each stream."""
        a, v, weights = _cross_attend(self, first, second)
        return (
            (first[0] + _where_any(second[1], a, 0), first[1]),
            (second[0] + _where_any(first[1], v, 0), second[1]),
            weights,
        )


class MmerLt(TwoStages):
    """Late transformer: cross-attention replaces each stream (section III-A)."""

    def after(self, first: Stream, second: Stream) -> tuple[Stream, Stream, dict[str, jax.Array]]:
        """Replaces each stream by its cross-attention."""
        a, v, weights = _cross_attend(self, first, second)
        return (_where_any(second[1], a, first[0]), first[1]), (_where_any(first[1], v, second[0]), second[1]), weights


def _cross_attend(
    module: TwoStages, first: Stream, second: Stream
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Computes the cross-attention of each stream to the other, and weights by the name of the querying stream."""
    block = lambda name: CrossAttentionBlock(module.heads, module.dtype, name=name)  # noqa: E731
    a, a_weights = block("first_asks")(first[0], *second)
    v, v_weights = block("second_asks")(second[0], *first)
    return a, v, dict(zip(module.streams, (a_weights, v_weights), strict=True))


def _mmer(module: type[TwoStages]) -> Fusion:
    return Fusion(
        module=module,
        least=2,
        most=2,
        # The authors use 0.04 with dampening 0.9, which equals a tenth of it without dampening.
        recipe={"optimizer": "sgd", "learning_rate": 0.004, "batch_size": 8, "weight_decay": 1e-3, "epochs": 100},
        paper="Chumachenko, Iosifidis, Gabbouj 2022, ICPR",
    )


FUSIONS: dict[str, Fusion] = {
    "mmer_ia": _mmer(MmerIa),
    "mmer_it": _mmer(MmerIt),
    "mmer_lt": _mmer(MmerLt),
}

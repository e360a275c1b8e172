"""MMER's three fusions: audio and video meet between, or behind, two convolutional stages.

Chumachenko, Iosifidis, Gabbouj 2022, "Self-attention fusion for audiovisual emotion recognition with incomplete data".
Shapes: b clip, s step of the first stream (audio), t of the second (video), d width, h head, c class.

The first stream runs through unpadded convolutions, which need `LEAST` steps: a shorter clip is followed by zeros. The
second runs through padded ones; with `frames` it is pictures, which `EfficientFace` turns into vectors first. Padding
anywhere is taken out before the convolutions, so it never counts.

A missing stream is an all-False mask. The other one then passes the place where they meet unchanged, and the missing
one's half of the joined vector is zero; without either the answer is the classifier's bias. Batch norms are
`StepNorm`s: by running statistics, unless the caller makes "batch_stats" mutable; those of the frame network stay.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import Project, StepNorm, TimeConvolution, attend, masked_mean, masked_softmax, pack
from avjax.models.base import Batch, Fusion, Output, Stream
from avjax.models.efficientface import EfficientFace
from avjax.models.fusions.base import FusionModule

_SHRINK = 3  # steps that an unpadded convolution of 3 and a maximum over 2 take away
_FIRST = ((64, 128), (256, 128))  # widths of the two blocks of each stage
_SECOND = ((64, 64), (128, 128))
LEAST = 1 + _SHRINK * sum(len(stage) for stage in _FIRST)


class UnpaddedBlock(nn.Module):
    """Convolution over 3 steps without padding, norm, ReLU, maximum over 2 steps: 3 steps fewer."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> Stream:
        x = TimeConvolution(self.width, 3, "VALID", dtype=self.dtype, name="conv")(x)
        x = nn.relu(StepNorm(dtype=self.dtype, name="norm")(x, mask[:, 2:]))
        return jnp.maximum(x[:, :-1], x[:, 1:]), mask[:, _SHRINK:]


class PaddedBlock(nn.Module):
    """Convolution over 3 steps with zeros around the clip, norm, ReLU."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> Stream:
        x = TimeConvolution(self.width, 3, dtype=self.dtype, name="conv")(jnp.where(mask[..., None], x, 0))
        return nn.relu(StepNorm(dtype=self.dtype, name="norm")(x, mask)), mask


class AskingBlock(nn.Module):
    """Pre-norm cross-attention without a residual, then a perceptron with one; as wide as what asks."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, other: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x (b, q, d) asks other (b, k, e) under mask (b, k): the answer (b, q, d) and its weights (b, h, q, k)."""
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
    """How much each step of `other` is asked for by the steps of `x`: attention weights summed over those steps."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, asks: jax.Array, other: jax.Array, mask: jax.Array) -> Stream:
        """x (b, q, d) under asks (b, q), other (b, k, e) under mask (b, k): gate (b, k), weights (b, h, q, k)."""
        split = (self.heads, x.shape[-1] // self.heads)
        query, key = (
            Project(split, dtype=self.dtype, bias=False, name=name)(y) for name, y in (("query", x), ("key", other))
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * split[1] ** -0.5
        weights = masked_softmax(scores, mask[:, None, None])
        return jnp.sum(jnp.mean(weights, 1), 1, where=asks[..., None]), weights


def softhard(batch: Batch, streams: tuple[str, str], key: jax.Array) -> Batch:
    """A batch after the modality dropout "softhard" of Chumachenko et al. 2022.

    Each clip stays whole, or its two streams are scaled by u and 1 − u, or it loses the one, or the other, by the same
    chance.
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
    """What the four have in common; each says what happens between and behind the stages.

    Attributes:
      streams: first and second stream, by the roles that audio and video have in the paper.
      heads: of each attention; must divide 64 and 128.
      frames: the second stream is pictures (b, t, height, width, 3), uint8, and their network is part of this one;
        else features (b, t, w).
      softhard: whether training has the paper's modality dropout (rng "dropout").
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
        first, second, met = self.between(first, second)
        first, second = self._convolve(1, first, second)
        first, second, behind = self.behind(first, second)
        joined = jnp.concatenate([masked_mean(x.astype(jnp.float32), mask) for x, mask in (first, second)], -1)
        return self.predict(joined, {}, met | behind)

    def between(self, first: Stream, second: Stream) -> tuple[Stream, Stream, dict[str, jax.Array]]:
        """What the streams do to each other after the first stage: the streams again, and attention weights."""
        return first, second, {}

    def behind(self, first: Stream, second: Stream) -> tuple[Stream, Stream, dict[str, jax.Array]]:
        """The same after the second stage."""
        return first, second, {}

    def _inputs(self, batch: Batch) -> list[Stream]:
        found = []
        for i, s in enumerate(self.streams):
            x, mask = batch[s], batch[f"{s}_mask"]
            if self.frames and i == 1:
                vectors = EfficientFace(dtype=self.dtype, name="frame_network")(x.reshape(-1, *x.shape[2:]) / 255)
                x = vectors.reshape(*mask.shape, -1)
            found.append(pack(x.astype(self.dtype), mask))
        return found

    def _convolve(self, stage: int, first: Stream, second: Stream) -> tuple[Stream, Stream]:
        for i, width in enumerate(_FIRST[stage]):
            first = UnpaddedBlock(width, self.dtype, name=f"{self.streams[0]}_{stage}_{i}")(*first)
        for i, width in enumerate(_SECOND[stage]):
            second = PaddedBlock(width, self.dtype, name=f"{self.streams[1]}_{stage}_{i}")(*second)
        return first, second


def _extended(x: jax.Array, mask: jax.Array) -> Stream:
    """A stream whose clips have at least `LEAST` steps, zeros after the real ones; none where there were none."""
    lacking = max(LEAST - x.shape[1], 0)
    x, mask = jnp.pad(x, ((0, 0), (0, lacking), (0, 0))), jnp.pad(mask, ((0, 0), (0, lacking)))
    some = jnp.any(mask, -1, keepdims=True)
    return x, mask | (some & (jnp.arange(x.shape[1]) < LEAST)[None])


def _where_any(mask: jax.Array, x: jax.Array, otherwise: jax.Array | float) -> jax.Array:
    """`x` for the clips that have a step of the other stream, whose `mask` (b, k) is; else `otherwise`."""
    return jnp.where(jnp.any(mask, -1).reshape(-1, *[1] * (x.ndim - 1)), x, otherwise)


class MmerIa(TwoStages):
    """Intermediate attention: each stream's steps are multiplied by how much the other asks for them (section III-C).

    The released module also has values and an output map that nothing reads; they are left out.
    """

    def between(self, first: Stream, second: Stream) -> tuple[Stream, Stream, dict[str, jax.Array]]:
        (a, a_mask), (v, v_mask) = first, second
        gate = lambda name: CrossGate(self.heads, self.dtype, name=name)  # noqa: E731
        v_gate, a_weights = gate("first_asks")(a, a_mask, v, v_mask)
        a_gate, v_weights = gate("second_asks")(v, v_mask, a, a_mask)
        a = a * _where_any(v_mask, a_gate, 1.0)[..., None]
        v = v * _where_any(a_mask, v_gate, 1.0)[..., None]
        return (a, a_mask), (v, v_mask), dict(zip(self.streams, (a_weights, v_weights), strict=True))


class MmerIt(TwoStages):
    """Intermediate transformer: what each stream gets by asking the other is added to it (section III-B)."""

    def between(self, first: Stream, second: Stream) -> tuple[Stream, Stream, dict[str, jax.Array]]:
        a, v, weights = _meet(self, first, second)
        return (
            (first[0] + _where_any(second[1], a, 0), first[1]),
            (second[0] + _where_any(first[1], v, 0), second[1]),
            weights,
        )


class MmerLt(TwoStages):
    """Late transformer: what each stream gets by asking the other takes its place (section III-A)."""

    def behind(self, first: Stream, second: Stream) -> tuple[Stream, Stream, dict[str, jax.Array]]:
        a, v, weights = _meet(self, first, second)
        return (_where_any(second[1], a, first[0]), first[1]), (_where_any(first[1], v, second[0]), second[1]), weights


def _meet(module: TwoStages, first: Stream, second: Stream) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """What each stream gets by asking the other, and its weights by the name of the stream that asks."""
    block = lambda name: AskingBlock(module.heads, module.dtype, name=name)  # noqa: E731
    a, a_weights = block("first_asks")(first[0], *second)
    v, v_weights = block("second_asks")(second[0], *first)
    return a, v, dict(zip(module.streams, (a_weights, v_weights), strict=True))


def _mmer(module: type[TwoStages]) -> Fusion:
    return Fusion(
        module=module,
        least=2,
        most=2,
        # Theirs is 0.04 with a momentum damped by 0.9, which is a tenth of it on ours.
        recipe={"optimizer": "sgd", "learning_rate": 0.004, "batch_size": 8, "weight_decay": 1e-3, "epochs": 100},
        paper="Chumachenko, Iosifidis, Gabbouj 2022, ICPR",
    )


FUSIONS: dict[str, Fusion] = {
    "mmer_ia": _mmer(MmerIa),
    "mmer_it": _mmer(MmerIt),
    "mmer_lt": _mmer(MmerLt),
}

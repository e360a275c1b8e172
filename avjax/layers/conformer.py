"""Conformer (Gulati et al. 2020, "Conformer: Convolution-augmented Transformer for Speech Recognition").

Shapes: b clip, n step, d width, h head, r offset between two steps.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from avjax.layers.dropout import Dropout
from avjax.layers.linear import Project, TimeConvolution
from avjax.layers.masking import masked_softmax


def pack(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves the real steps of a stream to its front, keeping their order, so that positions count only real steps.

    Args:
      x: (b, n, d).
      mask: (b, n).

    Returns:
      x with zeros after the real steps, and its mask, which is True up to the number of real steps.
    """
    order = jnp.argsort(~mask, axis=-1, stable=True)
    front = jnp.take_along_axis(mask, order, -1)
    moved = jnp.take_along_axis(jnp.where(mask[..., None], x, 0), order[..., None], 1)
    return moved, front


def unpack(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Moves the steps that `pack` moved to the front back to their positions.

    Args:
      x: (b, n, d), real steps first.
      mask: (b, n), the one passed to `pack`.

    Returns:
      x with zeros under False.
    """
    order = jnp.maximum(jnp.cumsum(mask, -1) - 1, 0)
    return jnp.where(mask[..., None], jnp.take_along_axis(x, order[..., None], 1), 0)


class StepNorm(nn.BatchNorm):
    """Batch norm over real steps whose running statistics are state, not parameters (collection "batch_stats").

    It normalises by the running statistics, in training too, so that a clip's prediction never depends on its batch.
    Only if "batch_stats" is mutable does it normalise by the batch, and updates the statistics.
    """

    momentum: float = 0.9

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x (b, n, d) under mask (b, n) to (b, n, d)."""
        moves = self.is_mutable_collection("batch_stats") and not self.is_initializing()
        # A batch without any real step has no statistics: its zeros are counted instead.
        counted = mask | ~jnp.any(mask)
        return super().__call__(x, use_running_average=not moves, mask=counted[..., None])


def interleaved_sinusoids(positions: np.ndarray | jax.Array, width: int, xp: Any = np) -> np.ndarray | jax.Array:
    """Embeds positions by alternating sine and cosine (Vaswani et al. 2017, section 3.5): (r,) → (r, width) float32."""
    angle = positions[:, None] * (1e4 ** (-(np.arange(width) // 2 * 2) / width))[None]
    return xp.where((np.arange(width) % 2 == 0)[None], xp.sin(angle), xp.cos(angle)).astype(np.float32)


def _shift(scores: jax.Array) -> jax.Array:
    """Shifts row i of (b, h, n, r) left by n − 1 − i, cut to n columns: Transformer-XL (Dai et al. 2019), appendix B.

    With r = n the columns do not suffice, and the missing ones wrap around from the next row.
    """
    b, h, n, r = scores.shape
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(b, h, r + 1, n)
    return padded[:, :, 1:].reshape(b, h, n, r)[..., :n]


class RelativeAttention(nn.Module):
    """Self-attention with the relative positions of Transformer-XL (Dai et al. 2019, section 3.3).

    Attributes:
      heads: must divide the width.
      legacy_relative: n positions instead of 2n − 1 offsets, a shift that wraps around, and scores divided by the
        square root of the full width, as in a popular implementation. Its output depends on padding.
    """

    heads: int
    legacy_relative: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x (b, n, d) under mask (b, n) to (b, n, d)."""
        n, width = x.shape[1:]
        split = (self.heads, width // self.heads)
        query, key, value = (Project(split, dtype=self.dtype, name=name)(x) for name in ("query", "key", "value"))
        xp = np if isinstance(n, int) else jnp  # under `jax.export` the number of steps may be symbolic
        offsets = xp.arange(n) if self.legacy_relative else xp.arange(n - 1, -n, -1)
        embedded = Project(split, dtype=self.dtype, bias=False, name="position")(
            interleaved_sinusoids(offsets, width, xp)
        )  # r h d
        content = jnp.einsum("bqhd,bkhd->bhqk", query + self._bias("content_bias", split), key)
        position = _shift(jnp.einsum("bqhd,rhd->bhqr", query + self._bias("position_bias", split), embedded))
        scale = (width if self.legacy_relative else split[1]) ** -0.5
        weights = masked_softmax((content + position) * scale, mask[:, None, None])
        context = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return Project((width,), inputs=2, dtype=self.dtype, name="out")(context)

    def _bias(self, name: str, shape: tuple[int, int]) -> jax.Array:
        return self.param(name, nn.initializers.xavier_uniform(), shape).astype(self.dtype)[None, None]


class Convolution(nn.Module):
    """The convolution module (Gulati et al. 2020, section 2.2); padding is zero before the depthwise convolution."""

    kernel: int
    dropout: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """Maps x (b, n, d) under mask (b, n) to (b, n, d)."""
        width = x.shape[-1]
        x = nn.glu(Project((2 * width,), dtype=self.dtype, name="gate")(_norm("norm", self.dtype)(x)))
        x = jnp.where(mask[..., None], x, 0)
        depthwise = TimeConvolution(
            width, self.kernel, channelwise=True, bias=False, dtype=self.dtype, name="depthwise"
        )
        x = nn.swish(StepNorm(dtype=self.dtype, name="depthwise_norm")(depthwise(x), mask))
        x = Project((width,), dtype=self.dtype, name="out")(x)
        return Dropout(self.dropout, train)(x)


class FeedForward(nn.Module):
    """The feed-forward module (Gulati et al. 2020, section 2.3), `expansion` times as wide inside."""

    expansion: int
    dropout: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps x (..., d) to the same shape."""
        drop = Dropout(self.dropout, train)
        width = x.shape[-1]
        x = Project((self.expansion * width,), dtype=self.dtype, name="up")(_norm("norm", self.dtype)(x))
        return drop(Project((width,), dtype=self.dtype, name="down")(drop(nn.swish(x))))


class ConformerBlock(nn.Module):
    """One Conformer block (Gulati et al. 2020, Eq. 1): half feed-forward, attention, convolution, half feed-forward.

    Attributes:
      heads: number of attention heads; must divide the width.
      kernel: odd kernel size of the depthwise convolution, in steps.
      expansion: inner width of the feed-forward modules, as a multiple of the width.
      dropout: rate after each module and inside the feed-forward modules, training only.
      legacy_relative: see `RelativeAttention`.
    """

    heads: int = 8
    kernel: int = 31
    expansion: int = 4
    dropout: float = 0.1
    legacy_relative: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        """Maps x (b, n, d) under mask (b, n) to (b, n, d), zeros under False. Real steps come first: see `pack`."""
        drop = Dropout(self.dropout, train)
        feed = lambda name: FeedForward(self.expansion, self.dropout, self.dtype, name=name)  # noqa: E731
        attention = RelativeAttention(self.heads, self.legacy_relative, self.dtype, name="attention")
        x = jnp.where(mask[..., None], x, 0).astype(self.dtype)
        x += 0.5 * feed("first")(x, train)
        x += drop(attention(_norm("attention_norm", self.dtype)(x), mask))
        x += Convolution(self.kernel, self.dropout, self.dtype, name="convolution")(x, mask, train)
        x += 0.5 * feed("second")(x, train)
        return jnp.where(mask[..., None], _norm("norm", self.dtype)(x), 0)


def _norm(name: str, dtype: jnp.dtype) -> nn.LayerNorm:
    """Returns a layer norm; Flax computes its statistics and affine map in float32, whatever its `dtype`."""
    return nn.LayerNorm(1e-5, dtype, use_fast_variance=False, name=name)

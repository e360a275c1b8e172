"""Contrastive losses in float32: one unreduced value per clip, over the set of all clips of a batch.

No matrix of clips by clips is ever held: similarities are computed for a block of clips at a time, and once more in the
backward pass, so that memory grows with the batch and not with its square.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from avjax.errors import AvjaxError

# Rows shorter than this are taken for zeros: the gradient divides by the cube of a length.
_SHORT = 1e-12


def unit(x: jax.Array) -> jax.Array:
    """x / ‖x‖ over the last axis, (..., d) float32; zeros stay zeros, with zero gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, -1, keepdims=True)
    some = square > _SHORT**2
    return jnp.where(some, x * jax.lax.rsqrt(jnp.where(some, square, 1)), 0)


def clip_loss(
    x: jax.Array, y: jax.Array, weight: jax.Array, *, temperature: float | jax.Array = 0.07, block: int = 512
) -> jax.Array:
    """Symmetric contrastive loss of pairs (Radford et al. 2021, "Learning transferable visual models", Fig. 3).

    The mean of −log p(yᵢ | xᵢ), among the y of all clips, and −log p(xᵢ | yᵢ), among their x.

    Args:
      x, y: (b, d), features of two modalities, of length 1.
      weight: (b,), 0 for clips that are in nobody's set and cost 0; what is in their rows is not read.
      temperature: τ > 0, which divides the similarities; a gradient reaches it.
      block: clips whose similarities to all are held at a time; it changes memory, not values.

    Returns:
      (b,) float32.
    """
    real = weight > 0
    x, y = _entered(x, real), _entered(y, real)
    scaled = x / temperature
    pair = jnp.sum(scaled * y, -1)
    among_y = _log_sum_exp(scaled, y, real, False, block)
    among_x = _log_sum_exp(y / temperature, x, real, False, block)
    return jnp.where(real, (among_y + among_x) / 2 - pair, 0)


def supcon(
    x: jax.Array,
    y: jax.Array,
    label: jax.Array,
    weight: jax.Array,
    *,
    temperature: float | jax.Array = 0.07,
    block: int = 512,
) -> jax.Array:
    """Supervised contrastive loss over the features of both modalities (EmoAsst, Eq. 1; Khosla et al. 2020, Eq. 2).

    M holds 2b features. An anchor's positives are all others of its label, its set all others; the mean over positives
    is outside the logarithm. A clip's value is the mean of those of its two anchors.

    Args:
      label: (b,) integers, any.
      x, y, weight, temperature: as of `clip_loss`; block: as there, of features.

    Returns:
      (b,) float32.

    Raises:
      AvjaxError: the labels are no classes.
    """
    if label.ndim != 1 or not jnp.issubdtype(label.dtype, jnp.integer):
        raise AvjaxError(f"SupCon got labels {label.dtype}{label.shape}; give it one class per clip, integers (b,)")
    real = jnp.repeat(weight > 0, 2)
    # A clip's two features next to each other: a batch that is split over devices stays so.
    z = _entered(jnp.stack([x, y], 1).reshape(real.size, -1), real)
    scaled = z / temperature
    total, count = _positives(z, jnp.repeat(label, 2), real)
    mean = jnp.sum(scaled * total, -1) / jnp.maximum(count, 1)
    cost = _log_sum_exp(scaled, z, real, True, block) - mean
    return jnp.mean(jnp.where(real & (count > 0), cost, 0).reshape(-1, 2), -1)


def _entered(x: jax.Array, real: jax.Array) -> jax.Array:
    return jnp.where(real[:, None], x, 0).astype(jnp.float32)


def _positives(z: jax.Array, label: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum (m, d) and the number (m,) of the other features of each one's label."""
    _, place = jnp.unique(label, return_inverse=True, size=label.size)
    add = lambda v: jax.ops.segment_sum(v, place, label.size)[place] - v  # noqa: E731
    return add(z), add(real.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _log_sum_exp(query: jax.Array, key: jax.Array, valid: jax.Array, others: bool, block: int) -> jax.Array:
    """log Σ exp(qᵢ · kⱼ) over the valid keys, with `others` without that of the same index; 0 where there is none.

    Args:
      query, key: (m, d) float32; valid: (m,).
      block: queries at a time: (block, m) similarities are held, in the backward pass too.

    Returns:
      (m,) float32.
    """

    def one(queries: tuple[jax.Array, jax.Array]) -> jax.Array:
        found = jax.nn.logsumexp(_similarities(*queries, key, valid, others), -1)
        return jnp.where(jnp.isfinite(found), found, 0)

    blocks = _blocks(query, block), _blocks(jnp.arange(len(query)), block)
    return _whole(jax.lax.map(one, blocks), len(query))


def _forward(query: jax.Array, key: jax.Array, valid: jax.Array, others: bool, block: int) -> tuple[jax.Array, Any]:
    found = _log_sum_exp(query, key, valid, others, block)
    return found, (query, key, valid, found)


def _backward(others: bool, block: int, kept: Any, slope: jax.Array) -> tuple[Any, ...]:
    query, key, valid, found = kept

    def one(key_slope: jax.Array, blocked: Any) -> tuple[jax.Array, jax.Array]:
        q, index, top, g = blocked
        share = jnp.exp(_similarities(q, index, key, valid, others) - top[:, None]) * g[:, None]
        return key_slope + _product(share.T, q), _product(share, key)

    rows = (query, jnp.arange(len(query)), found, slope)
    key_slope, query_slope = jax.lax.scan(one, jnp.zeros_like(key), tuple(_blocks(v, block) for v in rows))
    return _whole(query_slope, len(query)), key_slope, None


_log_sum_exp.defvjp(_forward, _backward)


def _similarities(query: jax.Array, index: jax.Array, key: jax.Array, valid: jax.Array, others: bool) -> jax.Array:
    """Those of a block of queries (q, d) to all keys, (q, m); −inf to the keys that are not in a query's set."""
    among = valid[None]
    if others:
        among = among & (index[:, None] != jnp.arange(len(key))[None])
    return jnp.where(among, _product(query, key.T), -jnp.inf)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # At a temperature of 0.07 the rounding of tensor cores would move similarities by a hundredth.
    return jnp.matmul(a, b, precision="highest")


def _blocks(v: jax.Array, block: int) -> jax.Array:
    """(m, …) as (blocks, block, …), filled up with zeros; `_whole` undoes it.

    Every block takes rows from everywhere, so that of a batch split over devices each has its part of every block.
    """
    size = min(block, len(v))
    count = -(-len(v) // size)
    v = jnp.pad(v, [(0, count * size - len(v))] + [(0, 0)] * (v.ndim - 1))
    return jnp.moveaxis(v.reshape(size, count, *v.shape[1:]), 1, 0)


def _whole(blocks: jax.Array, length: int) -> jax.Array:
    return jnp.moveaxis(blocks, 0, 1).reshape(-1, *blocks.shape[2:])[:length]

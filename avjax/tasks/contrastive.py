"""Contrastive losses in float32: one unreduced value per clip, over all clips of a batch.

Similarities are computed for one block of clips at a time, and recomputed in the backward pass. The full matrix of
clips by clips is never held, so memory grows linearly with the batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from avjax.errors import AvjaxError

# Rows shorter than this count as zeros: the gradient divides by the cube of a length.
_SHORT = 1e-12


def unit(x: jax.Array) -> jax.Array:
    """Returns x / ‖x‖ over the last axis, (..., d) float32; zeros stay zeros, with zero gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, -1, keepdims=True)
    some = square > _SHORT**2
    return jnp.where(some, x * jax.lax.rsqrt(jnp.where(some, square, 1)), 0)


def clip_loss(
    x: jax.Array, y: jax.Array, weight: jax.Array, *, temperature: float | jax.Array = 0.07, block: int = 512
) -> jax.Array:
    """Computes the symmetric contrastive loss of pairs.

    Radford et al. 2021, "Learning transferable visual models", Fig. 3: the mean of −log p(yᵢ | xᵢ),
    among the y of all clips, and −log p(xᵢ | yᵢ), among their x.

    Args:
      x: (b, d), features of one modality, of length 1.
      y: (b, d), those of the other.
      weight: (b,), 0 for clips that are left out and cost 0; their rows are not read.
      temperature: τ > 0, which divides the similarities; differentiable.
      block: number of clips whose similarities are held at a time; it changes memory, not values.

    Returns:
      (b,) float32.
    """
    real = weight > 0
    x, y = _zeroed(x, real), _zeroed(y, real)
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
    """Computes the supervised contrastive loss over the features of both modalities.

    EmoAsst, Eq. 1; Khosla et al. 2020, Eq. 2. There are 2b features. An anchor is compared with all others; its
    positives are those of its label, and their mean is outside the logarithm. A clip's loss is the mean of its two
    anchors' losses.

    Args:
      x: (b, d), as in `clip_loss`.
      y: (b, d), as in `clip_loss`.
      label: (b,) integers, any.
      weight: (b,), as in `clip_loss`.
      temperature: as in `clip_loss`.
      block: as in `clip_loss`, counted in features.

    Returns:
      (b,) float32.

    Raises:
      AvjaxError: the labels are not classes.
    """
    if label.ndim != 1 or not jnp.issubdtype(label.dtype, jnp.integer):
        raise AvjaxError(f"SupCon got labels {label.dtype}{label.shape}; give it one class per clip, integers (b,)")
    real = jnp.repeat(weight > 0, 2)
    # A clip's two features are adjacent, so that a batch sharded over devices stays sharded.
    z = _zeroed(jnp.stack([x, y], 1).reshape(real.size, -1), real)
    scaled = z / temperature
    total, count = _positives(z, jnp.repeat(label, 2), real)
    mean = jnp.sum(scaled * total, -1) / jnp.maximum(count, 1)
    cost = _log_sum_exp(scaled, z, real, True, block) - mean
    return jnp.mean(jnp.where(real & (count > 0), cost, 0).reshape(-1, 2), -1)


def _zeroed(x: jax.Array, real: jax.Array) -> jax.Array:
    return jnp.where(real[:, None], x, 0).astype(jnp.float32)


def _positives(z: jax.Array, label: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sum (m, d) and the number (m,) of the other features with the same label."""
    _, group = jnp.unique(label, return_inverse=True, size=label.size)
    add = lambda v: jax.ops.segment_sum(v, group, label.size)[group] - v  # noqa: E731
    return add(z), add(real.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _log_sum_exp(query: jax.Array, key: jax.Array, valid: jax.Array, others: bool, block: int) -> jax.Array:
    """Computes log Σ exp(qᵢ · kⱼ) over the valid keys; 0 where there is none.

    Args:
      query: (m, d) float32.
      key: (m, d) float32.
      valid: (m,).
      others: whether the key with the query's own index is left out.
      block: queries at a time: (block, m) similarities are held, in the backward pass too.

    Returns:
      (m,) float32.
    """

    def one(queries: tuple[jax.Array, jax.Array]) -> jax.Array:
        total = jax.nn.logsumexp(_similarities(*queries, key, valid, others), -1)
        return jnp.where(jnp.isfinite(total), total, 0)

    blocks = _blocks(query, block), _blocks(jnp.arange(len(query)), block)
    return _unblocked(jax.lax.map(one, blocks), len(query))


def _forward(query: jax.Array, key: jax.Array, valid: jax.Array, others: bool, block: int) -> tuple[jax.Array, Any]:
    total = _log_sum_exp(query, key, valid, others, block)
    return total, (query, key, valid, total)


def _backward(others: bool, block: int, kept: Any, slope: jax.Array) -> tuple[Any, ...]:
    query, key, valid, total = kept

    def one(key_slope: jax.Array, blocked: Any) -> tuple[jax.Array, jax.Array]:
        q, index, top, g = blocked
        share = jnp.exp(_similarities(q, index, key, valid, others) - top[:, None]) * g[:, None]
        return key_slope + _product(share.T, q), _product(share, key)

    rows = (query, jnp.arange(len(query)), total, slope)
    key_slope, query_slope = jax.lax.scan(one, jnp.zeros_like(key), tuple(_blocks(v, block) for v in rows))
    return _unblocked(query_slope, len(query)), key_slope, None


_log_sum_exp.defvjp(_forward, _backward)


def _similarities(query: jax.Array, index: jax.Array, key: jax.Array, valid: jax.Array, others: bool) -> jax.Array:
    """Computes similarities of a block of queries (q, d) to all keys: (q, m), −inf for keys that are left out."""
    among = valid[None]
    if others:
        among = among & (index[:, None] != jnp.arange(len(key))[None])
    return jnp.where(among, _product(query, key.T), -jnp.inf)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # At a temperature of 0.07, tensor-core rounding would shift similarities by about 0.01.
    return jnp.matmul(a, b, precision="highest")


def _blocks(v: jax.Array, block: int) -> jax.Array:
    """Reshapes (m, …) to (blocks, block, …), padded with zeros; `_unblocked` undoes it.

    Blocks are strided over the rows, so that with a sharded batch every device holds a part of every block.
    """
    size = min(block, len(v))
    count = -(-len(v) // size)
    v = jnp.pad(v, [(0, count * size - len(v))] + [(0, 0)] * (v.ndim - 1))
    return jnp.moveaxis(v.reshape(size, count, *v.shape[1:]), 1, 0)


def _unblocked(blocks: jax.Array, length: int) -> jax.Array:
    return jnp.moveaxis(blocks, 0, 1).reshape(-1, *blocks.shape[2:])[:length]

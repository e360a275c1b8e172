"""Masked pooling and attention shared by encoders and models.

Masks are boolean, True = real. Every function gives zeros, never NaN, over an empty set, and what lies under a False
mask never reaches the result, so that padding and batch neighbours cannot change an answer. Softmax runs in float32.
"""

import jax
import jax.numpy as jnp


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis of `scores` among the True entries of `mask`; all zeros where there is none.

    Args:
      scores: (..., n).
      mask: broadcastable to `scores`.
    Returns:
      (..., n) in the dtype of `scores`; each row sums to 1, or to 0 where its mask is empty.
    """
    mask = jnp.broadcast_to(mask, scores.shape)
    kept = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(kept, -1, keepdims=True))
    # The inner `where` keeps exp finite under False entries, so that no NaN gradient comes back through them.
    shifted = jnp.where(mask, scores.astype(jnp.float32) - jnp.where(jnp.isfinite(top), top, 0.0), 0.0)
    weights = jnp.where(mask, jnp.exp(shifted), 0.0)
    total = jnp.sum(weights, -1, keepdims=True)
    return (weights / jnp.where(total > 0, total, 1.0)).astype(scores.dtype)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `x` (..., n, d) over the True steps of `mask` (..., n); zeros where there is none. Returns (..., d)."""
    total = jnp.einsum("...nd,...n->...d", jnp.where(mask[..., None], x, 0), mask.astype(x.dtype))
    return total / jnp.maximum(jnp.sum(mask, -1), 1).astype(x.dtype)[..., None]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention, any number of heads.

    Args:
      query: (b, q, h, d).
      key, value: (b, k, h, d).
      mask: (b, k), True for keys that may be attended to.
    Returns:
      context (b, q, h, d), zeros where no key may be attended to, and weights (b, h, q, k).
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    weights = masked_softmax(scores, mask[:, None, None, :])
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value), weights

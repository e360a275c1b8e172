"""Masked pooling, attention and transformer layers shared by encoders and models.

Masks are boolean, True = real. Every function gives zeros, never NaN, over an empty set, and what lies under a False
mask never reaches the result, so that padding and batch neighbours cannot change an answer. Softmax runs in float32.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
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


class Project(nn.Module):
    """Affine map of the last `inputs` axes of x onto the axes `features`: (..., *inputs) → (..., *features).

    Params are float32 and of full rank, so that heads shard: kernel (*inputs, *features), bias (*features).
    """

    features: tuple[int, ...]
    inputs: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[x.ndim - self.inputs :], *self.features)
        axes = tuple(range(self.inputs)), tuple(range(self.inputs, len(shape)))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=axes[0], out_axis=axes[1])
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros, self.features)
        y = jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), self.inputs)
        return y + jnp.expand_dims(bias.astype(self.dtype), tuple(range(y.ndim - bias.ndim)))


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2) over the steps that the mask admits."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x (b, l, d) under mask (b, l) to (b, l, d); `heads` must divide d."""
        split = (self.heads, x.shape[-1] // self.heads)
        query, key, value = (Project(split, dtype=self.dtype, name=n)(x) for n in ("query", "key", "value"))
        context, _ = attend(query, key, value, mask)  # b l h d
        return Project(x.shape[-1:], inputs=2, dtype=self.dtype, name="out")(context)


class PostNormBlock(nn.Module):
    """Transformer layer that normalises after each residual sum (Vaswani et al. 2017; BERT)."""

    heads: int
    inner: int
    activation: Callable[[jax.Array], jax.Array]
    eps: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x (b, l, d) under mask (b, l) to (b, l, d)."""
        # Flax computes statistics and affine in float32 here, whatever `dtype` it returns.
        norm = functools.partial(nn.LayerNorm, self.eps, self.dtype, use_fast_variance=False)
        project = functools.partial(Project, dtype=self.dtype)
        attended = SelfAttention(self.heads, self.dtype, name="attention")(x, mask)
        x = norm(name="attention_norm")(x + attended)
        hidden = self.activation(project((self.inner,), name="up")(x))
        return norm(name="norm")(x + project(x.shape[-1:], name="down")(hidden))

"""Masked pooling, attention and transformer layers shared by encoders and models.

Masks are boolean, True = real. Every function gives zeros, never NaN, over an empty set, and what lies under a False
mask never reaches the result, so that padding and batch neighbours cannot change an answer. Softmax runs in float32.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

# A score of what may not be attended to: its exponential is 0 beside any other, and 1 where there is none.
_LOW = -1e30


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


def causal(mask: jax.Array) -> jax.Array:
    """What each step of a sequence may attend to: itself and what precedes it, where `mask` (b, l) is True.

    Returns (b, l, l), the second axis that of the steps that attend.
    """
    return mask[:, None] & jnp.tri(mask.shape[1], dtype=bool)[None]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention, any number of heads.

    Args:
      query: (b, q, h, d).
      key, value: (b, k, h, d).
      mask: (b, k), True for keys that may be attended to; or (b, q, k), where that differs between queries.
    Returns:
      context (b, q, h, d), zeros where no key may be attended to, and weights (b, h, q, k).
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    weights = masked_softmax(scores, _for_queries(mask)[:, None])
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value), weights


def attended(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """The context of `attend`, for those who need no weights.

    On a CPU one head after another, so that its scores stay in the cache: two to three times faster at 200 to 1,500
    steps. Elsewhere all at once.
    """
    return jax.lax.platform_dependent(
        query, key, value, mask, cpu=_head_by_head, default=lambda *arrays: attend(*arrays)[0]
    )


def _for_queries(mask: jax.Array) -> jax.Array:
    """A mask of `attend` as (b, 1, k) or (b, q, k)."""
    return mask if mask.ndim == 3 else mask[:, None]


def _head_by_head(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    mask = _for_queries(mask)
    some = mask.any(-1, keepdims=True)

    def one(head: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = head  # b l d
        scores = jnp.einsum("bqd,bkd->bqk", q / jnp.sqrt(q.shape[-1]).astype(q.dtype), k).astype(jnp.float32)
        scores = jnp.where(mask, scores, _LOW)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True)))
        # Divided by their sum after the product, which is narrower than the weights.
        summed = jnp.einsum("bqk,bkd->bqd", weights.astype(v.dtype), v)
        return jnp.where(some, summed / jnp.sum(weights, -1, keepdims=True).astype(v.dtype), 0)

    heads = tuple(jnp.moveaxis(x, 2, 0) for x in (query, key, value))
    return jnp.moveaxis(jax.lax.map(one, heads), 0, 2)


class Project(nn.Module):
    """Affine map of the last `inputs` axes of x onto the axes `features`: (..., *inputs) → (..., *features).

    Params are float32 and of full rank, so that heads shard: kernel (*inputs, *features) and, unless `bias` is False,
    bias (*features).
    """

    features: tuple[int, ...]
    inputs: int = 1
    dtype: jnp.dtype = jnp.float32
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[x.ndim - self.inputs :], *self.features)
        axes = tuple(range(self.inputs)), tuple(range(self.inputs, len(shape)))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=axes[0], out_axis=axes[1])
        kernel = self.param("kernel", init, shape)
        y = jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), self.inputs)
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, self.features)
        return y + jnp.expand_dims(bias.astype(self.dtype), tuple(range(y.ndim - bias.ndim)))


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2) over the steps that the mask admits.

    With `causal(mask)` for a mask no step sees those after it, as in a decoder. `unbiased` names those of query, key
    and value that have no bias.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32
    unbiased: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x (b, l, d) under mask (b, l) or (b, l, l) to (b, l, d); `heads` must divide d."""
        split = (self.heads, x.shape[-1] // self.heads)
        query, key, value = (
            Project(split, dtype=self.dtype, bias=n not in self.unbiased, name=n)(x) for n in ("query", "key", "value")
        )
        context = attended(query, key, value, mask)  # b l h d
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
        x += SelfAttention(self.heads, self.dtype, name="attention")(x, mask)
        x = norm(name="attention_norm")(x)
        hidden = self.activation(project((self.inner,), name="up")(x))
        return norm(name="norm")(x + project(x.shape[-1:], name="down")(hidden))


class PreNormBlock(nn.Module):
    """Transformer layer that normalises before each residual branch (ViT, Whisper, wav2vec2 large).

    `scaled` multiplies each branch by learned factors (layer scale, Touvron et al. 2021; DINOv2); `unbiased` as in
    `SelfAttention`.
    """

    heads: int
    inner: int
    activation: Callable[[jax.Array], jax.Array]
    eps: float
    dtype: jnp.dtype = jnp.float32
    unbiased: tuple[str, ...] = ()
    scaled: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x (b, l, d) under mask (b, l), or (b, l, l) as `SelfAttention`, to (b, l, d)."""
        norm = functools.partial(nn.LayerNorm, self.eps, self.dtype, use_fast_variance=False)
        project = functools.partial(Project, dtype=self.dtype)
        attention = SelfAttention(self.heads, self.dtype, self.unbiased, name="attention")
        x += self._scale("attention_scale", attention(norm(name="attention_norm")(x), mask))
        hidden = self.activation(project((self.inner,), name="up")(norm(name="norm")(x)))
        return x + self._scale("feed_forward_scale", project(x.shape[-1:], name="down")(hidden))

    def _scale(self, name: str, branch: jax.Array) -> jax.Array:
        if not self.scaled:
            return branch
        return branch * self.param(name, nn.initializers.ones, branch.shape[-1:]).astype(branch.dtype)[None, None]

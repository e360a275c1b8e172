"""Multi-head attention under masks (Vaswani et al. 2017, section 3.2)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import cpu
from avjax.layers.dropout import Dropout
from avjax.layers.linear import Project
from avjax.layers.masking import masked_softmax

# Below this number of keys, attention head by head is no faster.
_FEW = 32


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> tuple[jax.Array, jax.Array]:
    """Computes scaled dot-product attention with any number of heads.

    Args:
      query: (b, q, h, d).
      key: (b, k, h, d).
      value: (b, k, h, d).
      mask: (b, k), True for keys that may be attended to; or (b, q, k) for a mask per query.
      drop: dropout of the weights.

    Returns:
      The context (b, q, h, d), zeros where no key may be attended to, and weights (b, h, q, k).
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    weights = drop(masked_softmax(scores, _for_queries(mask)[:, None]))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value), weights


def attended(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes the context of `attend` alone, without weights.

    A CPU computes one head after another, so that the scores stay in the cache: two to three times faster at 40 to
    1,500 steps. For few steps, and on other devices, all heads are computed at once, which compiles faster.
    """
    # Under `jax.export` the number of steps may be symbolic.
    if isinstance(key.shape[1], int) and key.shape[1] < _FEW:
        return attend(query, key, value, mask)[0]
    return jax.lax.platform_dependent(
        query, key, value, _for_queries(mask), cpu=cpu.attend, default=lambda *arrays: attend(*arrays)[0]
    )


def _for_queries(mask: jax.Array) -> jax.Array:
    """Reshapes a mask of `attend` to (b, 1, k) or (b, q, k)."""
    return mask if mask.ndim == 3 else mask[:, None]


class CrossAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) of one sequence to the unmasked steps of another.

    `unbiased` lists which of query, key and value have no bias; `dropout` is the rate on the weights.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32
    unbiased: tuple[str, ...] = ()
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        """Maps x (b, q, d) and source (b, k, s) under mask (b, k) or (b, q, k) to (b, q, d); `heads` must divide d."""
        split = (self.heads, x.shape[-1] // self.heads)
        query, key, value = (
            Project(split, dtype=self.dtype, bias=n not in self.unbiased, name=n)(sequence)
            for n, sequence in (("query", x), ("key", source), ("value", source))
        )
        if train and self.dropout:
            context, _ = attend(query, key, value, mask, Dropout(self.dropout, train))
        else:
            context = attended(query, key, value, mask)  # b q h d
        return Project(x.shape[-1:], inputs=2, dtype=self.dtype, name="out")(context)


class SelfAttention(CrossAttention):
    """Multi-head attention of a sequence to its own unmasked steps.

    With `causal(mask)` as its mask, no step attends to later ones, as in a decoder.
    """

    def __call__(self, x: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        """Maps x (b, l, d) under mask (b, l) or (b, l, l) to (b, l, d); `heads` must divide d."""
        return super().__call__(x, x, mask, train)

"""Crossmodal transformer (Tsai et al. 2019, "Multimodal Transformer for Unaligned Multimodal Language Sequences").

Shapes: b clip, n step of a stream (q queries, k keys), d width.

The released systems have no masks: they attend to padding, treat steps whose first projected channel is zero as
padding, and predict from the last step of the batch, padded or not. These layers use true masks, and positions count
from the first real step; `as_released` restores the released positions, with padding read as zeros. On full masks both
agree. A missing stream, with an all-False mask, contributes only biases to the streams that attend to it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers.dropout import Dropout
from avjax.layers.masking import positions
from avjax.layers.transformer import CrossBlock, sinusoids


def no_future(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns which steps of another stream a step may attend to, as in the released code (not in the paper).

    A step attends to the other's steps up to its own position plus the difference of their lengths. Within one stream
    this is the causal mask. Positions and lengths are those of the clip, without padding.

    Args:
      queries: (b, q), mask of the stream that attends.
      keys: (b, k), mask of the other.

    Returns:
      (b, q, k).
    """
    query, key = positions(queries)[:, :, None], positions(keys)[:, None, :]
    slack = jnp.abs(jnp.max(query, 1, keepdims=True) - jnp.max(key, 2, keepdims=True))
    return keys[:, None, :] & (key - query <= slack)


class CrossmodalEncoder(nn.Module):
    """A stack of `CrossBlock`s on scaled and, if `placed`, position-embedded streams, with a final norm.

    `causal` hides the future (`no_future`); `mixed` is as in `CrossBlock`, `as_released` as in the module docstring.
    """

    layers: int
    heads: int
    causal: bool = True
    placed: bool = True
    mixed: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    as_released: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        source: jax.Array | None = None,
        source_mask: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Maps x (b, q, d), attending to source (b, k, d) or else to itself, under their masks, to (b, q, d)."""
        mask_of_keys = mask if source is None else source_mask
        admitted = no_future(mask, mask_of_keys) if self.causal else mask_of_keys
        drop = Dropout(self.embedding_dropout, train)
        x = drop(self._embed(x, mask))
        source = None if source is None else drop(self._embed(source, source_mask))
        for i in range(self.layers):
            block = CrossBlock(
                self.heads, 4 * x.shape[-1], dtype=self.dtype, mixed=self.mixed,
                dropout=self.dropout, attention_dropout=self.attention_dropout, name=f"layer_{i}",
            )  # fmt: skip
            x = block(x, x if source is None else source, admitted, train)
        return nn.LayerNorm(1e-5, self.dtype, use_fast_variance=False, name="norm")(x)

    def _embed(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        scaled = x * jnp.sqrt(x.shape[-1]).astype(x.dtype)
        if not self.placed:
            return scaled
        position = positions(mask)
        if self.as_released:
            position = jnp.where(x[..., 0] != 0, position, 0)
        return scaled + sinusoids(position, x.shape[-1]).astype(x.dtype)

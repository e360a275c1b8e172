"""Crossmodal transformer (Tsai et al. 2019, "Multimodal Transformer for Unaligned Multimodal Language Sequences").

Shapes: b clip, n step of a stream (q one that asks, k one that answers), d width.

Released systems know of no masks: they attend to padding, count as padding the steps whose first projected channel is
zero, and predict from the last step of the batch, padded or not. Here the masks are true ones and positions count from
the first real step; `as_released` gives the released positions back, padding read as zeros. On full masks both are the
same. A stream that is missing, an all-False mask, adds nothing but biases where others ask it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers.dropout import Dropout
from avjax.layers.masking import positions
from avjax.layers.transformer import CrossBlock, sinusoids


def no_future(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """What each step of one stream may ask of another, as in the released code (the paper has no such mask).

    A step sees the other's steps up to its own number plus the difference of their lengths: with the stream itself for
    the other this is the causal mask. Numbers and lengths are the clip's own.

    Args:
      queries: (b, q); keys: (b, k), masks of the streams.

    Returns:
      (b, q, k).
    """
    asks, answers = positions(queries)[:, :, None], positions(keys)[:, None, :]
    slack = jnp.abs(jnp.max(asks, 1, keepdims=True) - jnp.max(answers, 2, keepdims=True))
    return keys[:, None, :] & (answers - asks <= slack)


class CrossmodalEncoder(nn.Module):
    """A stack of `CrossBlock`s on scaled and, if `placed`, position-embedded streams, with a last norm.

    `causal` hides the future (`no_future`); `mixed` as in `CrossBlock`; `as_released` as in this file's description.
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
        """Maps x (b, q, d), asking source (b, k, d) or else itself, under their masks, to (b, q, d)."""
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
        place = positions(mask)
        if self.as_released:
            place = jnp.where(x[..., 0] != 0, place, 0)
        return scaled + sinusoids(place, x.shape[-1]).astype(x.dtype)

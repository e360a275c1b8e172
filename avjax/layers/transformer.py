"""Transformer layers shared by encoders and models."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers.attention import CrossAttention, SelfAttention
from avjax.layers.dropout import Dropout
from avjax.layers.linear import Project


def sinusoids(position: jax.Array, width: int) -> jax.Array:
    """Embeds positions (b, n) by sinusoids: (b, n, width) float32, zeros where the position is 0.

    The layout is tensor2tensor's: sines in the first half, cosines in the second, a last channel of zeros if odd.
    """
    half = width // 2
    frequency = jnp.exp(-jnp.log(10000.0) / max(half - 1, 1) * jnp.arange(half))
    angle = position[..., None].astype(jnp.float32) * frequency[None, None]
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
    return jnp.pad(jnp.where(position[..., None] > 0, waves, 0), ((0, 0), (0, 0), (0, width % 2)))


class PostNormBlock(nn.Module):
    """Transformer layer that normalises after each residual sum (Vaswani et al. 2017; BERT).

    Given a `source`, it also attends to that before the feed-forward layer, as a decoder layer does. `dropout` is the
    rate on attention weights, hidden units and residual branches.
    """

    heads: int
    inner: int
    activation: Callable[[jax.Array], jax.Array]
    eps: float
    dtype: jnp.dtype = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        source: jax.Array | None = None,
        source_mask: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Maps x (b, l, d) under mask (b, l), and a source (b, k, d) under its mask (b, k), to (b, l, d)."""
        # Flax computes statistics and affine map in float32, whatever the `dtype`.
        norm = functools.partial(nn.LayerNorm, self.eps, self.dtype, use_fast_variance=False)
        project = functools.partial(Project, dtype=self.dtype)
        drop = Dropout(self.dropout, train)
        attention = SelfAttention(self.heads, self.dtype, dropout=self.dropout, name="attention")
        x = norm(name="attention_norm")(x + drop(attention(x, mask, train)))
        if source is not None:
            cross = CrossAttention(self.heads, self.dtype, dropout=self.dropout, name="source_attention")
            x = norm(name="source_norm")(x + drop(cross(x, source, source_mask, train)))
        hidden = drop(self.activation(project((self.inner,), name="up")(x)))
        return norm(name="norm")(x + drop(project(x.shape[-1:], name="down")(hidden)))


class PreNormBlock(nn.Module):
    """Transformer layer that normalises before each residual branch (ViT, Whisper, wav2vec2 large).

    `scaled` multiplies each branch by learned factors (layer scale, Touvron et al. 2021; DINOv2); `unbiased` is as in
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
        """Maps x (b, l, d) under mask (b, l) or (b, l, l) to (b, l, d)."""
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


class CrossBlock(nn.Module):
    """Pre-norm transformer layer in which one sequence attends to another (Tsai et al. 2019, Eqs. 3–4).

    Both are normalised by the same parameters, so with the sequence itself as source this is a standard layer.
    `mixed` learns the weight of the residual stream against its branch (Goncalves and Busso 2022).
    """

    heads: int
    inner: int
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mixed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        """Maps x (b, q, d) and source (b, k, d) under mask (b, k) or (b, q, k) to (b, q, d)."""
        project = functools.partial(Project, dtype=self.dtype)
        drop = Dropout(self.dropout, train)
        norm = nn.LayerNorm(self.eps, self.dtype, use_fast_variance=False, name="attention_norm")
        attention = CrossAttention(self.heads, self.dtype, dropout=self.attention_dropout, name="attention")
        keep = self.param("mix", nn.initializers.uniform(1.0), (1,))[None, None] if self.mixed else None
        x = _residual(x, drop(attention(norm(x), norm(source), mask, train)), keep)
        hidden = nn.LayerNorm(self.eps, self.dtype, use_fast_variance=False, name="norm")(x)
        hidden = drop(self.activation(project((self.inner,), name="up")(hidden)))
        return _residual(x, drop(project(x.shape[-1:], name="down")(hidden)), keep)


def _residual(x: jax.Array, branch: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Returns the sum of both, or their mixture with weight `keep` for `x`."""
    if keep is None:
        return x + branch
    keep = keep.astype(x.dtype)
    return x * keep + branch * (1 - keep)

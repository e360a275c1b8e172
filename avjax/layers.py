"""Masked pooling, attention and transformer layers shared by encoders and models.

Masks are boolean, True = real. Every function gives zeros, never NaN, over an empty set, and what lies under a False
mask never reaches the result, so that padding and batch neighbours cannot change an answer. Softmax runs in float32.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.convolution import depthwise, shifted
from avjax.errors import AvjaxError
from avjax.recurrence import lstm

# A score of what may not be attended to: its exponential is 0 beside any other, and 1 where there is none.
_LOW = -1e30
# Keys up to which attention head by head is no faster.
_FEW = 32


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


def masked_max(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Maximum of `x` (b, n, d) over the True steps of `mask` (b, n): (b, d) float32, zeros where there is none."""
    x = x.astype(jnp.float32)
    # Not `jnp.max`: its gradient is divided by how many steps equal the maximum, and programs that compute x twice and
    # round it differently find none.
    step = jnp.argmax(jnp.where(mask[..., None], x, -jnp.inf), 1, keepdims=True)
    top = jnp.take_along_axis(x, step, 1)[:, 0]
    return jnp.where(jnp.any(mask, -1, keepdims=True), top, 0)


def causal(mask: jax.Array) -> jax.Array:
    """What each step of a sequence may attend to: itself and what precedes it, where `mask` (b, l) is True.

    Returns (b, l, l), the second axis that of the steps that attend.
    """
    return mask[:, None] & jnp.tri(mask.shape[1], dtype=bool)[None]


def enter(
    batch: Mapping[str, jax.Array], streams: Sequence[str], dtype: jnp.dtype, padded: bool = False
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The streams of a batch, zeros where nothing is real, and their masks: stream → (b, n, d) and (b, n).

    `padded` calls every step real, as systems do that know of no masks and read padding as zeros.
    """
    masks = {s: batch[f"{s}_mask"] for s in streams}
    steps = {s: jnp.where(masks[s][..., None], batch[s], 0).astype(dtype) for s in streams}
    return steps, {s: jnp.ones_like(m) for s, m in masks.items()} if padded else masks


def positions(mask: jax.Array) -> jax.Array:
    """Where each step of `mask` (b, n) stands, counted from the first real one, which is 1; 0 where it is False."""
    index = jnp.arange(mask.shape[1])[None]
    return jnp.where(mask, index - jnp.argmax(mask, -1, keepdims=True) + 1, 0)


def sinusoids(position: jax.Array, width: int) -> jax.Array:
    """Sinusoidal embedding of positions (b, n): (b, n, width) float32, zeros where the position is 0.

    The layout of tensor2tensor: sines in the first half, cosines in the second, an odd last channel of zeros.
    """
    half = width // 2
    frequency = jnp.exp(-jnp.log(10000.0) / max(half - 1, 1) * jnp.arange(half))
    angle = position[..., None].astype(jnp.float32) * frequency[None, None]
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
    return jnp.pad(jnp.where(position[..., None] > 0, waves, 0), ((0, 0), (0, 0), (0, width % 2)))


def last_step(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The last real step of `x` (b, n, d) under `mask` (b, n): (b, d), zeros where there is none."""
    index = jnp.argmax(positions(mask), -1)[:, None, None]
    return jnp.where(jnp.any(mask, -1, keepdims=True), jnp.take_along_axis(x, index, 1)[:, 0], 0)


def align(x: jax.Array, mask: jax.Array, onto: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Averages a stream over the spans of time that the real steps of another take up, both filling the same clip.

    Step p of the other's m covers the steps from floor(p·n/m) up to ceil((p+1)·n/m) of the stream's n, counted from
    the first real one of each, so that padding moves nothing, no span is empty, and equal lengths map one to one.

    Args:
      x: (b, n, d); mask: (b, n).
      onto: (b, m), the other stream's mask.
    Returns:
      averages (b, m, d) and their mask (b, m): False where `onto` is, and where the whole span is masked.
    """
    source, target = positions(mask)[:, None, :], positions(onto)[:, :, None]
    length, count = jnp.max(source, -1, keepdims=True), jnp.maximum(jnp.max(target, 1, keepdims=True), 1)
    first, end = (target - 1) * length // count, -(-target * length // count)
    member = (source > first) & (source <= end) & onto[:, :, None] & mask[:, None, :]  # (b, m, n)
    total = jnp.einsum("bmn,bnd->bmd", member.astype(x.dtype), jnp.where(mask[..., None], x, 0))
    size = jnp.sum(member, -1)
    return total / jnp.maximum(size, 1).astype(x.dtype)[..., None], size > 0


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention, any number of heads.

    Args:
      query: (b, q, h, d).
      key, value: (b, k, h, d).
      mask: (b, k), True for keys that may be attended to; or (b, q, k), where that differs between queries.
      drop: dropout of the weights before they are used.
    Returns:
      context (b, q, h, d), zeros where no key may be attended to, and weights (b, h, q, k).
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    weights = drop(masked_softmax(scores, _for_queries(mask)[:, None]))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value), weights


def attended(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """The context of `attend`, for those who need no weights.

    On a CPU one head after another, so that its scores stay in the cache: two to three times faster at 40 to 1,500
    steps. Elsewhere, and where there are few steps, all at once: that gains nothing there and is quicker to compile.
    """
    # Of `jax.export` the number of steps may be a symbol.
    if isinstance(key.shape[1], int) and key.shape[1] < _FEW:
        return attend(query, key, value, mask)[0]
    return jax.lax.platform_dependent(
        query, key, value, mask, cpu=_head_by_head, default=lambda *arrays: attend(*arrays)[0]
    )


def _for_queries(mask: jax.Array) -> jax.Array:
    """A mask of `attend` as (b, 1, k) or (b, q, k)."""
    return mask if mask.ndim == 3 else mask[:, None]


def _head_by_head(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    mask = _for_queries(mask)
    some = mask.any(-1, keepdims=True)

    # Weights are computed once more for gradients: that costs less than to keep those of all heads.
    @functools.partial(jax.checkpoint, prevent_cse=False)
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


def _product(x: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
    """`jnp.tensordot` as one product of matrices.

    Of arrays of more axes XLA turns the kernel's gradient round, computing what it is made of again: on a CPU the
    gradient of a layer takes 1.1 to 1.5 times as long.
    """
    *before, width = *x.shape[: x.ndim - inputs], math.prod(kernel.shape[:inputs])
    return (x.reshape(-1, width) @ kernel.reshape(width, -1)).reshape(*before, *kernel.shape[inputs:])


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
        y = _product(x.astype(self.dtype), kernel.astype(self.dtype), self.inputs)
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, self.features)
        return y + jnp.expand_dims(bias.astype(self.dtype), tuple(range(y.ndim - bias.ndim)))


class Dropout(nn.Module):
    """Zeros each value by the chance `rate` in training, and divides the others by 1 − rate.

    Whether a value stays is a hash of its index and the key (rng "dropout"), not a draw of JAX's: cheaper to run and to
    compile, and the same for a lane alone and among others.

    Attributes:
      rate: from 0 to below 1; any other raises AvjaxError.
      train: whether this is training; else nothing happens.
      shared: axes along which all values share one fate.
    """

    rate: float
    train: bool
    shared: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x to the same shape."""
        if not 0 <= self.rate < 1:
            raise AvjaxError(f"a dropout is {self.rate}; give it a rate from 0 to below 1")
        if not self.train or not self.rate:
            return x
        shape = [1 if axis in self.shared else length for axis, length in enumerate(x.shape)]
        words = hashed(self.make_rng("dropout"), shape)
        return jnp.where(words >= jnp.uint32(round(self.rate * 2**32)), x / (1 - self.rate), 0)


def hashed(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """A uint32 for each index of `shape`, mixed with both words of a key; good for masks, not for secrets.

    The mixing is the 32-bit finaliser of MurmurHash3 (Appleby 2011), once after each word.
    """
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    for word in jax.random.key_data(key):
        index ^= word
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            index = (index ^ (index >> shift)) * jnp.uint32(factor)
        index ^= index >> 16
    return index


class TimeConvolution(nn.Module):
    """Convolution over the steps of a sequence, in the form and with the parameters of Flax's 1-d `Conv`.

    It is one product of each step's window with the kernel: for `vmap` that is a batched product, while a convolution
    would become a grouped one, many times slower on a CPU. `channelwise` maps every channel by itself (depthwise).

    Attributes:
      width: of the result; if `channelwise`, that of the input.
      kernel: number of steps k that it spans.
      padding: "SAME", zeros around the sequence, or "VALID", k − 1 steps fewer.
    """

    width: int
    kernel: int
    padding: str = "SAME"
    channelwise: bool = False
    bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (b, n, d) to (b, n, width), or (b, n − k + 1, width)."""
        inputs = 1 if self.channelwise else x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (self.kernel, inputs, self.width)).astype(self.dtype)
        if self.padding == "SAME":
            x = jnp.pad(x, ((0, 0), ((self.kernel - 1) // 2, self.kernel // 2), (0, 0)))
        x = x.astype(self.dtype)
        if self.channelwise:
            y = depthwise(x, kernel[:, 0])
        else:
            y = _product(jnp.concatenate(shifted(x, self.kernel), -1), kernel.reshape(-1, self.width), 1)
        if not self.bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)[None, None]


class CrossAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) of one sequence to the admitted steps of another.

    `unbiased` names those of query, key and value that have no bias; `dropout` is the rate on the weights.
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
    """Multi-head attention of a sequence to its own admitted steps.

    With `causal(mask)` for a mask no step sees those after it, as in a decoder.
    """

    def __call__(self, x: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        """Maps x (b, l, d) under mask (b, l) or (b, l, l) to (b, l, d); `heads` must divide d."""
        return super().__call__(x, x, mask, train)


class PostNormBlock(nn.Module):
    """Transformer layer that normalises after each residual sum (Vaswani et al. 2017; BERT).

    Given a `source`, it attends to that, too, between itself and the feed-forward layer: a decoder's layer. `dropout`
    is the rate on attention weights, hidden units and residual branches.
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
        # Flax computes statistics and affine in float32 here, whatever `dtype` it returns.
        norm = functools.partial(nn.LayerNorm, self.eps, self.dtype, use_fast_variance=False)
        project = functools.partial(Project, dtype=self.dtype)
        drop = Dropout(self.dropout, train)
        attention = SelfAttention(self.heads, self.dtype, dropout=self.dropout, name="attention")
        x = norm(name="attention_norm")(x + drop(attention(x, mask, train)))
        if source is not None:
            asked = CrossAttention(self.heads, self.dtype, dropout=self.dropout, name="source_attention")
            x = norm(name="source_norm")(x + drop(asked(x, source, source_mask, train)))
        hidden = drop(self.activation(project((self.inner,), name="up")(x)))
        return norm(name="norm")(x + drop(project(x.shape[-1:], name="down")(hidden)))


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


class CrossBlock(nn.Module):
    """Pre-norm transformer layer that asks one sequence and is answered by another (Tsai et al. 2019, Eqs. 3–4).

    Both are normalised by the same parameters, so with the sequence itself for a source this is a plain layer.
    `mixed` learns a number that weighs each sum against its residual branch (Goncalves and Busso 2022).
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
    """The sum of both, or their mixture with the share `keep` of `x`."""
    if keep is None:
        return x + branch
    keep = keep.astype(x.dtype)
    return x * keep + branch * (1 - keep)


class Recurrence(nn.Module):
    """LSTM (Hochreiter and Schmidhuber 1997) over the real steps of a sequence; the state is held on the others.

    So a backward one (`reverse`) starts at the last real step, and neither knows of any padding. The gates stand in
    PyTorch's order: input, forget, candidate, output; its two biases are one here. The state is float32.
    """

    width: int
    reverse: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps x (b, n, d) under mask (b, n) to the hidden and the cell state after each step, (b, n, width) each.

        The last state is that at index -1, or at 0 if `reverse`: zeros for a clip without a real step.
        """
        x = jnp.where(mask[..., None], x, 0)
        inputs = Project((4, self.width), dtype=self.dtype, name="input")(x)  # b n 4 d
        # PyTorch's, uniform within 1 / sqrt(width). An orthogonal start would need a QR decomposition, and on two cores
        # those of several lanes wait for each other for ever (jaxlib 0.10's batched LAPACK calls share one pool).
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        kernel = self.param("kernel", init, (self.width, 4 * self.width))
        over_time = jnp.moveaxis(inputs.reshape(*x.shape[:2], 4 * self.width), 1, 0)
        hidden, cell = lstm(over_time, mask.T, kernel, self.reverse)
        return jnp.moveaxis(hidden, 0, 1), jnp.moveaxis(cell, 0, 1)

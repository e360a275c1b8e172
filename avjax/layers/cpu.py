"""CPU implementations of operations that are slow there in their usual form.

The layers choose between the two by `jax.lax.platform_dependent`.
"""

import functools

import jax
import jax.numpy as jnp

# The score of masked keys: its exponential is 0 if any key is unmasked, and 1 if none is.
_LOW = -1e30
# Below this number of channels, window offsets are concatenated for one product instead of multiplied one by one.
_FEW = 16


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes the context of `attention.attend` head by head, so that the scores stay in the cache.

    Args:
      query: (b, q, h, d).
      key: (b, k, h, d).
      value: (b, k, h, d).
      mask: (b, 1, k) or (b, q, k).

    Returns:
      (b, q, h, d).
    """
    some = mask.any(-1, keepdims=True)

    # The backward pass recomputes the weights: that costs less than keeping those of all heads.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(head: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = head  # b l d
        scores = jnp.einsum("bqd,bkd->bqk", q / jnp.sqrt(q.shape[-1]).astype(q.dtype), k).astype(jnp.float32)
        scores = jnp.where(mask, scores, _LOW)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True)))
        # Normalised after the product, which is narrower than the weights.
        summed = jnp.einsum("bqk,bkd->bqd", weights.astype(v.dtype), v)
        return jnp.where(some, summed / jnp.sum(weights, -1, keepdims=True).astype(v.dtype), 0)

    heads = tuple(jnp.moveaxis(x, 2, 0) for x in (query, key, value))
    return jnp.moveaxis(jax.lax.map(one, heads), 0, 2)


def depthwise_kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Computes a depthwise kernel's gradient (k, d) tap by tap from x (b, n, d) and gradient (b, n - k + 1, d)."""
    length = gradient.shape[1]
    of_tap = lambda i: jnp.sum(jax.lax.dynamic_slice_in_dim(x, i, length, 1) * gradient, (0, 1))  # noqa: E731
    return jax.lax.map(of_tap, jnp.arange(x.shape[1] - length + 1))


def convolve2d(x: jax.Array, kernel: jax.Array, stride: int, dilation: int, channelwise: bool) -> jax.Array:
    """Convolves as `conv2d.FrameConvolution` by a sum of products, one for each offset in the window.

    XLA's own gradients of convolutions are many times slower, most of all within loops and under `vmap`.

    Args:
      x: (n, h, w, d).
      kernel: (k, k, d, width), or (k, k, 1, width) if `channelwise`.
      stride: of the window.
      dilation: of the window.
      channelwise: whether the convolution is depthwise.

    Returns:
      (n, ceil(h / stride), ceil(w / stride), width).
    """
    windows = _windows(x, len(kernel), stride, dilation)
    flat, width = kernel.reshape(len(windows), *kernel.shape[2:]), kernel.shape[-1]
    if channelwise:
        times = width // x.shape[-1]
        windows = [jnp.repeat(window, times, -1) if times > 1 else window for window in windows]
        return sum(window * weight for window, weight in zip(windows, flat[:, 0, None, None, None], strict=True))
    if x.shape[-1] < _FEW:
        return jnp.tensordot(jnp.concatenate(windows, -1), flat.reshape(-1, width), 1)
    return sum(jnp.tensordot(window, weight, 1) for window, weight in zip(windows, flat, strict=True))


def _windows(x: jax.Array, kernel: int, stride: int, dilation: int) -> list[jax.Array]:
    """Returns x shifted to each offset in the window, (n, ceil(h / stride), ceil(w / stride), d) each."""
    ends = [(-(-length // stride) - 1) * stride + 1 for length in x.shape[1:3]]
    padding = (kernel // 2 * dilation,) * 2
    padded = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    offsets = range(0, kernel * dilation, dilation)
    return [padded[:, i : i + ends[0] : stride, j : j + ends[1] : stride] for i in offsets for j in offsets]

"""What only a CPU runs: results of the layers, computed in the ways that are fast there.

Each function stands beside the usual way of its layer in `jax.lax.platform_dependent`.
"""

import functools

import jax
import jax.numpy as jnp

# A score of what may not be attended to: its exponential is 0 beside any other, and 1 where there is none.
_LOW = -1e30
# Channels up to which the places of a window are laid side by side for one product, not multiplied one by one.
_FEW = 16


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Attends head by head, so that the scores of one stay in the cache: the context of `attention.attend`.

    Args:
      query: (b, q, h, d); key, value: (b, k, h, d); mask: (b, 1, k) or (b, q, k).

    Returns:
      (b, q, h, d).
    """
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


def depthwise_kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Computes a depthwise kernel's gradient (k, d) tap by tap, of x (b, n, d) and gradient (b, n - k + 1, d)."""
    length = gradient.shape[1]
    of_tap = lambda i: jnp.sum(jax.lax.dynamic_slice_in_dim(x, i, length, 1) * gradient, (0, 1))  # noqa: E731
    return jax.lax.map(of_tap, jnp.arange(x.shape[1] - length + 1))


def convolve2d(x: jax.Array, kernel: jax.Array, stride: int, dilation: int, channelwise: bool) -> jax.Array:
    """Convolves as `conv2d.FrameConvolution` by a sum of products, one for each place of the window.

    XLA's own gradients of convolutions are many times slower, within loops and under `vmap` most of all.

    Args:
      x: (n, h, w, d); kernel: (k, k, d, width), or (k, k, 1, width) if `channelwise`.

    Returns:
      (n, ceil(h / stride), ceil(w / stride), width).
    """
    places = _places(x, len(kernel), stride, dilation)
    flat, width = kernel.reshape(len(places), *kernel.shape[2:]), kernel.shape[-1]
    if channelwise:
        times = width // x.shape[-1]
        places = [jnp.repeat(place, times, -1) if times > 1 else place for place in places]
        return sum(place * weight for place, weight in zip(places, flat[:, 0, None, None, None], strict=True))
    if x.shape[-1] < _FEW:
        return jnp.tensordot(jnp.concatenate(places, -1), flat.reshape(-1, width), 1)
    return sum(jnp.tensordot(place, weight, 1) for place, weight in zip(places, flat, strict=True))


def _places(x: jax.Array, kernel: int, stride: int, dilation: int) -> list[jax.Array]:
    """What each place of the window sees, (n, ceil(h / stride), ceil(w / stride), d) each."""
    ends = [(-(-length // stride) - 1) * stride + 1 for length in x.shape[1:3]]
    around = (kernel // 2 * dilation,) * 2
    padded = jnp.pad(x, ((0, 0), around, around, (0, 0)))
    offsets = range(0, kernel * dilation, dilation)
    return [padded[:, i : i + ends[0] : stride, j : j + ends[1] : stride] for i in offsets for j in offsets]

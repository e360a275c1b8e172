"""Convolutions over images that train fast on a CPU too."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import cpu


class FrameConvolution(nn.Module):
    """2-d convolution, zero-padded equally on all sides; parameters as in Flax's `Conv`.

    On a CPU it is a sum of products (`cpu.convolve2d`), elsewhere XLA's convolution.

    Attributes:
      width: output channels.
      kernel: side of the window, odd; stride, dilation: of the convolution.
      channelwise: whether it is depthwise; `width` is then a multiple of the input's.
    """

    width: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    channelwise: bool = False
    bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (n, h, w, d) to (n, ceil(h / stride), ceil(w / stride), width)."""
        inputs = 1 if self.channelwise else x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (self.kernel, self.kernel, inputs, self.width))
        kernel = kernel.astype(self.dtype)
        geometry = {"stride": self.stride, "dilation": self.dilation}
        products = functools.partial(cpu.convolve2d, channelwise=self.channelwise, **geometry)
        y = jax.lax.platform_dependent(
            x.astype(self.dtype), kernel, cpu=products, default=functools.partial(convolve, **geometry)
        )
        if not self.bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)[None, None, None]


def convolve(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
    """Convolves x (n, h, w, d) with a kernel (k, k, d or 1, width), zero-padded."""
    padding = len(kernel) // 2 * dilation
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding),) * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def halved(x: jax.Array) -> jax.Array:
    """Max-pools non-negative x over 2 x 2 pixels: (n, h, w, d) → (n, ceil(h / 2), ceil(w / 2), d)."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])

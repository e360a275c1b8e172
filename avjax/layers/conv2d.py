"""Convolutions over pictures that train on a CPU too."""

import flax.linen as nn
import jax
import jax.numpy as jnp

# Channels up to which the places of a window are laid side by side for one product, not multiplied one by one.
_FEW = 16


class PictureConvolution(nn.Module):
    """2-d convolution, zeros around the picture, the same on all sides; parameters as those of Flax's `Conv`.

    On a CPU it is a sum of products, one for each place of the window: XLA's own gradients of convolutions are many
    times slower there, within loops and under `vmap` most of all. Elsewhere it is XLA's convolution.

    Attributes:
      width: of the result.
      kernel: side of the window, odd; stride, dilation: as in any convolution.
      channelwise: every channel by itself (depthwise); `width` is then a multiple of the input's.
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
        ways = {"cpu": self._products, "default": self._convolution}
        y = jax.lax.platform_dependent(x.astype(self.dtype), kernel, **ways)
        if not self.bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)[None, None, None]

    @property
    def _around(self) -> int:
        return self.kernel // 2 * self.dilation

    def _convolution(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            ((self._around,) * 2,) * 2,
            rhs_dilation=(self.dilation,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1] // kernel.shape[2],
        )

    def _products(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        places = self._places(x)
        flat = kernel.reshape(len(places), *kernel.shape[2:])
        if self.channelwise:
            times = self.width // x.shape[-1]
            places = [jnp.repeat(place, times, -1) if times > 1 else place for place in places]
            return sum(place * weight for place, weight in zip(places, flat[:, 0, None, None, None], strict=True))
        if x.shape[-1] < _FEW:
            return jnp.tensordot(jnp.concatenate(places, -1), flat.reshape(-1, self.width), 1)
        return sum(jnp.tensordot(place, weight, 1) for place, weight in zip(places, flat, strict=True))

    def _places(self, x: jax.Array) -> list[jax.Array]:
        """What each place of the window sees, (n, ceil(h / stride), ceil(w / stride), d) each."""
        ends = [(-(-length // self.stride) - 1) * self.stride + 1 for length in x.shape[1:3]]
        padded = jnp.pad(x, ((0, 0), (self._around,) * 2, (self._around,) * 2, (0, 0)))
        offsets = range(0, self.kernel * self.dilation, self.dilation)
        return [
            padded[:, i : i + ends[0] : self.stride, j : j + ends[1] : self.stride] for i in offsets for j in offsets
        ]


def halved(x: jax.Array) -> jax.Array:
    """Maximum over 2 x 2 places of what is at least 0: (n, h, w, d) to (n, ceil(h / 2), ceil(w / 2), d)."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])

"""Affine maps of the last axes, and convolutions over time as such maps."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers.depthwise import depthwise, shifted


def _product(x: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
    """Computes `jnp.tensordot` as one product of matrices.

    With more axes XLA transposes the kernel's gradient and recomputes its operands: on a CPU the gradient of a layer
    takes 1.1 to 1.5 times as long.
    """
    *batch, width = *x.shape[: x.ndim - inputs], math.prod(kernel.shape[:inputs])
    return (x.reshape(-1, width) @ kernel.reshape(width, -1)).reshape(*batch, *kernel.shape[inputs:])


class Project(nn.Module):
    """Affine map of the last `inputs` axes of x onto the axes `features`: (..., *inputs) → (..., *features).

    Parameters are float32 and keep all axes, so that heads can be sharded: kernel (*inputs, *features) and, if `bias`,
    bias (*features).
    """

    features: tuple[int, ...]
    inputs: int = 1
    dtype: jnp.dtype = jnp.float32
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (..., *inputs) to (..., *features)."""
        shape = (*x.shape[x.ndim - self.inputs :], *self.features)
        axes = tuple(range(self.inputs)), tuple(range(self.inputs, len(shape)))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=axes[0], out_axis=axes[1])
        kernel = self.param("kernel", init, shape)
        y = _product(x.astype(self.dtype), kernel.astype(self.dtype), self.inputs)
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, self.features)
        return y + jnp.expand_dims(bias.astype(self.dtype), tuple(range(y.ndim - bias.ndim)))


class TimeConvolution(nn.Module):
    """Convolution over the steps of a sequence, with the parameters of Flax's 1-d `Conv`.

    It is one product of each step's window with the kernel. Under `vmap` that is a batched product, while a convolution
    would become a grouped one, many times slower on a CPU. `channelwise` makes it depthwise.

    Attributes:
      width: output channels; if `channelwise`, those of the input.
      kernel: number of steps k.
      padding: "SAME" for zero padding, or "VALID" for k − 1 steps fewer.
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

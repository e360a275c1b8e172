"""Depthwise convolution over time, with custom gradients."""

import jax
import jax.numpy as jnp

from avjax.layers import cpu


def shifted(x: jax.Array, kernel: int) -> list[jax.Array]:
    """Returns the first, second, … step of all windows of `kernel` steps of x (b, n, d): (b, n - k + 1, d) each."""
    length = x.shape[1] - kernel + 1
    return [x[:, i : i + length] for i in range(kernel)]


@jax.custom_vjp
def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves every channel of x (b, n, d) with its own weights in `kernel` (k, d): (b, n - k + 1, d).

    Its custom gradients make a training step on a CPU three to four times faster than JAX's (width 512, k = 31).
    """
    return sum(step * weight for step, weight in zip(shifted(x, len(kernel)), kernel[:, None, None], strict=True))


def _gradients(inputs: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    padding = ((0, 0), (len(kernel) - 1, len(kernel) - 1), (0, 0))
    # On other devices at once: with clips sharded over devices, each iteration of a loop would communicate.
    of_kernel = jax.lax.platform_dependent(x, gradient, cpu=cpu.depthwise_kernel_gradient, default=_of_all_taps)
    return depthwise(jnp.pad(gradient, padding), kernel[::-1]), of_kernel


def _of_all_taps(x: jax.Array, gradient: jax.Array) -> jax.Array:
    steps = shifted(x, x.shape[1] - gradient.shape[1] + 1)
    return jnp.stack([jnp.sum(step * gradient, (0, 1)) for step in steps])


depthwise.defvjp(lambda x, kernel: (depthwise(x, kernel), (x, kernel)), _gradients)

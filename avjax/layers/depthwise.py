"""Convolution over time of every channel by itself, with gradients of its own."""

import jax
import jax.numpy as jnp

from avjax.layers import cpu


def shifted(x: jax.Array, kernel: int) -> list[jax.Array]:
    """The first, second, … step of every window of `kernel` steps of x (b, n, d): each (b, n - kernel + 1, d)."""
    length = x.shape[1] - kernel + 1
    return [x[:, i : i + length] for i in range(kernel)]


@jax.custom_vjp
def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Every channel of x (b, n, d) with its own weights of `kernel` (k, d): (b, n - k + 1, d).

    With gradients of its own: a step of JAX's takes three to four times as long on a CPU (width 512, k = 31).
    """
    return sum(step * weight for step, weight in zip(shifted(x, len(kernel)), kernel[:, None, None], strict=True))


def _gradients(given: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = given
    around = ((0, 0), (len(kernel) - 1, len(kernel) - 1), (0, 0))
    # Elsewhere at once: of a loop over devices that share the clips each turn would be a message to the others.
    of_kernel = jax.lax.platform_dependent(x, gradient, cpu=cpu.depthwise_kernel_gradient, default=_of_all_taps)
    return depthwise(jnp.pad(gradient, around), kernel[::-1]), of_kernel


def _of_all_taps(x: jax.Array, gradient: jax.Array) -> jax.Array:
    steps = shifted(x, x.shape[1] - gradient.shape[1] + 1)
    return jnp.stack([jnp.sum(step * gradient, (0, 1)) for step in steps])


depthwise.defvjp(lambda x, kernel: (depthwise(x, kernel), (x, kernel)), _gradients)

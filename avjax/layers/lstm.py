"""LSTM with a custom gradient: that of the kernel is one product over all steps.

`jax.grad` would add up that gradient step by step, which for a few clips costs more than all the rest. Shapes: n step,
b clip, d width. The gates are concatenated: input, forget, candidate, output.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers.linear import Project

States = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def lstm(inputs: jax.Array, real: jax.Array, kernel: jax.Array, reverse: bool) -> States:
    """Computes the hidden and cell state after each step, (n, b, d) float32 each; masked steps keep the state.

    Products have the dtype of the inputs. Only reverse mode can be differentiated.

    Args:
      inputs: (n, b, 4 d), the projected inputs of the gates.
      real: (n, b) bool.
      kernel: (d, 4 d) float32, the map from hidden state to gates.
      reverse: whether to run from the last step to the first.
    """
    return _forward(inputs, real, kernel, reverse)[0]


def _forward(inputs: jax.Array, real: jax.Array, kernel: jax.Array, reverse: bool) -> tuple[States, jax.Array]:
    """Computes the states, and the gates (n, b, 4 d) float32 after their sigmoids and tanh."""
    kernel = kernel.astype(inputs.dtype)

    def step(state: Any, now: Any) -> tuple[Any, Any]:
        (hidden, cell), (projected, real) = state, now
        gates = (projected + hidden.astype(projected.dtype) @ kernel).astype(jnp.float32)
        admit, keep, candidate, emit = jnp.split(gates, 4, -1)
        admit, keep, emit = (jax.nn.sigmoid(gate) for gate in (admit, keep, emit))
        candidate = jnp.tanh(candidate)
        new = jnp.where(real[:, None], keep * cell + admit * candidate, cell)
        state = jnp.where(real[:, None], emit * jnp.tanh(new), hidden), new
        return state, (state, jnp.concatenate([admit, keep, candidate, emit], -1))

    zeros = jnp.zeros((inputs.shape[1], kernel.shape[0]), jnp.float32)
    return jax.lax.scan(step, (zeros, zeros), (inputs, real), reverse=reverse)[1]


def _kept(inputs: jax.Array, real: jax.Array, kernel: jax.Array, reverse: bool) -> tuple[States, Any]:
    states, gates = _forward(inputs, real, kernel, reverse)
    # Only the dtype of the inputs is needed.
    return states, (inputs[:0], real, kernel, gates, *states)


def _backward(reverse: bool, kept: Any, grads: States) -> tuple[jax.Array, None, jax.Array]:
    inputs, real, kernel, gates, hidden, cell = kept
    turned = kernel.T.astype(inputs.dtype)

    def step(behind: Any, now: Any) -> tuple[Any, Any]:
        own, real, *states = now
        of_hidden, of_cell = (x + y for x, y in zip(behind, own, strict=True))
        of_gates, through = _through_gates(of_hidden, of_cell, *states)
        of_gates = jnp.where(real[:, None], of_gates, 0).astype(inputs.dtype)
        below = (of_gates @ turned).astype(jnp.float32)
        return (jnp.where(real[:, None], below, of_hidden), jnp.where(real[:, None], through, of_cell)), of_gates

    start = jnp.zeros_like(hidden[0]), jnp.zeros_like(cell[0])
    steps = grads, real, gates, cell, _before(cell, reverse)
    _, of_gates = jax.lax.scan(step, start, steps, reverse=not reverse)
    previous = _before(hidden, reverse).astype(inputs.dtype)
    return of_gates, None, jnp.einsum("nbd,nbg->dg", previous, of_gates, preferred_element_type=jnp.float32)


def _through_gates(
    of_hidden: jax.Array, of_cell: jax.Array, gates: jax.Array, cell: jax.Array, before: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes gradients of the gates before their activations, (b, 4 d), and of the previous cell state (b, d)."""
    admit, keep, candidate, emit = jnp.split(gates, 4, -1)
    squashed = jnp.tanh(cell)
    of_cell += of_hidden * emit * (1 - squashed**2)
    of_gates = (
        of_cell * candidate * admit * (1 - admit),
        of_cell * before * keep * (1 - keep),
        of_cell * admit * (1 - candidate**2),
        of_hidden * squashed * emit * (1 - emit),
    )
    return jnp.concatenate(of_gates, -1), of_cell * keep


def _before(states: jax.Array, reverse: bool) -> jax.Array:
    """Returns the state before each step."""
    zeros = jnp.zeros_like(states[:1])
    return jnp.concatenate([states[1:], zeros] if reverse else [zeros, states[:-1]])


lstm.defvjp(_kept, _backward)


class Recurrence(nn.Module):
    """LSTM (Hochreiter and Schmidhuber 1997) over the real steps of a sequence; masked steps keep the state.

    So a backward LSTM (`reverse`) starts at the last real step, and padding has no effect. The gates are in PyTorch's
    order: input, forget, candidate, output; its two biases are merged into one. The state is float32.
    """

    width: int
    reverse: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps x (b, n, d) under mask (b, n) to the hidden and the cell state after each step, (b, n, width) each.

        The final state is at index -1, or at 0 if `reverse`: zeros for a clip without a real step.
        """
        x = jnp.where(mask[..., None], x, 0)
        inputs = Project((4, self.width), dtype=self.dtype, name="input")(x)  # b n 4 d
        # PyTorch's initialisation, uniform within 1 / sqrt(width). An orthogonal one needs a QR decomposition, and on
        # two cores those of several lanes deadlock (jaxlib 0.10's batched LAPACK calls share one pool).
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        kernel = self.param("kernel", init, (self.width, 4 * self.width))
        over_time = jnp.moveaxis(inputs.reshape(*x.shape[:2], 4 * self.width), 1, 0)
        hidden, cell = lstm(over_time, mask.T, kernel, self.reverse)
        return jnp.moveaxis(hidden, 0, 1), jnp.moveaxis(cell, 0, 1)


class LstmEncoder(nn.Module):
    """An LSTM over the real steps of a stream, with a backward one if `bidirectional`."""

    width: int
    bidirectional: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps x (b, n, w) under mask (b, n) to the states after each step (b, n, d) and the final states (b, d).

        d is `width`, or twice that if bidirectional. States are in `dtype`, and zeros for a clip without a real step.
        """
        states, _ = Recurrence(self.width, dtype=self.dtype, name="forth")(x, mask)
        last = states[:, -1]
        if self.bidirectional:
            behind, _ = Recurrence(self.width, reverse=True, dtype=self.dtype, name="back")(x, mask)
            states, last = jnp.concatenate([states, behind], -1), jnp.concatenate([last, behind[:, 0]], -1)
        return states.astype(self.dtype), last.astype(self.dtype)

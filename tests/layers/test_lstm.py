"""The recurrence's own gradient is that of the sums it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.layers.lstm import lstm

STEPS, CLIPS, WIDTH = 5, 3, 4


def plain(inputs, real, kernel, reverse):
    """The same step by step, left to `jax.grad`."""
    hidden = cell = jnp.zeros((CLIPS, WIDTH))
    states = {}
    for t in range(STEPS)[:: -1 if reverse else 1]:
        admit, keep, candidate, emit = jnp.split(inputs[t] + hidden @ kernel, 4, -1)
        new = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(admit) * jnp.tanh(candidate)
        after = jax.nn.sigmoid(emit) * jnp.tanh(new)
        hidden, cell = (jnp.where(real[t][:, None], x, y) for x, y in ((after, hidden), (new, cell)))
        states[t] = hidden, cell
    return tuple(jnp.stack(x) for x in zip(*(states[t] for t in range(STEPS)), strict=True))


def given(dtype=jnp.float32):
    """Inputs, which steps are real, kernel, and factors of the states in a sum; one clip has no real step."""
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (STEPS, CLIPS, 4 * WIDTH), dtype)
    real = jnp.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool).T
    return (
        inputs,
        real,
        jax.random.normal(keys[1], (WIDTH, 4 * WIDTH)),
        jax.random.normal(keys[2], (2, STEPS, CLIPS, 1)),
    )


def gradients(form, inputs, real, kernel, factors, reverse):
    total = lambda x, k: jnp.sum(factors * jnp.stack(form(x, real, k, reverse)))  # noqa: E731
    return jax.value_and_grad(total, (0, 1))(inputs, kernel)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_the_sums(reverse):
    got, want = (gradients(form, *given(), reverse) for form in (lstm, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_lanes_have_each_its_own_gradient():
    inputs, real, kernel, factors = given()
    kernels = jnp.stack([kernel, -0.5 * kernel])
    alone = [gradients(lstm, inputs, real, k, factors, False) for k in kernels]
    among = jax.vmap(lambda k: gradients(lstm, inputs, real, k, factors, False))(kernels)
    for i, want in enumerate(alone):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5), among, want)


def test_states_and_the_gradient_of_the_kernel_stay_in_float32():
    inputs, real, kernel, factors = given(jnp.bfloat16)
    _, (of_inputs, of_kernel) = gradients(lstm, inputs, real, kernel, factors, False)
    _, (_, want) = gradients(plain, inputs.astype(jnp.float32), real, kernel, factors, False)
    assert {x.dtype for x in lstm(inputs, real, kernel, False)} == {jnp.dtype(jnp.float32)}
    assert (of_inputs.dtype, of_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(of_kernel, want, atol=0.05 * np.abs(want).max())

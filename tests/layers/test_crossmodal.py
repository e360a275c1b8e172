"""Crossmodal transformers: the future that is hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import layers
from avjax.layers import crossmodal


def test_the_future_is_hidden_by_the_clips_own_lengths():
    queries = np.array([[1, 1, 1, 0], [0, 1, 1, 0]], bool)
    keys = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    want = np.zeros((2, 4, 5), bool)
    for p in range(3):
        want[0, p, : p + 1 + 2] = True  # five keys for three queries: two steps ahead
    want[1, 1, :1], want[1, 2, :2] = True, True  # two each: its own past and no more
    got = np.asarray(crossmodal.no_future(queries, keys))
    np.testing.assert_array_equal(got[queries], want[queries])


@pytest.mark.parametrize("causal", [True, False])
def test_the_first_step_sees_the_last_one_only_without_the_causal_mask(causal):
    encoder = layers.CrossmodalEncoder(1, 2, causal=causal)
    x, mask = jax.random.normal(jax.random.key(0), (1, 4, 8)), jnp.ones((1, 4), bool)
    variables = jax.jit(encoder.init)(jax.random.key(1), x, mask)
    apply = jax.jit(encoder.apply)
    moved = jnp.abs(apply(variables, x, mask) - apply(variables, x.at[:, 3].add(jnp.arange(8.0)[None]), mask))[0, 0]
    assert (float(moved.max()) > 1e-4) is not causal

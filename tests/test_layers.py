"""Layers: the two ways of attention agree, whatever is masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import layers

KEYS = jax.random.split(jax.random.key(0), 3)
QUERY, KEY, VALUE = (jax.random.normal(k, (3, n, 2, 4)) for k, n in zip(KEYS, (5, 7, 7), strict=True))
MASK = jnp.arange(7)[None] < jnp.array([[7], [3], [0]])


@pytest.mark.parametrize("jitted", [True, False])
def test_context_without_weights_is_that_with_them(jitted):
    want, weights = layers.attend(QUERY, KEY, VALUE, MASK)
    got = (jax.jit(layers.attended) if jitted else layers.attended)(QUERY, KEY, VALUE, MASK)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert not got[2].any(), "nothing may be attended to"
    np.testing.assert_allclose(weights.sum(-1), np.array([1, 1, 0])[:, None, None] * np.ones((3, 2, 5)), atol=1e-6)


def test_gradients_agree_and_are_finite_where_nothing_may_be_attended_to():
    def total(f):
        return lambda *qkv: jnp.sum(jnp.sin(f(*qkv, MASK)))

    ours = jax.grad(total(layers.attended), (0, 1, 2))(QUERY, KEY, VALUE)
    theirs = jax.grad(total(lambda *a: layers.attend(*a)[0]), (0, 1, 2))(QUERY, KEY, VALUE)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.isfinite(a).all()


def test_layer_scale_and_missing_biases_are_params():
    block = layers.PreNormBlock(2, 6, jax.nn.relu, 1e-6, unbiased=("key",), scaled=True)
    x = jnp.ones((1, 3, 4))
    params = block.init(jax.random.key(0), x, jnp.ones((1, 3), bool))["params"]
    assert params["attention"]["key"].keys() == {"kernel"}
    assert params["attention"]["query"].keys() == {"kernel", "bias"}
    off = params | {"attention_scale": jnp.zeros(4), "feed_forward_scale": jnp.zeros(4)}
    np.testing.assert_array_equal(block.apply({"params": off}, x, jnp.ones((1, 3), bool)), x)

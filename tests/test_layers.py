"""Layers: the two ways of attention agree with each other and with plain loops, whatever is masked."""

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


@pytest.mark.parametrize("mask", [MASK, layers.causal(MASK)[:, :5]], ids=["of keys", "of queries and keys"])
def test_gradients_agree_and_are_finite_where_nothing_may_be_attended_to(mask):
    def total(f):
        return lambda *qkv: jnp.sum(jnp.sin(f(*qkv, mask)))

    ours = jax.grad(total(layers.attended), (0, 1, 2))(QUERY, KEY, VALUE)
    theirs = jax.grad(total(lambda *a: layers.attend(*a)[0]), (0, 1, 2))(QUERY, KEY, VALUE)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.isfinite(a).all()


def by_loops(mask):
    """Softmax attention over the admitted keys, one number after another."""
    context = np.zeros(QUERY.shape)
    for b, q, h in np.ndindex(QUERY.shape[:3]):
        admitted = np.flatnonzero(mask[b, q])
        if admitted.size:
            weights = np.exp(KEY[b, admitted, h] @ QUERY[b, q, h] / 2)  # 2 = the root of the width 4
            context[b, q, h] = weights / weights.sum() @ VALUE[b, admitted, h]
    return context


@pytest.mark.parametrize("jitted", [True, False])
def test_every_query_may_have_keys_of_its_own(jitted):
    mask = np.random.default_rng(0).random((3, 5, 7)) < 0.4
    mask[1, 2] = False
    want = by_loops(mask)
    got = (jax.jit(layers.attended) if jitted else layers.attended)(QUERY, KEY, VALUE, mask)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert not got[1, 2].any(), "nothing may be attended to"
    context, weights = layers.attend(QUERY, KEY, VALUE, mask)
    np.testing.assert_allclose(context, want, atol=1e-5)
    np.testing.assert_array_equal(weights > 0, np.repeat(mask[:, None], 2, 1))


def test_causal_masks_admit_the_real_past_alone():
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    got = layers.causal(mask)
    for b, query, key in np.ndindex(got.shape):
        assert got[b, query, key] == (key <= query and mask[b, key])


def test_no_step_of_a_causal_block_sees_what_follows():
    block = layers.PreNormBlock(2, 6, jax.nn.relu, 1e-6)
    x, other = jax.random.normal(jax.random.key(0), (2, 1, 5, 4))
    past = layers.causal(jnp.ones((1, 5), bool))
    variables = jax.jit(block.init)(jax.random.key(1), x, past)
    apply = jax.jit(block.apply)
    before = apply(variables, x, past)
    after = apply(variables, jnp.concatenate([x[:, :3], other[:, 3:]], 1), past)
    np.testing.assert_allclose(after[:, :3], before[:, :3], atol=1e-6)
    assert (np.abs(after - before)[:, 3:].max(-1) > 1e-3).all()


def test_layer_scale_and_missing_biases_are_params():
    block = layers.PreNormBlock(2, 6, jax.nn.relu, 1e-6, unbiased=("key",), scaled=True)
    x = jnp.ones((1, 3, 4))
    params = block.init(jax.random.key(0), x, jnp.ones((1, 3), bool))["params"]
    assert params["attention"]["key"].keys() == {"kernel"}
    assert params["attention"]["query"].keys() == {"kernel", "bias"}
    off = params | {"attention_scale": jnp.zeros(4), "feed_forward_scale": jnp.zeros(4)}
    np.testing.assert_array_equal(block.apply({"params": off}, x, jnp.ones((1, 3), bool)), x)

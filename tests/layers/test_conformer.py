"""Conformer: relative attention against plain loops, padding that changes nothing, statistics that count real steps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.layers import ConformerBlock, StepNorm, interleaved_sinusoids, pack, unpack
from avjax.layers.conformer import RelativeAttention

X = np.random.default_rng(0).normal(size=(3, 9, 8)).astype(np.float32)
MASK = np.arange(9)[None] < np.array([[9], [5], [0]])


def block(**settings) -> ConformerBlock:
    return ConformerBlock(heads=2, kernel=5, **settings)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(block().init)(jax.random.key(0), X, MASK)


def test_sinusoids_are_sine_and_cosine_in_turn():
    waves = interleaved_sinusoids(np.array([-3, 0, 2]), 4)
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in (-3, 0, 2)]
    np.testing.assert_allclose(waves, expected, atol=1e-6)


def test_scores_are_those_of_transformer_xl():
    """A float64 loop over queries, keys and their offsets i - j, for one clip of five steps of which four are real."""
    x, mask = X[:1, :5, :4], np.array([[True, True, True, True, False]])
    module = RelativeAttention(heads=2)
    params = module.init(jax.random.key(1), x, mask)["params"]
    weight = jax.tree.map(np.float64, params)
    value = np.zeros((5, 2, 2))
    for h in range(2):
        maps = {k: weight[k]["kernel"][:, h] for k in ("query", "key", "value", "position")}
        for i in range(5):
            query, scores = x[0, i] @ maps["query"], []
            for j in range(4):
                embedded = interleaved_sinusoids(np.array([i - j]), 4)[0] @ maps["position"]
                score = (query + weight["content_bias"][h]) @ (x[0, j] @ maps["key"])
                scores.append(math.exp((score + (query + weight["position_bias"][h]) @ embedded) / math.sqrt(2)))
            value[i, h] = sum(s / sum(scores) * (x[0, j] @ maps["value"]) for j, s in enumerate(scores))
    expected = np.einsum("nhd,hdw->nw", value, weight["out"]["kernel"])
    np.testing.assert_allclose(module.apply({"params": params}, x, mask)[0], expected, atol=1e-5)


def test_only_the_legacy_form_depends_on_padding(variables):
    longer = np.concatenate([np.where(MASK[..., None], X, np.nan), np.full((3, 4, 8), np.nan, np.float32)], 1)
    longer_mask = np.concatenate([MASK, np.zeros((3, 4), bool)], 1)
    apart = {}
    for legacy in (False, True):
        apply = jax.jit(block(legacy_relative=legacy).apply)
        short, long = apply(variables, X, MASK), apply(variables, longer, longer_mask)
        assert not long[~longer_mask].any()
        assert not short[~MASK].any()
        apart[legacy] = float(jnp.abs(short - long[:, :9]).max())
    assert apart[False] < 1e-5
    assert apart[True] > 1e-2


def test_gradients_under_false_are_zero(variables):
    rubbish = np.where(MASK[..., None], X, np.nan)
    total = lambda v, x: jnp.sum(jnp.sin(block().apply(v, x, MASK)))  # noqa: E731
    params, x = jax.jit(jax.grad(total, (0, 1)))(variables, rubbish)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(params))
    assert not x[~MASK].any()
    assert x[MASK].any()


def test_pack_moves_real_steps_to_the_front():
    mask = np.array([[False, True, False, True, True], [False] * 5])
    x = np.where(mask, np.arange(10.0).reshape(2, 5), np.nan)[..., None]
    packed, front = pack(jnp.float32(x), jnp.asarray(mask))
    np.testing.assert_array_equal(packed[..., 0], [[1, 3, 4, 0, 0], [0] * 5])
    np.testing.assert_array_equal(front, [[True, True, True, False, False], [False] * 5])


def test_unpack_moves_them_back():
    mask = np.array([[False, True, False, True, True], [False] * 5, [True] * 5])
    x = np.where(mask, np.arange(15.0).reshape(3, 5), np.nan)[..., None]
    packed, front = pack(jnp.float32(x), jnp.asarray(mask))
    rubbish = jnp.where(front[..., None], packed, jnp.nan)
    np.testing.assert_array_equal(unpack(rubbish, mask), np.where(mask[..., None], x, 0))
    gradient = jax.grad(lambda y: jnp.sum(unpack(y, mask) * 2))(rubbish)
    np.testing.assert_array_equal(gradient[..., 0], 2 * front)


def test_statistics_move_towards_real_steps_only_if_they_may():
    module = StepNorm()
    variables = module.init(jax.random.key(0), X, MASK)
    kept = module.apply(variables, X, MASK)
    np.testing.assert_allclose(kept, X / math.sqrt(1 + 1e-5), rtol=1e-5)
    rubbish = np.where(MASK[..., None], X, 1e3)
    normed, moved = module.apply(variables, rubbish, MASK, mutable=["batch_stats"])
    real = X[MASK]
    np.testing.assert_allclose(moved["batch_stats"]["mean"], 0.1 * real.mean(0), atol=1e-5)
    np.testing.assert_allclose(moved["batch_stats"]["var"], 0.9 + 0.1 * real.var(0), atol=1e-4)
    np.testing.assert_allclose(normed[MASK], (real - real.mean(0)) / np.sqrt(real.var(0) + 1e-5), atol=1e-3)


def test_a_batch_without_real_steps_leaves_the_statistics_finite():
    module = StepNorm()
    variables = module.init(jax.random.key(0), X, MASK)
    moved = module.apply(variables, X, np.zeros_like(MASK), mutable=["batch_stats"])[1]
    assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves(moved))


def test_dropout_acts_in_training_only(variables):
    module = block(dropout=0.5)
    apply = jax.jit(module.apply, static_argnames="train")
    calm = apply(variables, X, MASK)
    one, two = (apply(variables, X, MASK, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert not np.allclose(one, two)
    assert not np.allclose(one, calm)

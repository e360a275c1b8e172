"""EfficientFace: the order of its channels and quarters, its gates, its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.models import efficientface
from avjax.models.efficientface import EfficientFace

IMAGES = np.random.default_rng(0).random((2, 32, 48, 3), np.float32)


def small() -> EfficientFace:
    return EfficientFace(stem=4, stages=(16, 16), repeats=(2, 1), width=8)


def test_parameter_count():
    """As listed for the released AVT-CA: `visual_model` without its sequence convolutions and classifier."""
    shapes = jax.eval_shape(EfficientFace().init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    count = {k: sum(v.size for v in jax.tree.leaves(tree)) for k, tree in shapes.items()}
    assert count == {"params": 1_268_118, "batch_stats": 18_112}


def test_channels_are_interleaved_and_half_of_them_pass():
    unit = efficientface.ShuffleUnit(8, 1)
    x = jnp.asarray(IMAGES[:, :4, :4, :1] * np.arange(1, 9, dtype=np.float32))
    variables = unit.init(jax.random.key(0), x)
    np.testing.assert_array_equal(unit.apply(variables, x)[..., ::2], x[..., :4])


def test_each_quarter_has_its_place_and_its_weights():
    local = efficientface.LocalFeatures(6)
    x = jnp.asarray(IMAGES)
    variables = local.init(jax.random.key(0), x)
    full = local.apply(variables, x)
    assert full.shape == (2, 16, 24, 6)
    changed = local.apply(variables, x.at[:, 16:, :24].add(1.0))  # bottom left
    moved = np.asarray(jnp.abs(changed - full).max((0, -1)) > 0)
    assert moved[8:, :12].any()
    assert not moved[:8].any()
    assert not moved[:, 12:].any()
    same = jnp.tile(x[:, :16, :24], (1, 2, 2, 1))
    parts = local.apply(variables, same)
    assert not np.allclose(parts[:, :8, :12], parts[:, 8:, :12])


def test_the_gate_is_the_sigmoid_of_a_product():
    modulator = efficientface.Modulator(reduction=4)
    x = jnp.asarray(IMAGES[..., :1] * np.ones(8, np.float32))
    variables = modulator.init(jax.random.key(0), x)
    gates = {"channel_out": {"kernel": jnp.zeros((1, 1, 2, 8)), "bias": jnp.arange(8.0)}}
    gates |= {"place_out": {"kernel": jnp.zeros((1, 1, 2, 1)), "bias": jnp.array([-0.5])}}
    output = modulator.apply({**variables, "params": variables["params"] | gates}, x)
    np.testing.assert_allclose(
        output, x / (1 + np.exp(0.5 * np.arange(8.0, dtype=np.float32))[None, None, None]), rtol=1e-5
    )


@pytest.mark.slow
def test_pictures_do_not_know_of_each_other_and_statistics_stay():
    module = small()
    variables = jax.jit(module.init)(jax.random.key(0), IMAGES)
    apply = jax.jit(lambda v, x: module.apply(v, x, mutable=["batch_stats"]))
    together, moved = apply(variables, IMAGES)
    swapped, _ = apply(variables, IMAGES[::-1].copy())
    np.testing.assert_allclose(together, swapped[::-1], atol=1e-6)
    changed, _ = apply(variables, np.stack([IMAGES[0], np.zeros_like(IMAGES[1])]))
    np.testing.assert_allclose(together[0], changed[0], atol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), moved["batch_stats"], variables["batch_stats"]))
    assert 0.05 < float(together.std()) < 20, "untrained statistics of 0 and 1 keep the scale"


@pytest.mark.parametrize("size", [(30, 32), (32, 40)])
def test_sizes_that_do_not_fit_are_named(size):
    with pytest.raises(AvjaxError, match=rf"frames of {size[0]} x {size[1]} pixels.*multiples of 16"):
        small().init(jax.random.key(0), jnp.zeros((1, *size, 3)))

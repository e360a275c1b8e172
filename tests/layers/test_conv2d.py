"""Convolutions over images equal those of Flax, and so do their gradients, on all code paths."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.layers import FrameConvolution, conv2d, cpu, halved

jitted = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
WAYS = (cpu.convolve2d, conv2d.convolve)
# Sides, channels, width, settings.
LAYERS = {
    "usual": ((6, 7), 3, 5, {}),
    "many channels": ((5, 4), 18, 4, {}),
    "halved, many channels": ((7, 6), 16, 4, {"stride": 2}),
    "halved": ((6, 7), 3, 4, {"stride": 2}),
    "one pixel": ((4, 5), 3, 6, {"kernel": 1}),
    "one pixel, halved": ((4, 5), 17, 3, {"kernel": 1, "stride": 2}),
    "dilated and halved": ((9, 6), 2, 3, {"dilation": 4, "stride": 2}),
    "channelwise": ((6, 5), 3, 3, {"channelwise": True}),
    "channelwise, halved": ((6, 5), 17, 17, {"channelwise": True, "stride": 2}),
    "channelwise, four of each": ((5, 6), 2, 8, {"channelwise": True}),
    "channelwise, dilated": ((9, 9), 3, 12, {"channelwise": True, "dilation": 4, "bias": False}),
    "wide window": ((8, 3), 3, 2, {"kernel": 7, "stride": 2, "bias": False}),
    "smaller than its window": ((1, 2), 3, 2, {"dilation": 4}),
}

# One for each way that the programs differ.
USUAL = ("usual", "halved, many channels", "channelwise, four of each", "dilated and halved", "smaller than its window")


def window(way, layer) -> dict:
    """What a way of convolving is given beside the arrays."""
    shared = {"stride": layer.stride, "dilation": layer.dilation}
    return shared | ({"channelwise": layer.channelwise} if way is cpu.convolve2d else {})


def flax_convolution(layer, channels):
    around = layer.kernel // 2 * layer.dilation
    return nn.Conv(
        layer.width,
        (layer.kernel,) * 2,
        (layer.stride,) * 2,
        padding=((around,) * 2,) * 2,
        kernel_dilation=(layer.dilation,) * 2,
        feature_group_count=channels if layer.channelwise else 1,
        use_bias=layer.bias,
    )


def answer_and_gradients(apply, params, x):
    """With random cotangents, so that an error at any pixel shows."""
    y, pull = jax.vjp(apply, params, x)
    return y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] * (name not in USUAL)) for name in LAYERS]
)
def test_convolution_is_that_of_flax_both_ways(name):
    sides, channels, width, settings = LAYERS[name]
    layer = FrameConvolution(width, **settings)
    peer = flax_convolution(layer, channels)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *sides, channels)).astype(np.float32)
    shapes = jax.eval_shape(peer.init, jax.random.key(0), x)["params"]
    assert jax.eval_shape(layer.init, jax.random.key(0), x)["params"] == shapes
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)

    def by(way):
        def apply(params, x):
            y = functools.partial(way, **window(way, layer))(x, params["kernel"])
            return y + params["bias"][None, None, None] if layer.bias else y

        return apply

    applied = [lambda p, x: peer.apply({"params": p}, x), lambda p, x: layer.apply({"params": p}, x), *map(by, WAYS)]
    want, *others = jitted(lambda p, x: [answer_and_gradients(apply, p, x) for apply in applied])(params, x)
    assert want[0].shape == (2, *(-(-side // layer.stride) for side in sides), width)
    for got in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


def test_cpus_multiply_and_all_else_convolves():
    layer = FrameConvolution(2)
    x = jnp.ones((1, 4, 4, 3))
    params = layer.init(jax.random.key(0), x)

    def program(platform):
        return jax.jit(layer.apply).trace(params, x).lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.convolution" not in program("cpu")
    for platform in ("cuda", "tpu"):
        assert "stablehlo.convolution" in program(platform)


@pytest.mark.parametrize("way", WAYS)
def test_precision_is_that_asked_for_and_parameters_stay_in_float32(way):
    layer = FrameConvolution(2, dtype=jnp.bfloat16)
    x = jnp.ones((1, 4, 4, 3))
    params = layer.init(jax.random.key(0), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert jax.eval_shape(layer.apply, {"params": params}, x).dtype == jnp.bfloat16
    half = (x.astype(jnp.bfloat16), params["kernel"].astype(jnp.bfloat16))
    assert jax.eval_shape(functools.partial(way, **window(way, layer)), *half).dtype == jnp.bfloat16


@pytest.mark.parametrize("sides", [(6, 4), (5, 4), (6, 3), (5, 7), (1, 1)])
def test_halved_is_the_maximum_of_two_by_two(sides):
    x = jax.nn.relu(jnp.asarray(np.random.default_rng(0).normal(size=(2, *sides, 3)), jnp.float32))
    want = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
    np.testing.assert_array_equal(halved(x), want)

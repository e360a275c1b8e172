"""Tests specific to EfficientNet; parity with the original is in test_parity.py."""

import functools
import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.encoders import efficientnet, formats
from avjax.encoders.efficientnet import EfficientNet, EfficientNetConfig
from avjax.errors import AvjaxError
from tests.originals.efficientnet import KINDS

ORIGINAL = KINDS["efficientnet"]
B2 = {
    "model_type": "efficientnet",
    "width_coefficient": 1.1,
    "depth_coefficient": 1.2,
    "hidden_dim": 1408,
    "image_size": 260,
}
SMALL = {  # three stages of two blocks; stem 4 wide, then 4, 10 and 14
    "model_type": "efficientnet",
    "width_coefficient": 0.1,
    "depth_coefficient": 1.2,
    "depth_divisor": 2,
    "hidden_dim": 128,
    "image_size": 40,
    "in_channels": [32, 40, 100],
    "out_channels": [40, 100, 140],
    "kernel_sizes": [3, 5, 3],
    "strides": [1, 2, 2],
    "expand_ratios": [1, 2, 3],
    "num_block_repeats": [1, 1, 1],
    "batch_norm_eps": 0.2,
}
SAME = SMALL | {"padding": "same"}


def torch_and_transformers():
    torch = pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    return torch, transformers


def original(hub, seed=0):
    torch, transformers = torch_and_transformers()
    torch.manual_seed(seed)
    return ORIGINAL.build(transformers.EfficientNetConfig(**hub))


def state(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def frames(*shape):
    return np.random.default_rng(0).normal(size=(*shape, 3)).astype(np.float32)


def random_params(hub):
    config = EfficientNetConfig.from_hub(hub)
    rng = np.random.default_rng(0)
    return config, jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), efficientnet.shapes(config))


def run(config, params, batch, mask=None, dtype=jnp.float32):
    mask = np.ones(len(batch), bool) if mask is None else mask
    return compiled(config, dtype)({"params": params}, batch, mask)


@functools.cache
def compiled(config, dtype):
    return jax.jit(EfficientNet(config, dtype).apply)


def assert_same(got, want, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


# Layouts of checkpoints


def timm_tensors(hub, seed=0):
    """A checkpoint with timm's names, of the blocks in `hub`, and the number of its convolutions with norms."""
    rng = np.random.default_rng(seed)
    tensors = {}

    def convolution(name, out, incoming, kernel, norm=None):
        tensors[f"{name}.weight"] = rng.normal(size=(out, incoming, kernel, kernel)).astype(np.float32)
        if not norm:
            tensors[f"{name}.bias"] = rng.normal(size=out).astype(np.float32)
            return
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{norm}.{leaf}"] = rng.uniform(0.5, 2, out).astype(np.float32)
        tensors[f"{norm}.num_batches_tracked"] = np.array(7)

    config = EfficientNetConfig.from_hub(hub)
    convolution("conv_stem", config.stem, 3, 3, "bn1")
    width = config.stem
    for block in config.blocks:
        at = f"blocks.{block.index[0]}.{block.index[1]}"
        names = [("conv_dw", "bn1"), ("conv_pw", "bn2")]
        if block.inner != width:
            names = [("conv_dw", "bn2"), ("conv_pwl", "bn3")]
            convolution(f"{at}.conv_pw", block.inner, width, 1, f"{at}.bn1")
        convolution(f"{at}.{names[0][0]}", block.inner, 1, block.kernel, f"{at}.{names[0][1]}")
        convolution(f"{at}.se.conv_reduce", block.squeezed, block.inner, 1)
        convolution(f"{at}.se.conv_expand", block.inner, block.squeezed, 1)
        convolution(f"{at}.{names[1][0]}", block.width, block.inner, 1, f"{at}.{names[1][1]}")
        width = block.width
    convolution("conv_head", config.width, width, 1, "bn2")
    tensors["classifier.weight"] = rng.normal(size=(8, config.width)).astype(np.float32)
    tensors["classifier.bias"] = rng.normal(size=8).astype(np.float32)
    return tensors


def in_hub_names(tensors):
    """The same checkpoint with transformers' names; blocks are numbered in order."""
    positions = sorted({tuple(map(int, m.groups())) for n in tensors if (m := re.match(r"blocks\.(\d+)\.(\d+)\.", n))})
    separable = {p for p in positions if f"blocks.{p[0]}.{p[1]}.conv_pwl.weight" not in tensors}
    renamed = {}
    for name, tensor in tensors.items():
        if match := re.match(r"blocks\.(\d+)\.(\d+)\.(.+)\.(\w+)$", name):
            position, part = tuple(map(int, match.groups()[:2])), match[3]
            projection = {"conv_pw": "conv_pwl", "bn1": "bn2", "bn2": "bn3"}
            part = projection.get(part, part) if position in separable else part
            theirs = {
                "conv_pw": "expansion.expand_conv",
                "bn1": "expansion.expand_bn",
                "conv_dw": "depthwise_conv.depthwise_conv",
                "bn2": "depthwise_conv.depthwise_norm",
                "se.conv_reduce": "squeeze_excite.reduce",
                "se.conv_expand": "squeeze_excite.expand",
                "conv_pwl": "projection.project_conv",
                "bn3": "projection.project_bn",
            }[part]
            name = f"encoder.blocks.{positions.index(position)}.{theirs}.{match[4]}"
        else:
            ends = {
                "conv_stem": "embeddings.convolution",
                "bn1": "embeddings.batchnorm",
                "conv_head": "encoder.top_conv",
                "bn2": "encoder.top_bn",
            }
            module, _, leaf = name.rpartition(".")
            name = f"{ends.get(module, module)}.{leaf}"
        renamed[name] = tensor
    return renamed


def test_a_timm_checkpoint_is_the_original_under_other_names():
    torch, transformers = torch_and_transformers()
    tensors = timm_tensors(SMALL)
    model = transformers.EfficientNetForImageClassification(transformers.EfficientNetConfig(**SMALL, num_labels=8))
    prefixed = {
        n if n.startswith("classifier") else f"efficientnet.{n}": torch.tensor(t)
        for n, t in in_hub_names(tensors).items()
    }
    model.load_state_dict(prefixed)  # strict: every name is the original's
    config = EfficientNetConfig.from_hub(SMALL)
    params = efficientnet.convert(tensors, config)
    assert_same(efficientnet.convert(in_hub_names(tensors), config), params, rtol=0)
    assert_same(efficientnet.convert(state(model), config), params, rtol=0)
    batch = frames(2, 41, 47)
    got, mask = run(config, params, batch)
    want, _ = ORIGINAL.reference(model.efficientnet.eval(), batch, mask)
    assert np.abs(got - want).max() < 1e-4 * want.std()


def exported(folder, tensors, named_by_path, eps, drop=()):
    """An ONNX file as PyTorch exports timm's network: batch norms folded into convolutions, whose names are lost."""
    onnx = pytest.importorskip("onnx", reason="extra media")
    given, nodes = {}, []

    def node(operation, path, *inputs):
        name = f"/{path.replace('.', '/')}/{operation}" if named_by_path else f"{operation}_{len(nodes)}"
        nodes.append(onnx.helper.make_node(operation, ["x", *inputs], [f"y{len(nodes)}"], name=name))

    def anonymous(operation, tensor):
        name = f"onnx::{operation}_{len(given) + 700}" if named_by_path else str(len(given) + 700)
        given[name] = tensor
        return name

    modules = [name.removesuffix(".weight") for name, t in tensors.items() if name.endswith("weight") and t.ndim == 4]
    for module in modules:
        weight = tensors[f"{module}.weight"]
        if f"{module}.bias" in tensors:
            given |= {f"{module}.{leaf}": tensors[f"{module}.{leaf}"] for leaf in ("weight", "bias")}
            node("Conv", module, f"{module}.weight", f"{module}.bias")
            continue
        norm = norm_after(module, tensors)
        factor = tensors[f"{norm}.weight"] / np.sqrt(tensors[f"{norm}.running_var"] + eps)
        bias = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * factor
        node("Pad", module, anonymous("Pad", np.zeros(8, np.int64)))
        if module not in drop:
            node("Conv", module, anonymous("Conv", weight * factor[:, None, None, None]), anonymous("Conv", bias))
    given |= {f"classifier.{leaf}": tensors[f"classifier.{leaf}"] for leaf in ("weight", "bias")}
    node("Gemm", "classifier", "classifier.weight", "classifier.bias")
    initializers = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in given.items()]
    random.Random(0).shuffle(initializers)  # exporters order them by name
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "graph", [], [], initializers))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return formats.read(folder / "model.onnx")


def norm_after(module, tensors):
    at, _, name = module.rpartition(".")
    if not at:
        return {"conv_stem": "bn1", "conv_head": "bn2"}[name]
    expands = f"{at}.conv_pwl.weight" in tensors
    number = {"conv_pw": 1 if expands else 2, "conv_dw": 2 if expands else 1, "conv_pwl": 3}[name]
    return f"{at}.bn{number}"


@pytest.mark.parametrize("named_by_path", [True, False], ids=["since 2022", "before"])
def test_an_onnx_file_has_the_same_params(tmp_path, named_by_path):
    tensors, config = timm_tensors(SAME), EfficientNetConfig.from_hub(SAME)
    got = efficientnet.convert(exported(tmp_path, tensors, named_by_path, config.eps), config)
    assert_same(got, efficientnet.convert(tensors, config), rtol=1e-6, atol=1e-7)


def test_onnx_files_that_do_not_fit_are_refused_by_name(tmp_path):
    tensors, config = timm_tensors(SAME), EfficientNetConfig.from_hub(SAME)
    short = exported(tmp_path, tensors, True, 0.2, drop=["conv_head"])
    with pytest.raises(AvjaxError, match=r"missing: folded\.17\.bias, folded\.17\.weight; left over: none"):
        efficientnet.convert(short, config)
    shifted = exported(tmp_path, tensors, True, 0.2, drop=["blocks.1.0.conv_pw"])
    with pytest.raises(AvjaxError, match=r"missing: folded\.17"):
        efficientnet.convert(shifted, config)
    unnamed = {name.replace("blocks.2.1.se", "gate"): t for name, t in exported(tmp_path, tensors, True, 0.2).items()}
    with pytest.raises(AvjaxError, match=r"missing: blocks\.2\.1\.se\.conv_expand\.bias.*left over: gate\.conv_exp"):
        efficientnet.convert(unnamed, config)


def test_tensors_that_do_not_fit_are_named():
    tensors, config = timm_tensors(SMALL), EfficientNetConfig.from_hub(SMALL)
    without = {name: t for name, t in tensors.items() if name != "blocks.0.0.bn2.running_var"}
    with pytest.raises(AvjaxError, match=r"missing: blocks\.0\.0\.bn2\.running_var; left over: none"):
        efficientnet.convert(without, config)
    with pytest.raises(AvjaxError, match=r"missing: none; left over: conv_tail\.weight"):
        efficientnet.convert(tensors | {"conv_tail.weight": np.ones(2)}, config)
    with pytest.raises(AvjaxError, match=r"conv_head\.weight: shape \(128, 13\) does not fit .* \(14, 128\)"):
        efficientnet.convert(tensors | {"conv_head.weight": np.ones((128, 13, 1, 1))}, config)
    with pytest.raises(AvjaxError, match=r"missing: embeddings\.batchnorm\.bias"):
        efficientnet.convert({}, config)


def test_parameters_of_b2_before_and_after_folding():
    """Of a norm's scale and bias the convolution keeps one number a channel."""
    torch, transformers = torch_and_transformers()
    with torch.device("meta"):
        model = transformers.EfficientNetModel(ORIGINAL.full["EfficientNet B2"][0]())
    before = sum(p.numel() for p in model.parameters())
    normed = sum(b.numel() for name, b in model.named_buffers() if name.endswith("running_mean"))
    config = EfficientNetConfig.from_hub(B2)
    after = sum(leaf.size for leaf in jax.tree.leaves(efficientnet.shapes(config)))
    assert (before, after) == (7_700_994, 7_667_210)
    assert before - after == normed
    assert config.width == 1408


# Padding


def tensorflow_pads(size, kernel, stride):
    """TensorFlow's "SAME": https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2"""
    total = max(kernel - (stride if size % stride == 0 else size % stride), 0)
    return total // 2, total - total // 2


@pytest.mark.parametrize(
    "size", [(41, 50), *(pytest.param(size, marks=pytest.mark.thorough) for size in ((40, 40), (17, 96)))]
)
def test_same_padding_is_tensorflows_at_any_size(size):
    torch, _ = torch_and_transformers()
    model = original(SMALL)

    class Same(torch.nn.Module):
        def __init__(self, kernel):
            super().__init__()
            self.kernel = kernel

        def forward(self, x):
            rows, columns = (tensorflow_pads(n, self.kernel, 2) for n in x.shape[2:])
            return torch.nn.functional.pad(x, (*columns, *rows))

    model.embeddings.padding = Same(3)
    for block in model.encoder.blocks:
        block.depthwise_conv.depthwise_conv_pad = Same(block.depthwise_conv.depthwise_conv.kernel_size[0])
    config = EfficientNetConfig.from_hub(SAME)
    batch = frames(2, *size)
    got, mask = run(config, efficientnet.convert(state(model), config), batch)
    want, _ = ORIGINAL.reference(model, batch, mask)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 1e-4 * want.std()


@pytest.mark.parametrize("name", ORIGINAL.full)
def test_padding_of_the_hubs_configs_is_tensorflows_at_their_size(name):
    torch_and_transformers()
    contents = ORIGINAL.full[name][0]().to_dict()
    config = EfficientNetConfig.from_hub(contents)
    side, strided = config.image_size[0], 0
    for kernel, stride, padding in [
        (3, 2, config.stem_padding),
        *((b.kernel, b.stride, b.padding) for b in config.blocks),
    ]:
        assert padding == (tensorflow_pads(side, kernel, stride),) * 2
        side = -(-side // stride)
        strided += stride == 2
    assert strided == 5
    same = EfficientNetConfig.from_hub(contents | {"padding": "same"})
    assert same.steps(0) == config.steps(0) == side**2


@pytest.mark.parametrize("name", ORIGINAL.full)
@pytest.mark.parametrize(
    "size",
    [(45, 64), *(pytest.param(size, marks=pytest.mark.thorough) for size in ((224, 224), (61, 127), (260, 259)))],
)
def test_the_number_of_features_is_the_originals(name, size):
    torch, transformers = torch_and_transformers()
    contents = ORIGINAL.full[name][0]()
    config = EfficientNetConfig.from_hub(contents.to_dict())
    with torch.device("meta"):
        rows, columns = transformers.EfficientNetModel(contents)(torch.empty(1, 3, *size)).last_hidden_state.shape[2:]
    assert config.grid(*size) == (rows, columns)
    batch, mask = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32), jax.ShapeDtypeStruct((1,), bool)
    params = {"params": efficientnet.shapes(config)}
    features, real = jax.eval_shape(EfficientNet(config).apply, params, batch, mask)
    assert features.shape == (1, rows * columns, config.width)
    assert real.shape == (1, rows * columns)


@pytest.mark.parametrize("padding", ["SAME", ((1, 2), (1, 2)), ((0, 1), (0, 1))])
@pytest.mark.parametrize(("size", "stride"), [((9, 12), 1), ((9, 12), 2), ((10, 7), 2), ((5, 4), 2)])
def test_shifted_sums_are_the_convolution(padding, size, stride):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, 5, 1, 6)).astype(np.float32)
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 6}
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.02)):
        x = rng.normal(size=(2, *size, 6)).astype(dtype)
        want = jax.lax.conv_general_dilated(x.astype(np.float32), kernel, (stride, stride), padding, **layout)
        convolved = jax.jit(lambda *arrays: efficientnet._convolved(*arrays, (stride, stride), padding, **layout))
        got = convolved(x, kernel.astype(dtype))
        assert got.dtype == dtype
        assert np.abs(got.astype(np.float32) - want).max() <= tolerance * np.abs(want).max()


def test_accelerators_get_grouped_convolutions_and_cpus_none():
    config = EfficientNetConfig.from_hub(SMALL)
    batch, mask = jax.ShapeDtypeStruct((2, 40, 40, 3), jnp.float32), jax.ShapeDtypeStruct((2,), bool)
    traced = jax.jit(EfficientNet(config).apply).trace({"params": efficientnet.shapes(config)}, batch, mask)
    lowered = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    convolutions = {platform: text.count("stablehlo.convolution") for platform, text in lowered.items()}
    assert convolutions == {"cpu": 1, "cuda": 1 + len(config.blocks), "tpu": 1 + len(config.blocks)}


# Order, masks, pooling, precision


def test_features_are_row_by_row_and_their_mean_is_the_pooler_output():
    torch, _ = torch_and_transformers()
    model = original(SMALL)
    config = EfficientNetConfig.from_hub(SMALL)
    batch = frames(2, 48, 80)
    got, _ = run(config, efficientnet.convert(state(model), config), batch)
    with torch.no_grad():
        want = model(torch.tensor(batch).permute(0, 3, 1, 2))
    assert config.grid(48, 80) == (6, 10)
    grid = got.reshape(2, 6, 10, config.width).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(grid, want.last_hidden_state, atol=2e-4)
    np.testing.assert_allclose(got.mean(1), want.pooler_output, atol=1e-4)


def test_pictures_under_the_mask_leave_no_trace():
    config, params = random_params(SAME)
    batch, mask = frames(3, 37, 40), np.array([True, False, True])
    want, real = run(config, params, batch, mask)
    np.testing.assert_array_equal(real, np.repeat(mask[:, None], want.shape[1], 1))
    for value in (np.nan, np.inf, -1e30):
        batch[1] = value
        got, _ = run(config, params, batch, mask)
        np.testing.assert_array_equal(got, want)
        nothing, real = run(config, params, np.full_like(batch, value), np.zeros(3, bool))
        assert np.isfinite(nothing).all()
        assert not real.any()
    alone, _ = run(config, params, batch[2:])
    np.testing.assert_allclose(want[2:], alone, rtol=1e-5, atol=1e-5 * want.std())
    assert run(config, params, batch[:0])[0].shape == (0, *want.shape[1:])


def test_features_have_the_dtype_of_the_products_and_params_are_float32():
    config, params = random_params(SMALL)
    assert {leaf.dtype for leaf in jax.tree.leaves(efficientnet.shapes(config))} == {np.dtype("float32")}
    apply = EfficientNet(config, jnp.bfloat16).apply
    features, _ = jax.eval_shape(apply, {"params": params}, frames(1, 40, 40), np.ones(1, bool))
    assert features.dtype == jnp.bfloat16


# Configurations


def test_what_the_paper_settles_may_be_left_out_of_the_config():
    spelt = json.loads(json.dumps(B2 | {k: list(v) for k, v in STAGES.items()} | {"batch_norm_eps": 0.001}))
    config = EfficientNetConfig.from_hub(B2)
    assert EfficientNetConfig.from_hub(spelt) == config
    assert len(config.blocks) == 23
    assert (config.stem, config.layers, config.longest, config.activation) == (32, 0, None, "swish")
    assert EfficientNetConfig.from_hub(B2 | {"image_size": [260, 200]}).image_size == (260, 200)


STAGES = {  # Tan & Le 2019, table 1; its first stage is the stem, its last the top
    "in_channels": (32, 16, 24, 40, 80, 112, 192),
    "out_channels": (16, 24, 40, 80, 112, 192, 320),
    "kernel_sizes": (3, 3, 5, 3, 5, 5, 3),
    "strides": (1, 2, 2, 2, 1, 2, 1),
    "expand_ratios": (1, 6, 6, 6, 6, 6, 6),
    "num_block_repeats": (1, 2, 2, 3, 3, 4, 1),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding": "valid"}, "padding is 'valid' .* expected 'same', or none"),
        ({"hidden_dim": 1280}, "hidden_dim is 1280 .* expected the top's 1408"),
        ({"num_channels": 1}, "num_channels is 1 .* RGB"),
        ({"strides": [1, 2, 3, 2, 1, 2, 1]}, r"strides is \[1, 2, 3.* expected 1 or 2"),
        ({"kernel_sizes": [3, 3, 4, 3, 5, 5, 3]}, "kernel_sizes is .* expected odd numbers from 3"),
        ({"kernel_sizes": [3, 3, 1, 3, 5, 5, 3]}, "kernel_sizes is .* expected odd numbers from 3"),
        ({"expand_ratios": [1, 6]}, "numbers of stages differ .*'expand_ratios': 2"),
        ({"hidden_act": "snake"}, "activation 'snake' is not known"),
    ],
)
def test_variants_that_are_not_computed_are_refused(change, message):
    with pytest.raises(AvjaxError, match=message):
        efficientnet.build(B2 | change, jnp.float32, None)


def test_incomplete_configs_and_layers_are_refused():
    with pytest.raises(AvjaxError, match=r"config\.json of a efficientnet lacks width_coefficient, image_size"):
        efficientnet.build(
            {k: v for k, v in B2.items() if k not in ("width_coefficient", "image_size")}, jnp.float32, None
        )
    with pytest.raises(AvjaxError, match="layer is 0, but an efficientnet gives its last features only"):
        efficientnet.build(B2, jnp.float32, 0)


@pytest.mark.parametrize(("hub", "size"), [(SMALL, (1, 40, 3)), (SAME, (40, 0, 3)), (SMALL, (40, 40, 4))])
def test_pictures_without_a_single_place_or_of_other_channels_are_refused(hub, size):
    config, params = random_params(hub)
    with pytest.raises(AvjaxError, match=re.escape(f"images {size}: expected (height, width, 3)")):
        run(config, params, np.zeros((1, *size), np.float32))


# Preprocessing


def test_prepare_fills_in_what_the_originals_processor_does():
    torch_and_transformers()
    from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

    raw = np.random.default_rng(0).integers(0, 256, (2, 50, 61, 3), np.uint8)
    for settings in ({}, {"size": {"height": 224, "width": 224}, "resample": 2, "include_top": False}):
        want = EfficientNetImageProcessorPil(**settings)(list(raw), return_tensors="np")["pixel_values"]
        got, mask = efficientnet.prepare(raw, settings)
        np.testing.assert_allclose(got, want.transpose(0, 2, 3, 1), rtol=0, atol=2e-6)
        assert mask.tolist() == [True, True]


def test_prepare_as_hsemotion_does():
    """Bilinear to a square, between 0 and 1, ImageNet's mean and standard deviation."""
    settings = {
        "size": 8,
        "resample": 2,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "include_top": False,
    }
    grey = np.full((1, 20, 30, 3), 51, np.uint8)
    got, _ = efficientnet.prepare(grey, settings)
    want = (0.2 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(got, np.broadcast_to(want, (1, 8, 8, 3)), rtol=1e-5)

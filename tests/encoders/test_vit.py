"""Tests specific to vision transformers; parity with the originals is in test_parity.py."""

import dataclasses
import functools
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import encoders
from avjax.encoders import formats, vit, weights
from avjax.encoders.vit import ViTConfig
from avjax.errors import AvjaxError
from tests.originals import stirred
from tests.originals.vit import KINDS

VIT = {
    "model_type": "vit",
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 12,
    "patch_size": 4,
}
DINO = {k: v for k, v in VIT.items() if k != "intermediate_size"} | {"model_type": "dinov2", "mlp_ratio": 3}

every_kind = pytest.mark.parametrize("kind", ["vit", "dinov2"])


def torch_and_transformers():
    pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    return transformers


def frames(*shape):
    return np.random.default_rng(0).normal(size=(*shape, 3)).astype(np.float32)


def initial(hub, layer=None, dtype=jnp.float32):
    """A module and random params for it."""
    module = vit.build(hub, dtype, layer)
    frame = jax.ShapeDtypeStruct((1, hub["image_size"], hub["image_size"], 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), frame, jax.ShapeDtypeStruct((1,), bool))
    rng = np.random.default_rng(0)
    return module, jax.tree.map(lambda leaf: rng.normal(0.3, 0.3, leaf.shape).astype(leaf.dtype), shapes)


@functools.cache
def compiled(kind, layer=None):
    """A compiled network of a kind, random params for it, and its module."""
    module, variables = initial({"vit": VIT, "dinov2": DINO}[kind], layer)
    return jax.jit(module.apply), variables, module


def saved(model, folder):
    """The tensors in the checkpoint file of a PyTorch model."""
    model.save_pretrained(folder)
    return formats.read(folder / "model.safetensors")


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


# Images of other sizes


@pytest.mark.parametrize(
    "grid", [(1, 50), *(pytest.param(grid, marks=pytest.mark.thorough) for grid in ((16, 16), (37, 37), (74, 9)))]
)
def test_positions_of_dinov2_are_interpolated_as_in_the_original(tmp_path, grid):
    transformers = torch_and_transformers()
    hub = DINO | {"image_size": 37 * 2, "patch_size": 2}
    model = stirred(transformers.Dinov2Model(transformers.Dinov2Config(**hub)), 0)
    module = vit.build(hub, jnp.float32, 0)
    params = vit.convert(saved(model, tmp_path), module.config)
    batch, mask = frames(2, 2 * grid[0], 2 * grid[1]), np.ones(2, bool)
    got, got_mask = module.apply({"params": params}, batch, mask)
    want, _ = KINDS["dinov2"].reference(model, batch, mask, 0)
    assert got_mask.shape == (2, 1 + grid[0] * grid[1])
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_a_constant_position_stays_constant_at_any_size():
    matrix = vit._bicubic(5, 13)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(vit._bicubic(7, 7), np.eye(7))


@pytest.mark.parametrize(
    ("hub", "shape", "message"),
    [
        (VIT, (12, 16, 3), r"images \(12, 16, 3\): expected 12 x 12 and 3 channels"),
        (DINO, (12, 18, 3), r"images \(12, 18, 3\): expected sides that are multiples of 4"),
        (DINO, (0, 12, 3), r"images \(0, 12, 3\): expected sides"),
        (DINO, (12, 12, 4), r"images \(12, 12, 4\): .* 3 channels"),
    ],
)
def test_pictures_of_a_wrong_size_are_refused(hub, shape, message):
    module, variables = initial(hub)
    with pytest.raises(AvjaxError, match=message):
        module.apply(variables, np.zeros((1, *shape), np.float32), np.ones(1, bool))


# Order, masks, layers, precision


@every_kind
def test_class_token_first_then_patches_row_by_row(kind):
    apply, variables, module = compiled(kind, layer=0)
    plain, mask = apply(variables, np.zeros((1, 12, 12, 3), np.float32), np.ones(1, bool))
    spot = np.zeros((1, 12, 12, 3), np.float32)
    spot[0, 2, 9] = 1  # in the first row of patches, the third column
    changed, _ = apply(variables, spot, np.ones(1, bool))
    np.testing.assert_array_equal(np.flatnonzero(np.abs(changed - plain)[0].sum(-1)), [3])
    assert plain.shape == (1, module.config.steps(0), 12)
    assert mask.shape == (1, 10)


@every_kind
def test_masked_images_leave_no_trace(kind):
    apply, variables, _ = compiled(kind)
    batch = frames(3, 12, 12)
    alone, _ = apply(variables, batch[:1], np.ones(1, bool))
    batch[1:] = np.nan
    features, mask = apply(variables, batch, np.array([True, False, False]))
    np.testing.assert_allclose(features[0], alone[0], atol=1e-5)
    np.testing.assert_array_equal(mask, np.repeat([[True], [False], [False]], 10, 1))
    assert np.isfinite(features).all()
    nothing, _ = apply(variables, batch, np.zeros(3, bool))
    assert np.isfinite(nothing).all()


@pytest.mark.parametrize("hub", [VIT, DINO], ids=["vit", "dinov2"])
@pytest.mark.parametrize("layer", [0, 1, None])
def test_only_blocks_below_the_layer_are_computed_in_the_asked_precision(hub, layer):
    module, variables = initial(hub, layer, jnp.bfloat16)
    features, _ = jax.eval_shape(module.apply, variables, frames(1, 12, 12), np.ones(1, bool))
    assert features.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    computed = {name for name in variables["params"] if name.startswith(("block_", "norm"))}
    assert computed == {0: set(), 1: {"block_0"}, None: {"block_0", "block_1", "norm"}}[layer]


# Checkpoints


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("vit", "ViTModel"),  # with a pooler
        ("vit", "ViTForImageClassification"),
        ("vit", "ViTForMaskedImageModeling"),
        ("dinov2", "Dinov2ForImageClassification"),
    ],
)
def test_heads_and_prefix_of_a_checkpoint_are_put_aside(tmp_path, kind, head):
    transformers = torch_and_transformers()
    config = KINDS[kind].draw(random.Random(0))
    if head == "ViTForMaskedImageModeling":
        config.patch_size = config.patch_size[0]
        config.image_size = 4 * config.patch_size
    model = stirred(getattr(transformers, head)(config), 0)
    ours = ViTConfig.from_hub(config.to_dict())
    bare = saved(getattr(model, kind, model), tmp_path / "bare")
    full = saved(model, tmp_path / "whole")
    assert head == "ViTModel" or full.keys() != bare.keys()
    assert same(vit.convert(full, ours), vit.convert(bare, ours))


@pytest.fixture(params=["vit", "dinov2"])
def checkpoint(request, tmp_path):
    """The configuration and the tensors of a small original."""
    torch_and_transformers()
    config = KINDS[request.param].draw(random.Random(1))
    config.num_hidden_layers = 2
    return ViTConfig.from_hub(config.to_dict()), saved(KINDS[request.param].build(config), tmp_path)


def test_tensors_that_do_not_fit_are_named(checkpoint):
    config, tensors = checkpoint
    gone = "encoder.layer.1.attention.output.dense.bias"
    extra = {"other": np.ones(3), "decoder.surprise": np.ones(3)}
    with pytest.raises(AvjaxError, match=rf"missing: {re.escape(gone)}; left over: decoder\.surprise, other$"):
        vit.convert({n: t for n, t in tensors.items() if n != gone} | extra, config)
    with pytest.raises(AvjaxError, match=r"left over: encoder\.layer\.1\.[^;]*$"):
        vit.convert(tensors, dataclasses.replace(config, layers=1))
    wide = "encoder.layer.0.attention.output.dense.bias"
    with pytest.raises(AvjaxError, match=rf"{re.escape(wide)}: shape \(999,\) does not fit"):
        vit.convert(tensors | {wide: np.ones(999)}, config)


def test_the_saliency_network_around_a_backbone_is_put_aside(checkpoint):
    config, tensors = checkpoint
    prefixed = {f"backbone.{n}": t for n, t in tensors.items()}
    decoder = {f"decoder.{n}": np.ones(2) for n in ("upconv1.weight", "bn3.running_var", "final_conv.bias")}
    assert same(vit.convert(prefixed | decoder, config), vit.convert(tensors, config))


# Configurations


@pytest.mark.parametrize("hub", [VIT, DINO], ids=["vit", "dinov2"])
def test_what_old_files_leave_out_is_the_originals_default(hub):
    transformers = torch_and_transformers()
    original = {"vit": transformers.ViTConfig, "dinov2": transformers.Dinov2Config}[hub["model_type"]]
    assert ViTConfig.from_hub(hub) == ViTConfig.from_hub(original(**hub).to_dict())


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        ({k: v for k, v in VIT.items() if k != "hidden_size"}, "of a vit lacks hidden_size"),
        ({k: v for k, v in DINO.items() if k != "mlp_ratio"}, "of a dinov2 lacks mlp_ratio"),
        (VIT | {"hidden_act": "mish"}, "'mish' is not known"),
        (VIT | {"num_channels": 1}, "num_channels is 1 .* expected 3"),
        (VIT | {"image_size": 13}, r"image_size \(13, 13\) .* multiples of patch_size \(4, 4\)"),
        (DINO | {"image_size": [12, 16]}, r"\(12, 16\) .* squares"),
        (DINO | {"use_swiglu_ffn": True}, "SwiGLU"),
        (DINO | {"num_register_tokens": 4}, "register tokens"),
    ],
)
def test_configs_that_are_not_computed_are_refused(hub, message):
    with pytest.raises(AvjaxError, match=message):
        vit.build(hub, jnp.float32, None)


# Preprocessing and the real network


def test_prepare_gives_what_the_encoder_takes():
    raw = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    apply, variables, _ = compiled("vit")
    batch, mask = vit.prepare(raw, {"size": 12})
    assert batch.shape == (2, 12, 12, 3)
    assert mask.tolist() == [True, True]
    features, _ = apply(variables, batch, mask)
    assert np.abs(features[0] - features[1]).max() > 1e-3
    default, _ = vit.prepare(raw, {})
    assert default.shape == (2, 224, 224, 3)


@pytest.fixture(scope="module")
def real(java_sed):
    """The encoder vit_s14, its file, and prepared frames of real clips."""
    try:
        file = weights.fetch("vit_s14")
    except AvjaxError as error:
        pytest.skip(str(error))
    av = pytest.importorskip("av", reason="frames of real clips (extra media)")
    raw = []
    for clip in sorted(java_sed.rglob("*.mp4"))[::40]:
        with av.open(str(clip)) as container:
            raw.append(next(container.decode(video=0)).to_ndarray(format="rgb24"))
    enc = encoders.load("vit_s14", dtype="float32")
    return enc, file, enc.prepare(raw)[0]


def assert_close(got, want):
    assert got.shape == want.shape == (3, 257, 384)
    assert np.abs(got - want).max() <= 1e-4 * want.std()


@pytest.mark.thorough
@pytest.mark.weights
def test_vit_s14_equals_dinov2_of_transformers(real):
    transformers = torch_and_transformers()
    import torch

    enc, file, batch = real
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, use_mask_token=False)
    model = transformers.Dinov2Model(config).eval()
    tensors = {n.removeprefix("backbone."): t for n, t in formats.read(file).items()}
    renamed = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
    renamed |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
    for old, new in renamed.items():
        tensors = {n.replace(old, new): t for n, t in tensors.items()}
    model.load_state_dict({n: torch.tensor(t) for n, t in tensors.items() if not n.startswith("decoder.")})
    want, _ = KINDS["dinov2"].reference(model, batch, np.ones(len(batch), bool))
    assert_close(enc(batch)[0], want)


@pytest.mark.thorough
@pytest.mark.weights
def test_vit_s14_equals_onnxruntime_on_its_own_file(real):
    runtime = pytest.importorskip("onnxruntime", reason="the second reference, which no extra brings")
    import onnx

    enc, file, batch = real
    graph = onnx.load(file)
    last = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run([last], {"input_image": batch.transpose(0, 3, 1, 2)})
    assert_close(enc(batch)[0], want)

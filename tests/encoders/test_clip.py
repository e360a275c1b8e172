"""The joint space of CLIP and its checkpoints; parity of the towers' features is in test_parity.py."""

import copy
import functools
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.encoders import clip, formats, images
from avjax.encoders.clip import TEXT, VISION, CLIPConfig, TextConfig, VisionConfig
from avjax.errors import AvjaxError
from tests.originals import stirred
from tests.originals.clip import draw

SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
VISION_HUB = SIZES | {"model_type": "clip_vision_model", "image_size": 12, "patch_size": 4, "projection_dim": 6}
TEXT_HUB = SIZES | {
    "model_type": "clip_text_model",
    "vocab_size": 30,
    "max_position_embeddings": 9,
    "projection_dim": 6,
}
TEXT_HUB |= {"eos_token_id": 29}
CLIP_HUB = {"model_type": "clip", "vision_config": VISION_HUB, "text_config": TEXT_HUB, "projection_dim": 5}
MASK = np.arange(6)[None] < np.array([[6], [3], [4]])
IDS = np.array([[1, 9, 29, 29, 4, 29], [1, 29, 0, 7, 29, 8], [3, 2, 28, 29, 0, 0]], np.int32)


def torch_and_transformers():
    pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    return transformers


def frames(n, side=12):
    return np.random.default_rng(0).normal(size=(n, side, side, 3)).astype(np.float32)


def drawn(shapes, seed=0):
    """Random params of these shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0.1, 0.3, leaf.shape).astype(np.float32), shapes)


def shapes_of(module, *inputs):
    """The shapes of a module's output and variables."""
    return jax.eval_shape(module.init_with_output, jax.random.key(0), *inputs)


@functools.cache
def small_clip(dtype=jnp.float32):
    """A small CLIP, compiled, and random params for it."""
    config = CLIPConfig.from_hub(CLIP_HUB)
    return jax.jit(clip.CLIP(config, dtype).apply), {"params": drawn(clip.shapes(config))}


def saved(model, folder):
    """The tensors in the checkpoint file of a PyTorch model."""
    model.save_pretrained(folder)
    return formats.read(folder / "model.safetensors")


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


def count(shapes):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def original(seed, end):
    """A small CLIPModel of random architecture whose end token is `end`."""
    transformers = torch_and_transformers()
    rng = random.Random(seed)
    vision, text = draw("clip_vision_model", rng), draw("clip_text_model", rng)
    text.eos_token_id = end
    towers = {"vision_config": vision.to_dict(), "text_config": text.to_dict()}
    return stirred(transformers.CLIPModel(transformers.CLIPConfig(projection_dim=rng.randint(2, 9), **towers)), seed)


def reference(model, batch, ids, mask):
    """Logits, embeddings of images and of texts of the original; each text on its own, without padding."""
    import torch

    batch = torch.tensor(batch).permute(0, 3, 1, 2)
    rows = [torch.tensor(row[real][None], dtype=torch.long) for row, real in zip(ids, mask, strict=True)]
    with torch.no_grad():
        vision = model.get_image_features(batch).pooler_output.numpy()
        text = [model.get_text_features(row).pooler_output.numpy() for row in rows]
        logits = [model(pixel_values=batch, input_ids=row).logits_per_image.numpy() for row in rows]
    return np.concatenate(logits, 1), vision, np.concatenate(text)


def ours(model, folder, batch, ids, mask, dtype=jnp.float32):
    """Ours from the original's files: logits and unit embeddings of both towers, and the towers' own embeddings."""
    tensors, hub = saved(model, folder), model.config.to_dict()
    config = CLIPConfig.from_hub(hub)
    joint = jax.jit(clip.CLIP(config, dtype).apply)({"params": clip.convert(tensors, config)}, batch, ids, mask)
    embeddings = []
    for family, name, inputs in ((VISION, "vision", (batch, np.ones(len(batch), bool))), (TEXT, "text", (ids, mask))):
        module = family.build(clip.tower_config(hub, name), dtype, None).clone(projected=True)
        params = family.convert(tensors, module.config, projected=True)
        features, real = jax.jit(module.apply)({"params": params}, *inputs)
        assert features.shape == (len(inputs[0]), 1, module.config.joint)
        assert real.shape == (len(inputs[0]), 1)
        assert real.all()
        embeddings.append(np.asarray(features[:, 0]))
    return joint, embeddings


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def assert_close(got, want, tolerance=1e-4):
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * max(want.std(), 1e-3)


# The joint space


@pytest.mark.parametrize(
    ("seed", "end"), [(1, 29), *(pytest.param(*drawn, marks=pytest.mark.thorough) for drawn in ((0, 2), (2, 29)))]
)
def test_embeddings_and_logits_are_the_originals(tmp_path, seed, end):
    model = original(seed, end)
    batch = frames(4, model.config.vision_config.image_size)
    logits, vision, text = reference(model, batch, IDS, MASK)
    (got, image, sentence), embeddings = ours(model, tmp_path, batch, IDS, MASK)
    assert_close(embeddings[0], vision)
    assert_close(embeddings[1], text)
    assert_close(image, unit(vision))
    assert_close(sentence, unit(text))
    assert_close(got, logits)


@pytest.mark.parametrize(("end", "positions"), [(29, [2, 1, 3]), (2, [2, 1, 3]), (9, [1, 0, 0])])
def test_the_end_token_is_the_first_real_one_and_the_largest_id_in_older_files(end, positions):
    np.testing.assert_array_equal(clip._end(jnp.asarray(IDS), jnp.asarray(MASK), end), positions)
    hidden = IDS.copy()
    hidden[~MASK] = 99 if end == 2 else end
    np.testing.assert_array_equal(clip._end(jnp.asarray(hidden), jnp.asarray(MASK), end), positions)


def test_a_text_or_image_is_compared_independently_of_its_batch():
    (compare, params), batch = small_clip(), frames(3)
    logits, vision, text = compare(params, batch, IDS, MASK)
    assert logits.shape == (3, 3)
    np.testing.assert_allclose(np.linalg.norm(vision, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=1e-6)
    alone = IDS[1:2, MASK[1]]
    got, *_ = compare(params, batch[1:2], alone, np.ones(alone.shape, bool))
    np.testing.assert_allclose(got[0, 0], logits[1, 1], rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_a_text_without_words_is_like_nothing_and_gradients_stay_finite():
    compare, params = small_clip()
    nothing = MASK & np.array([[True], [True], [False]])

    def loss(params):
        logits, *_ = compare(params, frames(3), IDS, nothing)
        return -jnp.mean(jnp.diag(jax.nn.log_softmax(logits))), logits

    (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_array_equal(logits[:, 2], 0)
    assert np.abs(logits[:, :2]).min() > 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        if path[-1].key != "bias" or "key" not in jax.tree_util.keystr(path):  # the softmax does not feel a key's bias
            assert np.abs(leaf).max() > 0, path


def test_outputs_of_bfloat16_are_float32_and_point_the_same_way():
    (compare, params), batch = small_clip(), frames(3)
    want = compare(params, batch, IDS, MASK)
    got = small_clip(jnp.bfloat16)[0](params, batch, IDS, MASK)
    assert {x.dtype for x in got} == {jnp.dtype("float32")}
    assert np.abs(got[0] - want[0]).max() > 0, "bfloat16 was asked for, yet nothing was rounded"
    for a, b in zip(got[1:], want[1:], strict=True):
        assert (a * b).sum(-1).min() >= 0.999


def test_a_fresh_model_starts_at_the_papers_temperature():
    shallow = {
        f"{tower}_config": hub | {"num_hidden_layers": 0} for tower, hub in (("vision", VISION_HUB), ("text", TEXT_HUB))
    }
    module = clip.CLIP(CLIPConfig.from_hub(CLIP_HUB | shallow))
    variables = jax.jit(module.init)(jax.random.key(0), frames(1), IDS, MASK)
    np.testing.assert_allclose(np.exp(variables["params"]["logit_scale"]), 1 / 0.07, rtol=1e-5)


@pytest.mark.slow
def test_vit_b32_equals_the_original(tmp_path):
    transformers = torch_and_transformers()
    import torch

    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig()).eval()
    batch = frames(3, 224)
    ids = np.random.default_rng(0).integers(0, 49000, (4, 77)).astype(np.int32)
    mask = np.arange(77)[None] < np.array([[77], [20], [5], [2]])
    ids[np.arange(4), mask.sum(1) - 1] = 49407
    logits, vision, text = reference(model, batch, ids, mask)
    (got, *_), embeddings = ours(model, tmp_path / "full", batch, ids, mask)
    assert_close(embeddings[0], vision)
    assert_close(embeddings[1], text)
    assert_close(got, logits)
    (_, image, sentence), _ = ours(model, tmp_path / "half", batch, ids, mask, jnp.bfloat16)
    assert (image * unit(vision)).sum(-1).min() >= 0.999
    assert (sentence * unit(text)).sum(-1).min() >= 0.999


# Towers


def test_there_are_only_the_params_that_the_output_needs():
    config = CLIPConfig.from_hub({"model_type": "clip"})
    assert count(clip.shapes(config)) == 151_277_313
    assert count(VISION.shapes(config.vision, projected=True)) == 87_849_216
    assert count(TEXT.shapes(config.text, projected=True)) == 63_428_096
    assert VISION.shapes(config.vision).keys().isdisjoint({"post_norm", "projection"})
    assert "projection" not in TEXT.shapes(config.text)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_only_blocks_below_the_layer_are_computed_in_the_asked_precision(layer):
    for family, hub, inputs in ((VISION, VISION_HUB, (frames(3), np.ones(3, bool))), (TEXT, TEXT_HUB, (IDS, MASK))):
        module = family.build(hub, jnp.bfloat16, layer)
        (features, _), variables = shapes_of(module, *inputs)
        assert features.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        assert sum(name.startswith("block_") for name in variables["params"]) == layer
        assert ("norm" in variables["params"]) == (family is TEXT and layer == 2)


def test_what_lies_under_the_mask_leaves_no_trace_in_an_embedding():
    vision, text = VISION.build(VISION_HUB, jnp.float32, None), TEXT.build(TEXT_HUB, jnp.float32, None)
    for module, family, inputs, garbage in ((vision, VISION, frames(3), np.nan), (text, TEXT, IDS, 10**6)):
        module, params = module.clone(projected=True), drawn(family.shapes(module.config, projected=True))
        mask = np.array([True, False, True]) if family is VISION else MASK & np.array([[True], [False], [True]])
        apply = jax.jit(module.apply)
        want, _ = apply({"params": params}, inputs, mask)
        other = inputs.copy()
        other[~mask] = garbage
        got, real = apply({"params": params}, other, mask)
        np.testing.assert_array_equal(got, want)
        assert np.isfinite(got).all()
        assert real.tolist() == [[True], [False], [True]]


def test_a_text_is_read_from_left_to_right():
    module = TEXT.build(TEXT_HUB, jnp.float32, None)
    apply, params = jax.jit(module.apply), {"params": drawn(TEXT.shapes(module.config))}
    longer, _ = apply(params, IDS, np.ones_like(MASK))
    shorter, _ = apply(params, IDS[:, :4], np.ones_like(MASK[:, :4]))
    np.testing.assert_allclose(longer[:, :4], shorter, atol=1e-5)


def test_what_a_tower_does_not_support_is_refused():
    vision, text = VISION.build(VISION_HUB, jnp.float32, 1), TEXT.build(TEXT_HUB, jnp.float32, None)
    wide, long = (frames(1, 16), np.ones(1, bool)), (np.zeros((1, 10), np.int32), np.ones((1, 10), bool))
    with pytest.raises(AvjaxError, match=r"layer is 1, but embeddings are projected after the last, 2"):
        shapes_of(vision.clone(projected=True), frames(1), np.ones(1, bool))
    with pytest.raises(AvjaxError, match=r"layer is 0, but embeddings"):
        shapes_of(text.clone(projected=True, layer=0), IDS, MASK)
    with pytest.raises(AvjaxError, match=r"images \(16, 16, 3\): expected 12 x 12 and 3 channels"):
        shapes_of(vision, *wide)
    with pytest.raises(AvjaxError, match=r"10 word pieces, but this encoder has 9 positions"):
        shapes_of(text, *long)


def test_prepare_fills_in_what_clips_processor_does():
    raw = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    batch, mask = VISION.prepare(raw, {"size": 14, "crop_size": 12})
    np.testing.assert_array_equal(batch, images.prepare(raw, {"size": 14, "crop_size": 12}, "CLIPImageProcessor"))
    assert batch.shape == (2, 12, 12, 3)
    assert mask.tolist() == [True, True]


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """A small CLIPModel, its configuration and its tensors."""
    model = original(1, 29)
    return model, CLIPConfig.from_hub(model.config.to_dict()), saved(model, tmp_path / "whole")


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_tower_is_read_from_its_own_file_and_from_the_whole(tmp_path, checkpoint, tower, projected):
    transformers = torch_and_transformers()
    model, config, tensors = checkpoint
    family, ours = {"vision": VISION, "text": TEXT}[tower], getattr(config, tower)
    kind = getattr(transformers, f"CLIP{tower.title()}Model" + ("WithProjection" if projected else ""))
    model.save_pretrained(tmp_path)
    alone = kind.from_pretrained(tmp_path, projection_dim=model.config.projection_dim)
    assert family.config.from_hub(alone.config.to_dict()) == ours
    want = family.convert(tensors, ours, projected)
    own = saved(alone, tmp_path / "own")
    assert same(family.convert(own, ours, projected), want)
    bare = {n.removeprefix(f"{tower}_model."): t for n, t in own.items()}
    assert same(family.convert(bare, ours, projected), want)
    older = {f"{t}_model.embeddings.position_ids": np.arange(4)[None] for t in ("vision", "text")}
    assert same(family.convert(tensors | older, ours, projected), want)
    if projected:
        assert same(clip.convert(tensors | older, config)[tower], want)


def test_tensors_that_do_not_fit_are_named(checkpoint):
    _, config, tensors = checkpoint
    for family, tower, projection in ((VISION, "vision", "visual_projection"), (TEXT, "text", "text_projection")):
        gone, ours = "encoder.layers.0.mlp.fc1.bias", getattr(config, tower)
        rest = {n: t for n, t in tensors.items() if n not in (f"{tower}_model.{gone}", f"{projection}.weight")}
        extra = {f"{tower}_model.surprise": np.ones(3), "other": np.ones(3)}
        with pytest.raises(AvjaxError, match=rf"missing: {re.escape(gone)}; left over: other, surprise$"):
            family.convert(rest | extra, ours)
        with pytest.raises(AvjaxError, match=rf"missing: {re.escape(gone)}, {projection}\.weight; left over: none$"):
            family.convert(rest, ours, projected=True)
        with pytest.raises(AvjaxError, match=rf"missing: {tower}_model\.{re.escape(gone)}, .*; left over: .*surprise$"):
            clip.convert(rest | extra, config)
    with pytest.raises(AvjaxError, match=r"missing: logit_scale; left over: none$"):
        clip.convert({n: t for n, t in tensors.items() if n != "logit_scale"}, config)
    with pytest.raises(AvjaxError, match=r"text_projection\.weight: shape \(3, 4\) does not fit"):
        clip.convert(tensors | {"text_projection.weight": np.ones((3, 4))}, config)


# Configurations


@pytest.mark.parametrize(
    "contents",
    [
        {},
        {"text_config": None, "vision_config": None},
        {"projection_dim": 768, "vision_config": {"patch_size": 14}, "text_config": {"hidden_act": "gelu"}},
        {"projection_dim": 640, "vision_config": {"projection_dim": 99}, "text_config": {"eos_token_id": 2}},
        {
            "text_config": {"hidden_size": 64, "eos_token_id": 2, "vocab_size": 99},
            "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
            "vision_config": {"hidden_size": 64, "image_size": 96},
            "vision_config_dict": {"patch_size": 16},
        },
    ],
)
def test_what_files_leave_out_is_the_originals_default(contents):
    theirs = torch_and_transformers().CLIPConfig(**copy.deepcopy(contents)).to_dict()  # it writes into what it is given
    got = CLIPConfig.from_hub({"model_type": "clip"} | contents)
    vision, text = (theirs[f"{t}_config"] | {"projection_dim": theirs["projection_dim"]} for t in ("vision", "text"))
    assert got.vision == VisionConfig.from_hub(vision)
    assert got.text == TextConfig.from_hub(text)
    assert clip.tower_config(contents, "vision")["model_type"] == "clip_vision_model"
    assert clip.tower_config(contents, "text")["model_type"] == "clip_text_model"


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        ({k: v for k, v in VISION_HUB.items() if k != "hidden_size"}, "of a clip_vision_model lacks hidden_size"),
        ({k: v for k, v in TEXT_HUB.items() if k != "vocab_size"}, "of a clip_text_model lacks vocab_size"),
        (VISION_HUB | {"hidden_act": "mish"}, "'mish' is not known"),
        (VISION_HUB | {"num_channels": 1}, "num_channels is 1 .* expected 3"),
        (VISION_HUB | {"image_size": 13}, "image_size 13 and patch_size 4 .* multiple"),
        (VISION_HUB | {"image_size": [12, 16]}, r"image_size \[12, 16\] .* one number each"),
        (TEXT_HUB | {"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\] .* expected one id"),
        (TEXT_HUB | {"eos_token_id": None}, "eos_token_id is None"),
    ],
)
def test_configs_that_are_not_computed_are_refused(hub, message):
    family = VISION if hub["model_type"] == "clip_vision_model" else TEXT
    with pytest.raises(AvjaxError, match=message):
        family.build(hub, jnp.float32, None)


def test_there_are_two_towers():
    with pytest.raises(AvjaxError, match="tower is 'audio'; choose one of vision, text"):
        clip.tower_config({"model_type": "clip"}, "audio")

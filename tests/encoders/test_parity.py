"""Every kind of encoder against its PyTorch original, and what padding, batching, layers and precision may do.

Thorough tests draw further architectures; `AVJAX_ENCODER_SEEDS=7,8 pytest tests/encoders/test_parity.py` draws others.
"""

import functools
import json
import os
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import encoders
from avjax.encoders import formats
from avjax.encoders.encoder import run
from avjax.errors import AvjaxError
from avjax.utils.storage import sha256
from tests.originals import bert, clip, efficientnet, perceiver, stirred, vit, wav2vec2, whisper

SEEDS = [int(s) for s in os.environ.get("AVJAX_ENCODER_SEEDS", "0").split(",")]
FURTHER = [pytest.param(1, marks=pytest.mark.thorough)] if SEEDS == [0] else []
KINDS = {}
for family in (
    bert,
    clip,
    efficientnet,
    perceiver,
    vit,
    wav2vec2,
    whisper,
):
    KINDS |= family.KINDS
FULL = [(kind, name) for kind, original in KINDS.items() for name in original.full]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_seed = pytest.mark.parametrize("seed", SEEDS + FURTHER)


def in_pytorch(kind, seed):
    """A small original drawn by `seed`, and its configuration."""
    pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import torch

    config = KINDS[kind].draw(random.Random(seed))
    torch.manual_seed(seed)
    return stirred(KINDS[kind].build(config), seed), config


def asked(kind, config, seed=0):
    return KINDS[kind].inputs(np.random.default_rng(seed), config)


def assert_close(got, want, mask, tolerance=1e-4):
    """The bound on float32 parity: a fraction of the standard deviation of the output, on real steps."""
    assert got.shape == want.shape
    assert np.abs(got - want)[mask].max() <= tolerance * want[mask].std()


def quick(kinds):
    """All kinds; those not in `kinds` as thorough tests."""
    return [kind if kind in kinds else pytest.param(kind, marks=pytest.mark.thorough) for kind in KINDS]


@functools.cache
def of_random_params(kind, seed=0, dtype=jnp.float32, layer=None, pool=None):
    """A small encoder that needs no PyTorch, with its configuration."""
    config = KINDS[kind].draw(random.Random(seed))
    contents = json.loads(json.dumps(config.to_dict()))
    family = encoders.FAMILIES[contents["model_type"]]
    module = family.build(contents, dtype, layer)
    rng = np.random.default_rng(seed)

    def param(path, leaf):
        mean_and_std = {"kernel": (0, np.prod(leaf.shape[:-1]) ** -0.5), "scale": (1, 0.1)}.get(path[-1].key, (0, 0.1))
        return rng.normal(*mean_and_std, leaf.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(param, family.shapes(module.config))
    return encoders.Encoder(family, module, params, {}, pool=pool), config


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


# Parity with the PyTorch originals


@every_seed
@every_kind
def test_parity_with_the_original(tmp_path, kind, seed):
    model, config = in_pytorch(kind, seed)
    model.save_pretrained(tmp_path)
    enc = encoders.load(tmp_path, dtype="float32")
    inputs, mask = asked(kind, config, seed)
    want, want_mask = KINDS[kind].reference(model, inputs, mask, None)
    got, got_mask = enc(inputs, mask)
    np.testing.assert_array_equal(got_mask, want_mask)
    assert_close(got, want, want_mask)
    assert got.dtype == np.float32
    assert not got[~got_mask].any()
    assert enc.width == got.shape[-1]
    assert enc.provenance == {
        "source": tmp_path.name,
        "sha256": sha256(tmp_path / "model.safetensors"),
        "model_type": config.model_type,
        "layer": "last",
        "pool": "none",
        "dtype": "float32",
    }


LAYERED = [kind for kind in KINDS if kind not in ("efficientnet", "perceiver")]


@pytest.mark.parametrize("kind", ["bert", "clip_text_model", "vit", "wav2vec2", "whisper"])  # one of each family
def test_a_layer_is_the_originals(tmp_path, kind):
    """The layer below the last."""
    model, config = in_pytorch(kind, SEEDS[0])
    model.save_pretrained(tmp_path)
    depth = layers_of(config)
    assert_is_the_originals(model, config, tmp_path, depth - 1)
    with pytest.raises(AvjaxError, match=rf"layer is {depth + 1}, expected 0 .* to {depth}"):
        encoders.load(tmp_path, layer=depth + 1)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", LAYERED)
def test_every_layer_is_the_originals(tmp_path, kind):
    model, config = in_pytorch(kind, SEEDS[0])
    model.save_pretrained(tmp_path)
    for layer in range(layers_of(config) + 1):
        assert_is_the_originals(model, config, tmp_path, layer)


def layers_of(config):
    return encoders.FAMILIES[config.model_type].build(config.to_dict(), jnp.float32, None).config.layers


def assert_is_the_originals(model, config, folder, layer):
    """The features after `layer` blocks; after the last, `last_hidden_state`."""
    kind = config.model_type
    inputs, mask = asked(kind, config, SEEDS[0])
    enc = encoders.load(folder, layer=layer, dtype="float32")
    want, want_mask = KINDS[kind].reference(model, inputs, mask, None if layer == layers_of(config) else layer)
    assert_close(enc(inputs, mask)[0], want, want_mask)
    assert enc.provenance["layer"] == str(layer)


@pytest.mark.parametrize("kind", quick(["clip_text_model"]))  # op by op it takes seconds
def test_parity_without_jit(tmp_path, kind):
    model, config = in_pytorch(kind, SEEDS[0])
    model.save_pretrained(tmp_path)
    contents = json.loads((tmp_path / "config.json").read_text())
    family = encoders.FAMILIES[config.model_type]
    module = family.build(contents, jnp.float32, None)
    params = family.convert(formats.read(tmp_path / "model.safetensors"), module.config)
    inputs, mask = asked(kind, config)
    with jax.disable_jit():
        got, got_mask = module.apply({"params": params}, inputs, mask)
    want, want_mask = KINDS[kind].reference(model, inputs, mask, None)
    np.testing.assert_array_equal(got_mask, want_mask)
    assert_close(np.asarray(got), want, want_mask)


def shapes(kind, config):
    family = encoders.FAMILIES[config.model_type]
    return family.shapes(family.build(config.to_dict(), jnp.float32, None).config)


@pytest.mark.parametrize(("kind", "name"), FULL)
def test_parameter_counts_of_the_true_sizes(kind, name):
    make, count = KINDS[kind].full[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(kind, make()))) == count


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), FULL)
def test_parity_at_true_size(tmp_path, kind, name):
    torch = pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    original = KINDS[kind]
    config = original.full[name][0]()
    torch.manual_seed(0)
    model = original.build(config)
    model.save_pretrained(tmp_path)
    inputs, mask = asked(kind, config)
    want, want_mask = original.reference(model, inputs, mask, None)
    full, _ = encoders.load(tmp_path, dtype="float32")(inputs, mask)
    assert_close(full, want, want_mask, original.tolerance.get(name, 1e-4))
    pooled, real = encoders.load(tmp_path, dtype="bfloat16", pool="mean")(inputs, mask)
    means = np.stack([row[m].mean(0) for row, m in zip(want[real], want_mask[real], strict=True)])
    assert cosines(pooled[real], means).min() >= 0.999


# Padding, neighbours, layers, pooling, precision


def cut(kind, inputs, mask, row):
    """One row of a batch without its padding."""
    axis = encoders.FAMILIES[kind].INPUTS.length_axis
    alone = inputs[row : row + 1]
    if axis is None:
        return alone, mask[row : row + 1]
    length = int(mask[row].sum())
    return np.take(alone, range(length), axis), np.ones((1, length), bool)


@every_seed
@every_kind
def test_padding_and_neighbours_do_not_change_an_answer(kind, seed):
    enc, config = of_random_params(kind, seed)
    inputs, mask = asked(kind, config)
    together, real = enc(inputs, mask)
    size = together[real].std()
    for row in np.flatnonzero(mask.reshape(len(mask), -1).any(1))[:2]:
        alone, steps = enc(*cut(kind, inputs, mask, row))
        assert steps.all()
        np.testing.assert_allclose(together[row][real[row]], alone[0], atol=1e-5 * size, rtol=1e-5)
    turned, _ = enc(inputs[::-1], mask[::-1])
    np.testing.assert_allclose(turned[::-1], together, atol=1e-5 * size, rtol=1e-5)


@every_seed
@every_kind
def test_what_lies_under_the_mask_does_not_matter(kind, seed):
    enc, config = of_random_params(kind, seed)
    inputs, mask = asked(kind, config)
    together, _ = enc(inputs, mask)
    axis = enc._family.INPUTS.length_axis
    shape = [len(mask)] + [1] * (inputs.ndim - 1)
    if axis is not None:
        shape[axis] = mask.shape[1]
    bad = [np.inf, np.nan, -1e30] if inputs.dtype.kind == "f" else [-100, 10**6]
    for value in bad:
        other, _ = enc(np.where(mask.reshape(shape), inputs, np.array(value, inputs.dtype)), mask)
        np.testing.assert_array_equal(other, together)


@every_seed
@every_kind
def test_rows_without_a_real_step_and_empty_batches_give_zeros(kind, seed):
    enc, config = of_random_params(kind, seed)
    inputs, mask = asked(kind, config)
    features, real = enc(inputs, np.zeros_like(mask))
    assert not features.any()
    assert not real.any()
    row, step = cut(kind, inputs, mask, 0)
    none, real = enc(row[:0], step[:0])
    assert none.shape == (0, *enc(row, step)[0].shape[1:])
    assert real.shape == none.shape[:2]


@pytest.mark.parametrize(
    "kind",
    # texts, images, audio
    ["distilbert", *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("efficientnet", "wav2vec2"))],
)
def test_pooling_is_one_step_or_the_mean_of_the_real_ones(kind):
    enc, config = of_random_params(kind)
    inputs, mask = asked(kind, config)
    features, real = enc(inputs, mask)
    first, kept = of_random_params(kind, pool="first")[0](inputs, mask)
    np.testing.assert_allclose(first, features[:, 0], atol=1e-5)
    np.testing.assert_array_equal(kept, real[:, 0])
    mean, kept = of_random_params(kind, pool="mean")[0](inputs, mask)
    np.testing.assert_allclose(mean, means(features, real), atol=1e-5)
    np.testing.assert_array_equal(kept, real.any(1))


def means(features, real):
    """The mean of each row's real steps, 0 where there is none."""
    return np.stack(
        [row[steps].mean(0) if steps.any() else 0 * row[0] for row, steps in zip(features, real, strict=True)]
    )


@every_seed
@pytest.mark.parametrize("kind", quick(["bert", "clip_text_model", "efficientnet", "vit", "wav2vec2", "whisper"]))
def test_bfloat16_points_the_same_way(kind, seed):
    full, config = of_random_params(kind, seed)
    inputs, mask = asked(kind, config)
    want, real = full(inputs, mask)
    got, _ = of_random_params(kind, seed, dtype=jnp.bfloat16)[0](inputs, mask)
    assert got.dtype == np.float32
    assert np.abs(got - want).max() > 0, "bfloat16 was asked for, yet nothing was rounded"
    got, want = (means(x, real)[real.any(1)] for x in (got, want))
    assert cosines(got, want).min() >= 0.999


@every_kind
def test_default_mask_is_all_true(kind):
    enc, config = of_random_params(kind)
    inputs, mask = asked(kind, config)
    inputs = np.nan_to_num(inputs) if inputs.dtype.kind == "f" else np.clip(inputs, 0, 5)
    np.testing.assert_array_equal(enc(inputs)[0], enc(inputs, np.ones_like(mask))[0])


@pytest.mark.parametrize("kind", LAYERED)
def test_layers_above_are_not_kept(kind):
    enc, _ = of_random_params(kind)
    low, _ = of_random_params(kind, layer=0)
    assert not any(name.startswith("block_") for name in low.params)
    assert any(name.startswith("block_") for name in enc.params)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["distilbert", "whisper"])  # one for each axis that may be padded
def test_compilations_are_one_for_each_bucket(kind):
    enc, config = of_random_params(kind)
    inputs = np.repeat(asked(kind, config)[0][:1], 8, 0)
    run.clear_cache()
    axis, least = enc._family.INPUTS.length_axis, enc._family.INPUTS.least
    longest = min(enc.longest or 2 * least, 2 * least)
    inputs = np.zeros([longest if a == axis else n for a, n in enumerate(inputs.shape)], inputs.dtype)
    sizes = [n for n in range(1, longest + 1, max(1, longest // 16)) if enc._steps(n)]
    for batch in (1, 5, 6, 7, 8):
        for length in sizes:
            enc(np.take(inputs[:batch], range(length), axis))
    # Batches of 1, 6 and 8; lengths of least, 3/2 least and 2 least, or as long as it takes.
    assert 3 <= run._cache_size() <= 3 * 3


ON_MANY_DEVICES = """
import sys
import numpy as np, jax
sys.path.insert(0, ".")
from tests.encoders.test_parity import asked, of_random_params
enc, config = of_random_params(sys.argv[1])
inputs, mask = asked(sys.argv[1], config)
assert jax.local_device_count() == 6
leaf = jax.tree.leaves(enc.params)[0]
assert len(leaf.sharding.device_set) == 6
shard = jax.device_put(np.zeros((12, 3)), enc._shard).addressable_shards[0].data.shape
assert shard == (2, 3), shard
np.savez(sys.argv[2], *enc(inputs, mask))
"""


@pytest.mark.parametrize("kind", ["vit"])
def test_all_local_devices_share_a_batch(tmp_path, kind):
    enc, config = of_random_params(kind)
    want = enc(*asked(kind, config))
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=6", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_MANY_DEVICES, kind, str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, env=environment)
    with np.load(tmp_path / "out.npz") as got:
        np.testing.assert_allclose(got["arr_0"], want[0], atol=1e-5)
        np.testing.assert_array_equal(got["arr_1"], want[1])


# Mistakes


@every_kind
def test_inputs_of_another_shape_are_refused(kind):
    enc, config = of_random_params(kind)
    inputs, mask = asked(kind, config)
    with pytest.raises(AvjaxError, match=r"inputs \(.*\): expected .*batch"):
        enc(inputs[0], mask[0])
    with pytest.raises(AvjaxError, match=r"and mask \(.*\): expected a mask \("):
        enc(inputs, mask[:-1])
    if enc._family.INPUTS.prefix:
        holes = np.ones_like(mask)
        holes[0, 0] = False
        with pytest.raises(AvjaxError, match="has gaps"):
            enc(inputs, holes)


def test_sources_and_options_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(AvjaxError, match=r"neither a registered name \(.*minilm.*\) nor a folder"):
        encoders.load(tmp_path / "nowhere")
    with pytest.raises(AvjaxError, match=r"no config\.json"):
        encoders.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(AvjaxError, match=r"'gpt2', expected one of bert, .*whisper"):
        encoders.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(AvjaxError, match=r"no weights in it; expected model\.safetensors, or one of pytorch_model"):
        encoders.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(AvjaxError, match=r"config\.json: cannot be read as JSON .*fetch it again"):
        encoders.load(tmp_path)
    with pytest.raises(AvjaxError, match="pool is 'max'; choose one of None, first, mean, projected"):
        encoders.load("minilm", pool="max")
    with pytest.raises(AvjaxError, match="a Bert has no joint space"):
        encoders.load("minilm", pool="projected", random=True)
    with pytest.raises(AvjaxError, match="tower is 'text', but a bert has none to choose from"):
        encoders.load("minilm", tower="text", random=True)
    with pytest.raises(AvjaxError, match="tower is None; choose one of vision, text"):
        encoders.load("clip_vit_b32", random=True)
    with pytest.raises(AvjaxError, match="layer"):
        encoders.load("hsemotion_b2", layer=3, random=True)

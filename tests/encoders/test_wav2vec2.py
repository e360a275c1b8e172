"""Tests specific to wav2vec 2.0 and data2vec for speech; parity with the originals is in test_parity.py."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.encoders import wav2vec2
from avjax.encoders.wav2vec2 import RowNorm, Wav2Vec2Config
from avjax.errors import AvjaxError
from tests.originals import stirred
from tests.originals.wav2vec2 import KINDS

SPEECH = {
    "model_type": "wav2vec2",
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "conv_dim": [8, 6, 10],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embedding_groups": 2,
}
STABLE = SPEECH | {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
DATA2VEC = SPEECH | {"model_type": "data2vec-audio"}

KINDS_OF_NORM = {"group": SPEECH, "stable": STABLE, "data2vec": DATA2VEC}
every_kind = pytest.mark.parametrize("hub", KINDS_OF_NORM.values(), ids=KINDS_OF_NORM)


def every_kind_but(quick):
    """Every kind; those not in `quick` as thorough tests."""
    marks = {name: () if name == quick else pytest.mark.thorough for name in KINDS_OF_NORM}
    hubs = [pytest.param(hub, id=name, marks=marks[name]) for name, hub in KINDS_OF_NORM.items()]
    return pytest.mark.parametrize("hub", hubs)


def torch_and_transformers():
    pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    return transformers


def in_pytorch(transformers, hub, head="Model"):
    kind = "Wav2Vec2" if hub["model_type"] == "wav2vec2" else "Data2VecAudio"
    settings = {k: v for k, v in hub.items() if k != "model_type"}
    return stirred(getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**settings)), 0)


def tensors_of(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def initial(hub, layer=None, dtype=jnp.float32):
    """A module and random params for it."""
    module = wav2vec2.build(hub, dtype, layer)
    rng = np.random.default_rng(0)
    shapes = wav2vec2.shapes(module.config)
    return module, {"params": jax.tree.map(lambda leaf: rng.normal(0.1, 0.3, leaf.shape).astype(leaf.dtype), shapes)}


def noise(*lengths, room=0):
    """Rows of noise with these numbers of real samples, noise in the padding too, and their mask."""
    mask = np.arange(max(lengths) + room)[None] < np.array(lengths)[:, None]
    return np.random.default_rng(0).normal(0.2, 1, mask.shape).astype(np.float32), mask


# Lengths


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_originals(kind):
    torch_and_transformers()
    for seed in range(5):
        config = KINDS[kind].draw(random.Random(seed))
        model, ours = KINDS[kind].build(config), Wav2Vec2Config.from_hub(config.to_dict())
        for length in range(ours.least, ours.least + 500, 7):
            assert ours.steps(length) == model._get_feat_extract_output_lengths(length)
        assert [ours.steps(n) for n in (0, ours.least - 1, ours.least)] == [0, 0, 1]


def test_true_sizes_make_a_step_each_20_ms():
    true = {"conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]}
    config = Wav2Vec2Config.from_hub(SPEECH | true)
    assert [config.steps(n) for n in (399, 400, 719, 720, 16_000, 160_000)] == [0, 1, 1, 2, 49, 499]
    assert config.least == 400 <= wav2vec2.INPUTS.least
    assert config.longest is None


# Padding


@every_kind_but("group")
def test_padding_and_neighbours_do_not_change_an_answer(hub):
    module, params = initial(hub)
    lengths = [300, 40, module.config.least, module.config.least - 1, 0, 171]
    waves, mask = noise(*lengths, room=77)
    waves = np.where(mask, waves, np.nan)
    apply = jax.jit(module.apply)
    together, real = apply(params, waves, mask)
    assert np.isfinite(together).all()
    assert real.sum(1).tolist() == [module.config.steps(n) for n in lengths]
    assert together.shape[1] == module.config.steps(waves.shape[1])
    for row, n in enumerate(lengths[:3]):
        alone, _ = apply(params, waves[row : row + 1, :n], np.ones((1, n), bool))
        np.testing.assert_allclose(together[row, : alone.shape[1]], alone[0], atol=2e-5, rtol=0)


@every_kind
def test_batches_too_short_for_a_step_have_none(hub):
    module, params = initial(hub)
    for n in (0, module.config.least - 1):
        features, mask = jax.eval_shape(module.apply, params, *noise(n, n))
        assert features.shape == (2, 0, hub["hidden_size"])
        assert mask.shape == (2, 0)


def test_row_norm_takes_real_steps_alone_and_each_channel_for_itself():
    x = np.float32([[[1, 30], [3, 10], [700, 700]], [[5, 5], [9, 9], [9, 9]]])
    mask = np.array([[1, 1, 0], [0, 0, 0]], bool)
    params = {"scale": jnp.array([1.0, 2.0]), "bias": jnp.array([0.0, 7.0])}
    y = RowNorm().apply({"params": params}, x, mask)
    np.testing.assert_allclose(y[0, :2], [[-1, 9], [1, 5]], atol=1e-5)
    assert np.isfinite(y).all()


def test_statistics_over_time_do_not_overflow_or_drown_in_bfloat16():
    x = 300 + np.random.default_rng(0).normal(size=(1, 40_000, 2)).astype(np.float32)
    params = RowNorm().init(jax.random.key(0), x, np.ones(x.shape[:2], bool))
    y = RowNorm(jnp.bfloat16).apply(params, x, np.ones(x.shape[:2], bool))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose([float(y.mean()), float(y.astype(jnp.float32).std())], [0, 1], atol=0.01)


# Layers


@every_kind_but("stable")
def test_a_lower_layer_needs_no_params_above_it(hub):
    module, params = initial(hub, layer=1)
    waves, mask = noise(200)
    made = jax.eval_shape(module.init, jax.random.key(0), waves, mask)["params"]
    above = {"block_1", "norm"} if hub is STABLE else {"block_1"}
    assert set(params["params"]) - set(made) == above
    kept = {"params": {name: params["params"][name] for name in made}}
    apply = jax.jit(module.apply)
    np.testing.assert_array_equal(apply(kept, waves, mask)[0], apply(params, waves, mask)[0])


# Checkpoints


@pytest.mark.parametrize(
    ("hub", "head"),
    [
        (SPEECH, "ForPreTraining"),
        (SPEECH, "ForCTC"),
        (STABLE | {"use_weighted_layer_sum": True}, "ForSequenceClassification"),
        (SPEECH, "ForXVector"),
        (DATA2VEC, "ForCTC"),
        (DATA2VEC | {"use_weighted_layer_sum": True}, "ForSequenceClassification"),
        (DATA2VEC, "ForXVector"),
    ],
)
def test_heads_and_prefix_are_put_aside(hub, head):
    model = in_pytorch(torch_and_transformers(), hub, head)
    config = Wav2Vec2Config.from_hub(hub)
    with_head = wav2vec2.convert(tensors_of(model), config)
    without = wav2vec2.convert(tensors_of(model.base_model), config)
    assert len(tensors_of(model)) > len(tensors_of(model.base_model))
    assert jax.tree.all(jax.tree.map(np.array_equal, with_head, without))


def test_both_spellings_of_weight_normalisation_give_pytorchs_weight():
    model = in_pytorch(torch_and_transformers(), SPEECH)
    config, new = Wav2Vec2Config.from_hub(SPEECH), tensors_of(model)
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in new.items()
    }
    assert old.keys() != new.keys()
    want = model.encoder.pos_conv_embed.conv.weight.detach().numpy().transpose(2, 1, 0)
    for tensors in (old, new):
        got = wav2vec2.convert(tensors, config)["position_0"]["kernel"]
        np.testing.assert_allclose(got, want, atol=1e-6)


@every_kind
def test_tensors_that_do_not_fit_are_named(hub):
    tensors = tensors_of(in_pytorch(torch_and_transformers(), hub))
    config, name = Wav2Vec2Config.from_hub(hub), "feature_projection.layer_norm.bias"
    with pytest.raises(AvjaxError, match=rf"missing: {name}; left over: surprise$"):
        wav2vec2.convert({n: t for n, t in tensors.items() if n != name} | {"surprise": np.ones(3)}, config)
    with pytest.raises(AvjaxError, match=r"left over: .*encoder\.layers\.1\."):
        wav2vec2.convert(tensors, dataclasses.replace(config, layers=1))
    convs = (*config.convs[:-1], (10, 3, 2))
    with pytest.raises(AvjaxError, match=r"conv_layers\.2\.conv\.weight: shape \(10, 6, 2\) does not fit"):
        wav2vec2.convert(tensors, dataclasses.replace(config, convs=convs))


def test_a_gain_without_its_direction_is_named():
    tensors = tensors_of(in_pytorch(torch_and_transformers(), SPEECH))
    gone = "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    del tensors[gone]
    with pytest.raises(AvjaxError, match=r"missing: encoder\.pos_conv_embed\.conv\.weight; left over: .*original0"):
        wav2vec2.convert(tensors, Wav2Vec2Config.from_hub(SPEECH))


# Configurations


def test_what_config_json_leaves_out_is_the_originals_default():
    transformers = torch_and_transformers()
    for hub, kind in [(SPEECH, transformers.Wav2Vec2Config), (DATA2VEC, transformers.Data2VecAudioConfig)]:
        settings = {k: v for k, v in hub.items() if k not in ("model_type", "num_conv_pos_embedding_groups")}
        short = settings | {"model_type": hub["model_type"]}
        assert Wav2Vec2Config.from_hub(short) == Wav2Vec2Config.from_hub(kind(**settings).to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"add_adapter": True}, "adapters .* are not supported"),
        ({"adapter_attn_dim": 16}, "adapters .* are not supported"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm is 'batch', expected 'group' or 'layer'"),
        ({"hidden_act": "mish"}, "activation 'mish'"),
        ({"feat_extract_activation": "mish"}, "activation 'mish'"),
        ({"conv_stride": [5, 2]}, "conv_dim, conv_kernel, conv_stride differ in length"),
    ],
)
def test_configs_that_are_not_computed_are_refused(change, message):
    with pytest.raises(AvjaxError, match=message):
        wav2vec2.build(SPEECH | change, jnp.float32, None)


@pytest.mark.parametrize("key", ["hidden_size", "conv_dim"])
def test_widths_are_required(key):
    with pytest.raises(AvjaxError, match=f"config.json of a wav2vec2 lacks {key}"):
        Wav2Vec2Config.from_hub({k: v for k, v in SPEECH.items() if k != key})


# Preprocessing


@pytest.mark.parametrize("settings", [{}, {"do_normalize": True}, {"do_normalize": False}])
def test_prepare_is_the_originals_feature_extractor(settings):
    transformers = torch_and_transformers()
    rng = np.random.default_rng(0)
    clips = [rng.normal(0.3, 0.02, n).astype(np.float32) for n in (5_000, 1, 16_001)] + [np.zeros(90, np.float32)]
    clips.append(rng.normal(0, 1, 700))  # float64
    waves, mask = wav2vec2.prepare(clips, settings)
    theirs = transformers.Wav2Vec2FeatureExtractor(**settings)(
        clips, sampling_rate=16_000, padding=True, return_attention_mask=True, return_tensors="np"
    )
    np.testing.assert_allclose(waves, theirs["input_values"], atol=1e-6, rtol=1e-6)
    np.testing.assert_array_equal(mask, theirs["attention_mask"].astype(bool))
    assert (waves.dtype, mask.dtype) == (np.float32, bool)
    assert not waves[~mask].any()


def test_prepare_takes_empty_clips_and_no_clips():
    waves, mask = wav2vec2.prepare([np.zeros(0, np.float32), np.ones(3, np.float32)], {})
    assert mask.tolist() == [[False] * 3, [True] * 3]
    assert not waves.any()
    assert [a.shape for a in wav2vec2.prepare([], {})] == [(0, 0), (0, 0)]


def test_prepare_refuses_channels_and_other_rates():
    with pytest.raises(AvjaxError, match=r"shapes \[\(2, 5\)\]: expected \(samples,\)"):
        wav2vec2.prepare([np.zeros(4), np.zeros((2, 5))], {})
    with pytest.raises(AvjaxError, match="sampling_rate is 8000, expected 16000"):
        wav2vec2.prepare([np.zeros(4)], {"sampling_rate": 8000})

"""Tests specific to Whisper: log-mel spectra, true lengths, checkpoints that carry a decoder, the real weights."""

import dataclasses
import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import encoders
from avjax.encoders import formats, weights, whisper
from avjax.encoders.whisper import Whisper, WhisperConfig
from avjax.errors import AvjaxError
from tests.originals import stirred
from tests.originals.whisper import KINDS, alone

HUB = {
    "model_type": "whisper",
    "num_mel_bins": 5,
    "d_model": 12,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 20,
    "max_source_positions": 12,
}
CONFIG = WhisperConfig.from_hub(HUB)


def random_params(config, seed=0):
    leaves, tree = jax.tree.flatten(whisper.shapes(config))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [rng.normal(0.3, 0.3, leaf.shape).astype(np.float32) for leaf in leaves])


compiled = jax.jit(Whisper(CONFIG).apply)


def run(spectra, mask):
    return compiled({"params": random_params(CONFIG)}, spectra, mask)


def noise(*lengths):
    rng = np.random.default_rng(1)
    return [rng.normal(0, 0.1, n).astype(np.float32) for n in lengths]


# Preprocessing


@pytest.fixture
def extractor(monkeypatch):
    """Transformers' processor in NumPy. In PyTorch, its other way, float32 costs it the digits of quiet bands."""
    from transformers.models.whisper import feature_extraction_whisper as original

    monkeypatch.setattr(original, "is_torch_available", lambda: False)

    def extract(waveform, **settings):
        made = original.WhisperFeatureExtractor(**settings)
        return made(waveform, sampling_rate=16000, padding="do_not_pad", return_tensors="np").input_features[0]

    return extract


@pytest.mark.parametrize("settings", [{}, {"feature_size": 128}])
def test_prepare_equals_the_original_clip_by_clip(extractor, settings):
    raw = [*noise(400, 559, 560, 16000, 30001), np.zeros(1000, np.float32), np.sin(np.arange(5000) / 9)]
    spectra, mask = whisper.prepare(raw, settings)
    assert (spectra.dtype, mask.dtype) == (np.float32, bool)
    np.testing.assert_array_equal(mask.sum(1), [len(waveform) // 160 for waveform in raw])
    assert not spectra[~np.broadcast_to(mask[:, None], spectra.shape)].any()
    for waveform, spectrum, real in zip(raw, spectra, mask, strict=True):
        np.testing.assert_allclose(spectrum[:, real], extractor(waveform, **settings), atol=1e-6, rtol=0)


def test_prepare_fills_up_what_is_shorter_than_a_window(extractor):
    for waveform in noise(1, 200, 399):
        spectra, mask = whisper.prepare([waveform], {})
        assert mask.tolist() == [[True, True]]
        want = extractor(np.pad(waveform, (0, 400 - len(waveform))))
        np.testing.assert_allclose(spectra[0], want, atol=1e-6, rtol=0)


def test_prepare_of_nothing_has_no_frame():
    spectra, mask = whisper.prepare([*noise(0, 800)], {})
    np.testing.assert_array_equal(mask.sum(1), [0, 5])
    assert not spectra[0].any()
    assert whisper.prepare([], {})[0].shape == (0, 80, 0)


@pytest.mark.parametrize(("settings", "seconds"), [({"chunk_length": 1}, 1), ({}, 30)])
def test_prepare_cuts_at_the_chunk_length(extractor, settings, seconds):
    (waveform,) = noise(seconds * 16000 + 777)
    spectra, mask = whisper.prepare([waveform], settings)
    assert mask.shape == (1, seconds * 100)
    np.testing.assert_allclose(spectra[0], extractor(waveform, **settings), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("raw", "settings", "message"),
    [
        (np.zeros((1, 800)), {"sampling_rate": 8000}, "sampling_rate is 8000, but only 16000"),
        (np.zeros((1, 800)), {"dither": 0.1}, "dither is 0.1"),
        (np.zeros((1, 800)), {"hop_length": 80}, "hop_length is 80"),
        (np.zeros((1, 800, 2)), {}, r"\(800, 2\), expected mono"),
    ],
)
def test_prepare_refuses_what_it_does_not_compute(raw, settings, message):
    with pytest.raises(AvjaxError, match=message):
        whisper.prepare(raw, settings)


# True length


@pytest.mark.parametrize("length", [7, 8])
def test_padding_of_any_length_and_content_changes_nothing(length):
    row = np.random.default_rng(0).normal(0, 1, (1, 5, length)).astype(np.float32)
    want, steps = run(row, np.ones((1, length), bool))
    assert steps.shape == (1, CONFIG.steps(length))
    for padding in (1, CONFIG.longest - length):
        spectra = np.pad(row, ((0, 0), (0, 0), (0, padding)), constant_values=np.nan)
        got, mask = run(spectra, np.arange(length + padding)[None] < length)
        assert mask.sum() == CONFIG.steps(length)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got[mask], want[0], atol=2e-5, rtol=0)


def test_rows_without_a_frame_are_finite():
    got, mask = run(np.full((2, 5, 6), np.nan, np.float32), np.zeros((2, 6), bool))
    assert np.isfinite(got).all()
    assert not mask.any()


def test_steps_are_those_of_the_original():
    pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import torch

    config = KINDS["whisper"].draw(random.Random(0))
    model = KINDS["whisper"].build(config)
    lengths = torch.arange(1, 2 * config.max_source_positions + 1)
    ours = WhisperConfig.from_hub(config.to_dict())
    want = model._get_feat_extract_output_lengths(lengths).tolist()
    assert [ours.steps(n) for n in lengths.tolist()] == want
    assert ours.steps(ours.longest) == ours.positions


@pytest.mark.parametrize("shape", [(1, 5, 25), (1, 4, 10)])
def test_spectra_too_long_or_of_other_bins_are_refused(shape):
    with pytest.raises(AvjaxError, match=rf"{re.escape(str(shape))}: expected \(batch, 5, up to 24 frames\)"):
        run(np.zeros(shape, np.float32), np.ones((1, shape[2]), bool))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_only_blocks_below_the_layer_are_computed_in_the_asked_precision(layer):
    module = whisper.build(HUB, jnp.bfloat16, layer)
    spectra, mask = jnp.ones((1, 5, 8)), jnp.ones((1, 8), bool)
    (features, _), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), spectra, mask)
    names = {"conv1", "conv2", "positions", *(f"block_{i}" for i in range(layer)), *(["norm"] if layer == 2 else [])}
    assert set(variables["params"]) == names
    assert features.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


# Checkpoints


def small_model(head="Model"):
    pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    config = KINDS["whisper"].draw(random.Random(3))
    config.use_weighted_layer_sum = True  # the classifier's layer_weights
    return stirred(getattr(transformers, f"Whisper{head}")(config), 0), WhisperConfig.from_hub(config.to_dict())


@pytest.mark.parametrize("head", ["Model", "ForConditionalGeneration", "ForAudioClassification"])
def test_decoder_heads_and_prefix_of_a_checkpoint_are_put_aside(tmp_path, head):
    model, config = small_model(head)
    model.save_pretrained(tmp_path)
    encoder = model.encoder if hasattr(model, "encoder") else model.model.encoder
    bare = {name: tensor.numpy() for name, tensor in encoder.state_dict().items()}
    full = formats.read(tmp_path / "model.safetensors")
    assert len(full) > len(bare)
    same = jax.tree.map(np.array_equal, whisper.convert(full, config), whisper.convert(bare, config))
    assert all(jax.tree.leaves(same))


def test_tensors_that_do_not_fit_are_named():
    model, config = small_model()
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    gone = "encoder.layers.0.final_layer_norm.weight"
    with pytest.raises(AvjaxError, match=r"missing: layers\.0\.final_layer_norm\.weight; left over: surprise$"):
        whisper.convert({n: t for n, t in tensors.items() if n != gone} | {"surprise": np.ones(3)}, config)
    with pytest.raises(AvjaxError, match=r"left over: layers\.\d+\.self_attn\.k_proj\.bias$"):
        whisper.convert(tensors | {"encoder.layers.0.self_attn.k_proj.bias": np.ones(config.width)}, config)
    with pytest.raises(AvjaxError, match=r"embed_positions\.weight: shape .* does not fit"):
        whisper.convert(tensors, dataclasses.replace(config, positions=config.positions + 1))


def test_what_old_files_leave_out_is_the_originals_default():
    transformers = pytest.importorskip("transformers")
    assert WhisperConfig.from_hub(HUB) == WhisperConfig.from_hub(transformers.WhisperConfig(**HUB).to_dict())


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        ({k: v for k, v in HUB.items() if k != "d_model"}, "of a whisper lacks d_model"),
        (HUB | {"activation_function": "mish"}, "'mish' is not known"),
    ],
)
def test_configs_that_are_not_computed_are_refused(hub, message):
    with pytest.raises(AvjaxError, match=message):
        whisper.build(hub, jnp.float32, None)


# The real weights


def read_audio(clip):
    av = pytest.importorskip("av", reason="the audio of real clips (extra media)")
    resampler = av.AudioResampler("flt", "mono", 16000)
    with av.open(str(clip)) as container:
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    return np.concatenate([frame.to_ndarray()[0] for frame in [*frames, *resampler.resample(None)]])


@pytest.fixture(scope="module")
def clip(java_sed):
    return read_audio(sorted(java_sed.rglob("*.mp4"))[0])


@pytest.fixture(scope="module", params=["whisper_tiny_en", pytest.param("whisper_base", marks=pytest.mark.thorough)])
def real(request):
    """An encoder, its file, and the hub's config.json."""
    hub = weights.REGISTRY[request.param].written["config.json"]
    try:
        return encoders.load(request.param, dtype="float32"), weights.fetch(request.param), hub
    except AvjaxError as error:
        pytest.skip(str(error))


def assert_close(got, want):
    """Real Whisper has a few steps so ill-conditioned that float32 leaves PyTorch itself 2.6e-4 to 2.6e-3 from float64
    there, by processor.
    """
    error = np.abs(got - want) / want.std()
    assert error.max() <= 2e-3
    assert np.sqrt(np.square(error).mean()) <= 1e-5


@pytest.mark.weights
@pytest.mark.parametrize(
    "samples", [None, pytest.param(30 * 16000, marks=pytest.mark.thorough)], ids=["true length", "30 s"]
)
def test_real_whisper_equals_pytorch_on_a_real_clip(real, clip, samples):
    torch = pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    import transformers

    enc, file, hub = real
    tensors = formats.read(file)
    both = {
        "decoder_layers": hub["encoder_layers"],
        "decoder_attention_heads": hub["encoder_attention_heads"],
        "decoder_ffn_dim": hub["encoder_ffn_dim"],
        "vocab_size": len(tensors["proj_out.weight"]),
    }
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**hub, **both)).eval()
    model.load_state_dict({name: torch.tensor(t, dtype=torch.float32) for name, t in tensors.items()})
    spectra, mask = enc.prepare([np.pad(clip, (0, samples - len(clip))) if samples else clip])
    got, _ = enc(spectra, mask)
    assert_close(got[0], alone(model.model.encoder.double(), spectra[0].astype(np.float64)))


@pytest.mark.weights
def test_real_whisper_equals_ctranslate2_on_its_own_file(real, clip, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="the second reference, which no extra brings")
    enc, file, _ = real
    (tmp_path / "model.bin").symlink_to(file)
    (tmp_path / "config.json").write_text("{}")
    words = len(formats.read(file)["proj_out.weight"])
    (tmp_path / "vocabulary.json").write_text(json.dumps([f"<{i}>" for i in range(words)]))
    model = ctranslate2.models.Whisper(str(tmp_path), device="cpu", compute_type="float32")
    spectra, mask = enc.prepare([np.pad(clip, (0, 30 * 16000 - len(clip)))])
    want = np.array(model.encode(ctranslate2.StorageView.from_array(spectra), to_cpu=True))
    assert_close(enc(spectra, mask)[0], want)

"""The encoders' own inputs instead of their features, from clips to batches; the encoders are small and random."""

import dataclasses
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import config, encoders
from avjax.encoders import images
from avjax.errors import AvjaxError
from avjax.evaluation import baselines
from avjax.features import clip as clip_features
from avjax.features import encode, presets, provenance
from avjax.features import store as stores
from avjax.features.face_video import Raw
from avjax.features.packed import Packed
from avjax.features.provenance import Key
from avjax.inference import predict as prediction
from avjax.inference import run as runs
from avjax.training import batches, loop, streamed_batches
from tests import clips, synthetic
from tests.features.test_presets import CLASSES, data, extract, tiny  # noqa: F401
from tests.training.test_loop import SMALL
from tests.training.test_streamed import Run, chosen, near

torch = pytest.importorskip("torch", reason="the encoders' files are made by PyTorch (extra parity)")
import transformers  # noqa: E402

FACES = 3  # of the seven clips, those that show one
# Two kinds of means and deviations, and the variants of preprocessing.
SETTINGS = [
    ("ViTImageProcessor", {}),
    ("BitImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}),
    ("EfficientNetImageProcessor", {"size": 24}),
    ("ViTImageProcessor", {"do_normalize": False, "rescale_offset": True, "rescale_factor": 1 / 127.5}),
    ("ViTImageProcessor", {"do_rescale": False, "do_normalize": False}),
]


def encoder(kind):
    return encoders.load(kind.source, layer=kind.layer, pool=kind.pool)


@pytest.fixture(scope="module")
def raw(tiny, tmp_path_factory):  # noqa: F811
    """A preset of the inputs of three small encoders, and the same with their features; audio is waveforms."""
    image = dataclasses.replace(tiny.image, every=1)
    return dataclasses.replace(tiny, frames=3, image=image, face=False, max_seconds=0.7, max_tokens=9, raw=True)


@pytest.fixture(scope="module")
def spectral(raw, tmp_path_factory):
    """The same with spectra as audio."""
    root = tmp_path_factory.mktemp("whisper")
    small = {"d_model": 12, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    shape = transformers.WhisperConfig(num_mel_bins=8, max_source_positions=100, decoder_layers=1, **small)
    torch.manual_seed(0)
    transformers.WhisperModel(shape).save_pretrained(root)
    (root / "preprocessor_config.json").write_text('{"feature_size": 8}')
    return dataclasses.replace(raw, speech=presets.Encoding(str(root), per_second=10))


@pytest.fixture(scope="module")
def packed(data, raw, spectral, tmp_path_factory):  # noqa: F811
    """A store with inputs and with the encoders' features of them: preset → clip → example."""
    out = tmp_path_factory.mktemp("store")
    wanted = {"raw": raw, "spectral": spectral, "encoded": dataclasses.replace(raw, raw=False)}
    made = {}
    for name, preset in wanted.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(presets.PRESETS, name, preset)
            if preset.raw:
                patch.setattr(encoders.Encoder, "on_device", None)  # no encoder is run
            made[name] = extract(data, out, name)
    return out, made


@pytest.mark.budget(20)
def test_streams_are_what_the_encoders_read(packed):
    _, made = packed
    assert len(made["raw"]) == 7
    for clip in made["raw"].values():
        assert (clip["video"].shape[1:], clip["video"].dtype) == ((32, 32, 3), np.uint8)
        assert (clip["audio"].shape[1:], clip["audio"].dtype) == ((1,), np.float32)
        assert len(clip["audio"]) == len(clip["audio_mask"]) <= 0.7 * 16000
        assert clip["audio_mask"].all()
        assert len(clip["video"]) == len(clip["video_mask"]) == len(clip["times"]) <= 3
        assert not clip["video"][~clip["video_mask"]].any()
        for ids in clip["text"].values():
            assert (ids.shape[1:], ids.dtype) == ((1,), np.int32)
            assert len(ids) <= 9
    assert max(len(clip["text"]["both"]) for clip in made["raw"].values()) == 9, "longer ones are cut"
    assert sum(clip["video_mask"].all() and len(clip["video"]) == 3 for clip in made["raw"].values()) == FACES
    for lacking in ("mute", "silent"):
        assert len(made["raw"][lacking]["audio"]) == len(made["spectral"][lacking]["audio"]) == 0
    assert made["raw"]["voice"]["video"].shape == (0, 32, 32, 3)
    assert made["raw"]["voice"]["audio"].shape == (11200, 1), "seven tenths of a second"
    assert made["spectral"]["voice"]["audio"].shape == (70, 8), "a frame every 10 ms"
    assert made["spectral"]["voice"]["audio"].dtype == np.float32


def test_audio_is_prepared(packed, raw, spectral, data):  # noqa: F811
    samples = clip_features.audio.read_audio(data / "voice.wav", clip_features.audio.Sampling(max_seconds=0.7))
    waves, mask = encoder(raw.speech).prepare([samples])
    np.testing.assert_array_equal(packed[1]["raw"]["voice"]["audio"], waves[0][:, None])
    spectra, _ = encoder(spectral.speech).prepare([samples])
    np.testing.assert_array_equal(packed[1]["spectral"]["voice"]["audio"], spectra[0].T)
    assert mask.all()
    assert waves.std() == pytest.approx(1, abs=1e-3)


def test_encoders_turn_stored_inputs_into_the_features_of_the_encoded_preset(packed, raw):
    _, made = packed
    image, speech, text = (encoder(kind) for kind in (raw.image, raw.speech, raw.text))
    near = {"atol": 2e-3, "rtol": 2e-3}  # features are stored in half precision
    for clip_id, clip in made["raw"].items():
        want = made["encoded"][clip_id]
        if clip["video_mask"].any():
            got, _ = image(images.normalised(clip["video"], image.settings))
            np.testing.assert_allclose(got[clip["video_mask"]], want["video"][want["video_mask"]], **near)
        if len(clip["audio"]):
            got, real = speech(clip["audio"][None, :, 0])
            means = encode.of_speech(got[real], len(clip["audio"]) / 16000, raw.speech.per_second)["steps"]
            np.testing.assert_allclose(means, want["audio"], **near)
        for source, ids in clip["text"].items():
            got = text(ids[None, :, 0])[0][0] if len(ids) else np.zeros((0, 12))
            np.testing.assert_allclose(got, want["text"][source], **near)


@pytest.mark.parametrize(("processor", "settings"), SETTINGS)
@pytest.mark.parametrize("shape", [(4, 30, 25, 3), (2, 33, 41, 3)])
def test_images_are_normalised_on_the_device_as_on_the_host(processor, settings, shape):
    frames = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    framed = images.framed(frames, settings, processor)
    want = images.prepare(frames, settings, processor)
    assert (framed.dtype, framed.shape) == (np.uint8, want.shape)
    bound = 2e-6 * max(1, np.abs(want).max() / 4)
    for function in (images.normalised, jax.jit(lambda *a: images.normalised(*a, settings, processor))):
        got = function(framed[None]) if function is not images.normalised else function(framed, settings, processor)
        np.testing.assert_allclose(np.asarray(got).reshape(want.shape), want, rtol=0, atol=bound)


def test_normalising_subtracts_the_mean_of_each_channel_and_divides_by_its_deviation():
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    frames = np.random.default_rng(1).integers(0, 256, (2, 3, 5, 4, 3)).astype(np.uint8)
    got = images.normalised(jnp.asarray(frames), {"image_mean": mean, "image_std": std})
    np.testing.assert_allclose(got, (frames / 255.0 - np.array(mean)) / np.array(std), rtol=0, atol=2e-6)
    assert got.dtype == jnp.float32


def test_texts_become_ids_and_an_empty_one_has_none(raw):
    text = encoder(raw.text)
    texts = ["The pitch is their pitch", "", "the pitch the pitch the pitch the pitch the pitch the pitch"]
    short, empty, long = encode.tokenize_texts(text, texts, 9)
    assert short.tolist() == [[5], [6], [7], [2], [6]]
    assert (empty.shape, empty.dtype) == ((0, 1), np.int32)
    assert long.tolist() == [[5], [6]] * 4 + [[5]]


def test_loaded_and_read_from_disk_they_keep_their_types(packed):
    out, made = packed
    loaded = stores.load(out, "raw")
    assert loaded.arrays["video"].dtype == np.uint8
    assert loaded.arrays["text_both"].dtype == np.int32
    assert loaded.arrays["audio"].dtype == np.float32
    together = batches.streams_of(loaded, "both")
    read = Packed(out, "folder", "raw", loaded.clips, "both")
    for i, clip_id in enumerate(loaded.ids):
        for key, array in read[i].items():
            assert array.dtype == together[key].dtype, key
            np.testing.assert_array_equal(array, together[key][i], err_msg=key)
        ids = made["raw"][clip_id]["text"]["both"]
        np.testing.assert_array_equal(loaded.arrays["text_both"][i, : len(ids)], ids)
        assert loaded.masks["text_both"][i].sum() == len(ids)


def test_a_prediction_uses_the_same_streams(packed, raw):
    out, made = packed
    loaded = stores.load(out, "raw")
    run = types.SimpleNamespace(dataset="folder", task="single", classes=CLASSES, text_source="both")
    asked = [dict(made["raw"][clip_id]) for clip_id in loaded.ids]
    features = prediction._features(run, loaded.clips, asked)
    for name, array in loaded.arrays.items():
        np.testing.assert_array_equal(features.arrays[name], array, err_msg=name)
        np.testing.assert_array_equal(features.masks[name], loaded.masks[name], err_msg=name)


def test_what_is_staged_is_not_staged_again_whatever_encoders_compute_in(packed, raw, data, monkeypatch):  # noqa: F811
    out, _ = packed
    staged = {p: p.stat().st_mtime_ns for p in out.glob("staged/*/*")}
    monkeypatch.setitem(presets.PRESETS, "raw", raw)
    monkeypatch.setattr("avjax.encoders.loading.default_dtype", lambda: "bfloat16")
    monkeypatch.setattr("avjax.media.faces.FaceTracker.track", None)
    extract(data, out, "raw")
    assert {p: p.stat().st_mtime_ns for p in out.glob("staged/*/*")} == staged
    assert not list(out.glob("scratch/*"))


def test_provenance_tells_inputs_from_features_and_leaves_those_of_before_alone(raw):
    weights = {"sha256": "abc"}
    for feature in provenance.CODE_VERSION:
        before = provenance.described(feature, dataclasses.replace(raw, raw=False), **weights)
        assert "raw" not in before["settings"]
        now = provenance.described(feature, raw, **weights)
        inputs = {"raw": True} if feature in ("image", "speech", "text") else {}
        assert now == before | {"settings": before["settings"] | inputs}


def test_raw_presets_are_there_by_name():
    for name, of in (("open_raw", "open"), ("etg_raw", "etg")):
        made, encoded = presets.preset(name), presets.preset(of)
        assert config.settings(f"configs/extract_folder.py:{name}").preset == name
        assert config.settings(f"configs/etg_folder.py:{name}").preset == name
        assert (made.frames, made.image.every, made.max_seconds) == (8, 1, 10)
        assert {k: e.source for k, e in presets.encodings(made).items()} == {
            k: e.source for k, e in presets.encodings(encoded).items()
        }
        assert made.text == encoded.text
    for made in presets.PRESETS.values():
        assert not (made.raw and (made.face or made.flow or made.window)), "these go with features"


def test_weights_drawn_at_random_prepare_inputs_too(tmp_path):
    store, clock = stores.Store(tmp_path), encode.Stopwatch()
    made = encode.stages(presets.preset("etg_raw", random=True), store, clock, "x")
    keys = {feature: Key(stage.key, "made-up") for feature, stage in made.items()}
    heard, nothing = Raw(samples=np.sin(np.arange(4000.0)).astype(np.float32)), np.zeros(0, bool)
    made["speech"].add(encode.Unencoded("c", keys["speech"], heard, nothing))
    made["image"].add(encode.Unencoded("c", keys["image"], Raw(), nothing))
    for stage in made.values():
        stage.close()
    wave = store.get("c", "speech", keys["speech"])["steps"]
    assert (wave.shape, wave.dtype) == ((4000, 1), np.float32)
    frames = store.get("c", "image", keys["image"])["steps"]
    assert (frames.shape, frames.dtype) == ((0, 224, 224, 3), np.uint8)
    record = (tmp_path / "provenance" / f"{made['speech'].key}.json").read_text()
    assert "random, seed 0" in record


def test_gradients_reach_the_params_of_an_encoder_from_stored_images(packed, raw):
    image = encoder(raw.image)
    clip = next(c for c in packed[1]["raw"].values() if c["video_mask"].all() and len(c["video"]))

    @jax.jit
    @jax.grad
    def slope(params):
        frames = images.normalised(jnp.asarray(clip["video"]), image.settings)
        steps, _ = image.module.apply({"params": params}, frames, jnp.asarray(clip["video_mask"]))
        return jnp.sum(steps[:, 0, 0])

    gradients = slope(image.params)
    kernel = np.asarray(gradients["patches"]["kernel"])
    assert np.abs(kernel).max() > 1e-6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def resident(packed, preset, standardise="none"):
    return batches.resident(stores.load(packed[0], preset), "both", standardise)


def test_a_model_of_frames_can_read_them(packed):
    model = dataclasses.replace(SMALL, streams=("text", "audio", "video"), frame_stream="video")
    loop.check_streams(model, resident(packed, "raw"), "raw")


def test_baselines_read_spectra_and_neither_images_nor_token_ids(packed):
    data_on_device = resident(packed, "spectral", "train")
    pooled = baselines.pooled(data_on_device)
    assert pooled.keys() == {"surface", "audio"}
    x, mask = (np.asarray(data_on_device.streams[key]) for key in ("audio", "audio_mask"))
    for row, steps, real in zip(pooled["audio"], x, mask, strict=True):
        steps = steps[real] if real.any() else np.zeros((1, 8))
        np.testing.assert_allclose(row, np.concatenate([steps.mean(0), steps.std(0)]), atol=1e-5)


@pytest.mark.parametrize("preset", ["raw", "spectral"])
def test_without_standardisation_streams_enter_as_they_are(packed, preset):
    loaded = stores.load(packed[0], preset)
    data_on_device = resident(packed, preset)
    stats = jax.jit(batches.lane_statistics)(data_on_device, jnp.ones(7))
    assert stats == {}
    batch = jax.jit(batches.gather)(data_on_device, stats, jnp.arange(7), jnp.ones(7))
    for stream, name in (("video", "video"), ("audio", "audio"), ("text", "text_both")):
        np.testing.assert_array_equal(batch[stream], loaded.arrays[name])
        np.testing.assert_array_equal(batch[f"{stream}_mask"], loaded.masks[name])


def test_without_standardisation_streamed_clips_have_no_statistics_either(packed):
    settings = config.settings("configs/etg_folder.py", protocol__standardise="none", data__mode="streamed")
    data_on_device = streamed_batches.choose(stores.load(packed[0], "raw", on_disk=True), settings)
    assert data_on_device.groups == 0
    assert streamed_batches.statistics(data_on_device, np.ones((2, 7))) == {}


def test_standardised_training_leaves_images_and_token_ids_alone(packed):
    data_on_device = resident(packed, "raw", "train")
    assert batches.lane_statistics(data_on_device, jnp.ones(7)).keys() == {"audio"}


@pytest.mark.thorough
def test_training_without_standardisation_is_alike_resident_and_streamed():
    made = synthetic.make(signal=2.0)
    ways = ("resident", "streamed")
    runs = [Run(made, chosen(mode, protocol__standardise="none")).train() for mode in ways]
    assert [run.state.stats for run in runs] == [{}, {}]
    near(*(run.state.params for run in runs))
    standardised = Run(made, chosen("resident")).train()
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), runs[0].state.params, standardised.state.params)
    assert max(jax.tree.leaves(apart)) > 1e-4


def test_a_run_without_standardisation_predicts_new_clips(tmp_path):
    runs.check_statistics(tmp_path, chosen("streamed", protocol__standardise="none"))
    with pytest.raises(AvjaxError, match="standardise is 'speaker'; such a run needs the feature statistics"):
        runs.check_statistics(tmp_path, chosen("streamed", protocol__standardise="speaker"))


@pytest.mark.slow
@pytest.mark.weights
def test_real_clips_give_the_features_of_the_same_frames(java_sed, tmp_path, monkeypatch):
    taken = sorted((java_sed / "mp4").rglob("*.mp4"))[::40]
    for path in taken:
        shutil.copy(path, tmp_path / path.name)
    clips.write_wav(tmp_path / "voice.wav")
    rows = [f"{p.name},{CLASSES[i % 2]}" for i, p in enumerate([*taken, tmp_path / "voice.wav"])]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *rows]) + "\n")
    raw = presets.preset("open_raw")
    speech = dataclasses.replace(raw.speech, per_second=0)
    monkeypatch.setitem(presets.PRESETS, "open_encoded", dataclasses.replace(raw, speech=speech, raw=False))
    inputs, want = (extract(tmp_path, tmp_path / "F", name) for name in ("open_raw", "open_encoded"))
    image, speech, text = (encoder(kind) for kind in (raw.image, speech, raw.text))
    for clip_id, clip in inputs.items():
        if shown := clip["video_mask"].any():
            got, _ = image(images.normalised(clip["video"], image.settings))
            assert cosine(got[clip["video_mask"]], want[clip_id]["video"][clip["video_mask"]]) > 0.99999
        assert shown == (clip_id != "voice")
        got, real = speech(clip["audio"].T[None])
        assert cosine(got[real], want[clip_id]["audio"]) > 0.99999
        got, _ = text(clip["text"]["both"][None, :, 0])
        assert cosine(got[0], want[clip_id]["text"]["both"]) > 0.99999


def cosine(a, b):
    """The least of the rows."""
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    return ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min()

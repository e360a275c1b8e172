"""Presets with encoders, from clips to packed features and back through predict; the encoders are small and random."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from avjax import config, train
from avjax.demo import corpus
from avjax.encoders import weights
from avjax.features import clip as clip_features
from avjax.features import encode, presets, tfds
from avjax.features import extract as extraction
from avjax.features import store as stores
from avjax.inference import predict as prediction
from avjax.inference import run as runs
from tests import clips

torch = pytest.importorskip("torch", reason="the encoders' files are made by PyTorch (extra parity)")
import transformers  # noqa: E402

CLASSES = ("angry", "happy")


def write_tokenizer(folder):
    import tokenizers

    vocabulary = {"[UNK]": 0, "[PAD]": 1, "their": 2, "facial": 3, "expressions": 4, "the": 5, "pitch": 6, "is": 7}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))


def write_encoders(root, vit, wav2vec2, bert):
    """Folders of random weights in the hub's layout, one for each configuration of transformers."""
    torch.manual_seed(0)
    transformers.ViTModel(vit, add_pooling_layer=False).save_pretrained(root / "image")
    size = {"height": vit.image_size, "width": vit.image_size}
    (root / "image" / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    transformers.AutoModel.from_config(wav2vec2).save_pretrained(root / "speech")
    (root / "speech" / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    transformers.AutoModel.from_config(bert).save_pretrained(root / "text")
    write_tokenizer(root / "text")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A preset of three small encoders."""
    root = tmp_path_factory.mktemp("encoders")
    common = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    vit = transformers.ViTConfig(image_size=32, patch_size=8, **common)
    wav2vec2 = transformers.Wav2Vec2Config(
        conv_dim=[8] * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, **common
    )
    write_encoders(root, vit, wav2vec2, transformers.BertConfig(vocab_size=8, max_position_embeddings=64, **common))
    return presets.Preset(
        frames=6,
        image=presets.Encoding(str(root / "image"), pool="first", every=2),
        speech=presets.Encoding(str(root / "speech"), layer=1, per_second=10),
        text=presets.Encoding(str(root / "text")),
        max_tokens=32,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three clips with a face, one without audio, one without a face, one of audio alone, one that is silent."""
    root = tmp_path_factory.mktemp("data")
    plans = corpus.plans()[:3]
    for plan in plans:
        corpus.write_clip(root, plan)
    names = [str(corpus.clip_path(root, plan).relative_to(root)) for plan in plans]
    clips.write_mp4(root / "mute.mp4", hz=None)
    clips.write_mp4(root / "faceless.mp4")
    clips.write_wav(root / "voice.wav")
    clips.write_mp4(root / "silent.mp4", hz=0)
    names += ["mute.mp4", "faceless.mp4", "voice.wav", "silent.mp4"]
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *((n, CLASSES[i % 2]) for i, n in enumerate(names))])
    return root


@pytest.fixture
def preset(tiny, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", tiny)
    return tiny


def extract(data, out, preset="tiny"):
    extraction.extract("folder", preset, root=str(data), out=str(out), options=extraction.Options(processes=1))
    return {e["clip_id"].decode(): e for e in tfds.read(out, "folder", preset)}


@pytest.fixture(scope="module")
def packed(data, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny", tiny)
        return out, extract(data, out)


@pytest.mark.budget(14)
def test_streams_are_those_of_the_encoders(packed):
    _, made = packed
    assert len(made) == 7
    face = len(clip_features.faces.BLENDSHAPES) + len(clip_features.faces.AU_NAMES) + 6
    for clip in made.values():
        assert clip["video"].shape[1] == 12 + face
        assert clip["audio"].shape[1] == 12
        assert clip["video"].dtype == clip["audio"].dtype == clip["text"]["both"].dtype == np.float16
        assert len(clip["video"]) == len(clip["video_mask"]) == len(clip["times"]) <= 3
        assert not clip["video"][~clip["video_mask"]][:, :12].any()
    faces = [c for i, c in made.items() if "/" in i]
    assert len(faces) == 3
    for clip in faces:
        assert clip["video_mask"].all()
        assert len(clip["video"]) == 3
        assert np.abs(clip["video"][:, :12]).min() > 0
        assert len(clip["audio"]) == pytest.approx(10 * clip["duration"], abs=3)
    for lacking in ("mute", "silent"):
        assert len(made[lacking]["audio"]) == 0
    assert not made["faceless"]["video_mask"].any()
    assert made["faceless"]["audio_mask"].all()


def test_time_and_precision_are_recorded(packed):
    out, made = packed
    timings = json.loads((out / "timings.json").read_text())
    assert timings["clips"] == len(made)
    assert {"decoding", "faces", "acoustics", "writing", "packing"} < timings["spent"].keys()
    assert len(timings["spent"]) == 8, "and each of three encoders"
    assert all(0 < seconds < timings["seconds"] * 2 for seconds in timings["spent"].values())
    records = [json.loads(p.read_text()) for p in (out / "provenance").iterdir()]
    measured = {r["feature"]: r["measured"] for r in records if "measured" in r}
    assert measured.keys() == {"image", "speech", "text"}
    for noted in measured.values():
        assert noted["stored"] == "float16"
        assert 0.99999 < noted["cosine_to_float32"]["least"] <= noted["cosine_to_float32"]["mean"] <= 1 + 1e-9


@pytest.mark.thorough
def test_accelerators_get_batches_and_clips_the_same_features(packed, data, preset, tmp_path, monkeypatch):
    _, alone = packed
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("avjax.encoders.loading.default_dtype", lambda: "float32")
    monkeypatch.setattr(encode, "CLIPS", 2)
    seen = []
    real = encode._joined
    monkeypatch.setattr(encode, "_joined", lambda group, rows: seen.append((len(group), rows)) or real(group, rows))
    together = extract(data, tmp_path / "F")
    assert {rows for _, rows in seen} == {2, 6}, (
        "every batch of an encoder has the same rows: two clips, of three images or one audio signal each"
    )
    assert {clips for clips, _ in seen} == {1, 2}
    for clip_id, clip in alone.items():
        for stream in ("video", "audio"):
            np.testing.assert_allclose(together[clip_id][stream], clip[stream], atol=2e-3, rtol=2e-3)


@pytest.mark.thorough
def test_a_lower_precision_is_recorded(preset, data, tmp_path, monkeypatch):
    monkeypatch.setattr("avjax.encoders.loading.default_dtype", lambda: "bfloat16")
    extract(data, tmp_path / "F")
    records = [json.loads(p.read_text()) for p in (tmp_path / "F" / "provenance").iterdir()]
    cosines = [r["measured"]["cosine_to_float32"]["least"] for r in records if "measured" in r]
    assert len(cosines) == 3
    assert all(0.99 < c < 0.999999 for c in cosines), "of bfloat16 to float32, not of float32 to itself"


def test_another_encoder_is_added_without_measuring_again(packed, data, preset, monkeypatch):
    out, _ = packed
    before = {p: p.stat().st_mtime_ns for p in out.glob("staged/*/video-*")}
    other = clip_features.dataclasses.replace(preset, image=clip_features.dataclasses.replace(preset.image, layer=1))
    monkeypatch.setitem(presets.PRESETS, "other", other)
    monkeypatch.setattr("avjax.media.faces.FaceTracker.track", None)
    made = extract(data, out, "other")
    assert {p: p.stat().st_mtime_ns for p in out.glob("staged/*/video-*")} == before
    assert sum(p.name.startswith("image-") for p in out.glob("staged/*/*")) == 2 * len(made)


@pytest.fixture
def window(tiny, monkeypatch):
    preset = clip_features.dataclasses.replace(tiny, image=None, speech=None, window=presets.Window(side=16))
    monkeypatch.setitem(presets.PRESETS, "window", preset)


@pytest.fixture(scope="module")
def measured(packed, tmp_path_factory):
    """A store where all but the window is staged."""
    root = tmp_path_factory.mktemp("measured")
    for part in ("staged", "provenance"):
        shutil.copytree(packed[0] / part, root / part)
    return root


def test_a_window_is_packed_as_images(measured, data, window):
    extract(data, measured, "window")
    loaded = stores.load(measured, "window")
    assert (loaded.arrays["video"].shape, loaded.arrays["video"].dtype) == ((7, 15, 16, 16, 3), np.uint8)
    assert (loaded.arrays["audio"].shape, loaded.arrays["audio"].dtype) == ((7, 156, 10), np.float32)
    real, heard = (dict(zip(loaded.ids, loaded.masks[s].sum(1), strict=True)) for s in ("video", "audio"))
    assert [real[clip_id] for clip_id in ("mute", "faceless", "voice", "silent")] == [0] * 4
    assert all(count > 2 for clip_id, count in real.items() if "/" in clip_id)
    assert heard["voice"] == pytest.approx(156 / 3.6, abs=2)
    assert heard["mute"] == heard["silent"] == 0


@pytest.mark.thorough
def test_a_window_is_taken_up_again(measured, data, window):
    extract(data, measured, "window")
    content = stores.load(measured, "window").content
    staged = {p: p.stat().st_mtime_ns for p in measured.glob("staged/*/*")}
    gone = [p for p in staged if p.name.startswith("window-")][::3]
    for path in gone:
        path.unlink()
    extract(data, measured, "window")
    assert all(path in gone or path.stat().st_mtime_ns == before for path, before in staged.items())
    assert len(gone) == 3
    assert all(path.exists() for path in gone)
    assert stores.load(measured, "window").content == content


@pytest.mark.thorough
def test_a_new_clip_is_predicted_from_the_features_of_training(packed, data, preset, tmp_path):
    from rich.console import Console

    out, _ = packed
    settings = config.settings(
        "configs/etg_folder.py",
        data__features=str(out),
        preset="tiny",
        protocol__fold_count=2,
        model__width=16,
        train__epochs=1,
        train__epochs_per_call=1,
        train__seeds=(1,),
    )
    train.train(settings, tmp_path / "W")
    run = runs.read_run(tmp_path / "W")
    stored = prediction.probabilities(run, stores.load(out, "tiny"))
    new_clips = prediction.find_clips([str(data / "voice.wav"), str(data / "faceless.mp4")])
    predictions, rejected = prediction.predict(run, new_clips, Console(quiet=True))
    assert not rejected
    ids = stores.load(out, "tiny").ids
    for clip_id, row in zip(("voice", "faceless"), predictions, strict=True):
        want = stored[ids.index(clip_id)]
        np.testing.assert_allclose(list(row.scores.values()), want, atol=1e-6)


KILLED = """
import pathlib, pickle, sys
from avjax.features import extract as extraction, presets
if __name__ == "__main__":
    presets.PRESETS["tiny"] = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
    extraction.extract("folder", "tiny", root=sys.argv[2], out=sys.argv[3], options=extraction.Options(processes=2))
"""


@pytest.mark.slow
def test_kill_while_encoding_loses_nothing(packed, data, preset, tmp_path):
    import pickle

    uninterrupted, _ = packed
    out = tmp_path / "F"
    (tmp_path / "preset").write_bytes(pickle.dumps(preset))
    (tmp_path / "main.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "preset"), str(data), str(out)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()})
    until = time.monotonic() + 120
    while not list(out.glob("staged/*/image-*.npz")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(out.glob("staged/*/image-*.npz"))
    assert not (out / "index.json").exists(), "it was too late to kill it"
    extract(data, out)
    contents = [stores.read_index(f)["presets"]["tiny"]["content"] for f in (uninterrupted, out)]
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_preset_etg_at_true_size_from_a_local_folder(data, tmp_path, monkeypatch):
    """No network: the three encoders of the paper, of random weights, as a user would put them there."""
    names = {"image": "vit_b16", "speech": "data2vec_audio", "text": "distilbert"}
    bert = transformers.DistilBertConfig()
    write_encoders(tmp_path, transformers.ViTConfig(), transformers.Data2VecAudioConfig(), bert)
    for feature, name in names.items():
        (tmp_path / feature).rename(tmp_path / name)
    model = transformers.Data2VecAudioModel.from_pretrained(tmp_path / "data2vec_audio")
    torch.save(model.state_dict(), tmp_path / "data2vec_audio" / "pytorch_model.bin")
    (tmp_path / "data2vec_audio" / "model.safetensors").unlink()
    (tmp_path / "face_landmarker").mkdir()
    landmarker = weights.fetch("face_landmarker")
    (tmp_path / "face_landmarker" / landmarker.name).symlink_to(landmarker)
    monkeypatch.setenv("AVJAX_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", None)
    made = extract(data, tmp_path / "F", "etg")
    assert len(made) == 7
    assert {c["video"].shape[1] for c in made.values()} == {768}
    voiced = made["voice"]
    assert voiced["audio"].shape == (49, 768), "20 ms steps of a second"
    assert voiced["text"]["both"].shape[1] == 768


@pytest.mark.slow
@pytest.mark.weights
def test_preset_open_on_a_clip(data, tmp_path):
    for name in ("vit_s14", "whisper_base", "minilm"):
        try:
            weights.fetch(name)
        except Exception as error:
            pytest.skip(str(error))
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(data / "voice.wav", one / "voice.wav")
    shutil.copy(next((data / "data" / "clips").glob("*.mp4")), one / "face.mp4")
    (one / "labels.csv").write_text("file,label\nvoice.wav,angry\nface.mp4,happy\n")
    made = extract(one, tmp_path / "F", "open")
    width = 384 + len(clip_features.faces.BLENDSHAPES) + len(clip_features.faces.AU_NAMES) + 6
    assert made["face"]["video"].shape == (8, width)
    assert made["face"]["audio"].shape[1] == made["voice"]["audio"].shape[1] == 512
    assert len(made["voice"]["audio"]) == 10, "ten steps of a second"

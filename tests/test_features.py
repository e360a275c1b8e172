"""One clip → its features: what is lacking is empty and said, a part has its own clock, keys follow what matters."""

import dataclasses
import os
import shutil

import clips
import numpy as np
import pytest

from avjax import features
from avjax.datasets.base import Clip
from avjax.errors import AvjaxError, UnusableMedia
from avjax.media.faces import Faces
from avjax.text import template

LITE = features.PRESETS["lite"]


class NoFace:
    """A tracker that never finds a face."""

    def track(self, frames) -> Faces:
        from avjax.media import faces

        return faces._empty(len(frames.times), several=0)


def measure(path, **columns):
    return features.measure(Clip("c", path, "sad", **columns), LITE, NoFace())


def test_clip_with_picture_and_sound(tmp_path):
    made = measure(clips.write_mp4(tmp_path / "a.mp4", seconds=2, hz=150))
    video, audio = made["video"], made["audio"]
    t, s = len(video["video"]), len(audio["audio"])
    assert t == LITE.frames
    assert video["video"].dtype == np.float32
    assert not video["video_mask"].any()
    assert video["au"].shape[0] == t
    assert video["why"] == "no face in any frame"
    np.testing.assert_allclose(video["times"], np.arange(20)[(2 * np.arange(16) + 1) * 20 // 32] / 10, atol=0.01)
    assert abs(s - 2 * LITE.steps_per_second) <= 2
    assert audio["audio_mask"].sum() >= s - 2
    assert audio["prosody"][0] == pytest.approx(150, rel=0.02)
    assert audio["seconds"] == pytest.approx(2, abs=0.15)
    assert audio["why"] == ""


def test_what_a_clip_lacks_has_no_steps_of_the_usual_width_and_is_said(tmp_path):
    full = measure(clips.write_mp4(tmp_path / "a.mp4"))
    mute = measure(clips.write_mp4(tmp_path / "b.mp4", hz=None))
    blind = measure(clips.write_wav(tmp_path / "c.wav"))
    silent = measure(clips.write_mp4(tmp_path / "d.mp4", hz=0))
    for lacking, kind, names in (
        (mute, "audio", ("audio", "audio_mask")),
        (blind, "video", ("video", "video_mask", "au", "times")),
    ):
        for name in names:
            assert lacking[kind][name].shape == (0, *full[kind][name].shape[1:])
            assert lacking[kind][name].dtype == full[kind][name].dtype
        assert "no " in str(lacking[kind]["why"])
        assert lacking[kind].keys() == full[kind].keys()
    assert mute["audio"]["prosody"].tolist() == [0, 0, 0]
    assert silent["audio"]["why"] == "digital silence"
    assert not silent["audio"]["audio_mask"].any()


def test_clip_with_neither_is_unusable(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no media")
    with pytest.raises(UnusableMedia, match=r"^not a media file[^;]*$"):
        measure(tmp_path / "a.mp4")
    with pytest.raises(UnusableMedia, match=r"^no such file$"):
        measure(tmp_path / "gone.mp4")


def test_part_of_a_file_is_on_its_own_clock(tmp_path):
    path = clips.write_mp4(tmp_path / "a.mp4", seconds=4)
    made = measure(path, start=2.0, end=3.0)
    np.testing.assert_allclose(made["video"]["times"], np.arange(10) / 10, atol=0.01)
    assert made["audio"]["seconds"] == pytest.approx(1, abs=0.01)
    text = {s: np.zeros((1, 4), np.float32) for s in features.TEXTS}
    record = features.example(Clip("c", path, "sad"), made["video"], made["audio"], text, dict.fromkeys(text, ""))
    assert record["duration"] == pytest.approx(1, abs=0.01)
    assert record["speaker"] == ""


def test_separate_sound_takes_the_place_of_the_one_in_the_file(tmp_path):
    path = clips.write_mp4(tmp_path / "a.mp4", hz=150)
    made = measure(path, audio=clips.write_wav(tmp_path / "a.wav", hz=300))
    assert made["audio"]["prosody"][0] == pytest.approx(300, rel=0.02)


def test_source_key_changes_with_the_file_and_the_part(tmp_path):
    one = clips.write_wav(tmp_path / "one.wav", hz=200)
    two = clips.write_wav(tmp_path / "two.wav", hz=300)
    assert one.stat().st_size == two.stat().st_size
    base = Clip("c", one, "sad", audio=two)
    variants = [{}, {"path": two}, {"audio": None}, {"audio": one}, {"start": 0.5}, {"end": 0.5}]
    keys = [features.source_key(dataclasses.replace(base, **v)) for v in variants]
    assert len(set(keys)) == len(keys)
    unchanged = dataclasses.replace(base, id="d", label="happy", speaker="ann", transcript="Oh.")
    assert features.source_key(unchanged) == keys[0]
    (tmp_path / "moved").mkdir()
    moved = dataclasses.replace(base, path=tmp_path / "moved/one.wav")
    shutil.copy2(one, moved.path)
    assert features.source_key(moved) == keys[0], "another folder is no other file"
    os.utime(one, ns=(1, 1))
    assert features.source_key(base) != keys[0], "written anew at the same size"
    one.unlink()
    with pytest.raises(FileNotFoundError):
        features.source_key(base)


def test_provenance_names_what_a_feature_depends_on_and_nothing_else():
    before = {f: features.provenance(f, LITE) for f in ("video", "audio", "text")}
    changes = {"frames": "video", "steps_per_second": "audio", "max_seconds": "audio", "text_encoder": "text",
               "max_tokens": "text"}  # fmt: skip
    assert changes.keys() == {f.name for f in dataclasses.fields(features.Preset)}
    for setting, touched in changes.items():
        other = dataclasses.replace(LITE, **{setting: 7})
        changed = {f for f in before if features.provenance(f, other) != before[f]}
        assert changed == {touched}, setting
    assert features.provenance("text", LITE, sha256="abc")["weights"] == {"sha256": "abc"}
    with pytest.raises(AvjaxError, match="preset is 'light'; choose one of lite"):
        features.preset("light")


def test_usual_pitch_needs_enough_clips_with_voice():
    heard = [("ann", 200.0), ("ann", 220.0), ("ann", 300.0), ("ann", 0.0), ("ben", 100.0), ("ben", 110.0), (None, 90.0)]
    assert features.speaker_pitch(heard) == {"ann": 220.0}


def test_sentences_of_a_clip():
    width = len(features.faces.AU_NAMES)
    still = {"au": np.zeros((4, width), np.float32), "video_mask": np.ones(4, bool)}
    spoken = {"prosody": np.array([200, 4, 0], np.float32)}
    made = features.describe(still, spoken, "Oh no.", 100.0)
    assert tuple(made) == template.SOURCES
    assert "Oh no" in made["both"]
    assert "high" in made["both"]
    assert "low" in features.describe(still, spoken, None, 400.0)["audio"]
    assert features.describe(still, {"prosody": np.zeros(3, np.float32)}, None, None)["audio"] == ""


def test_equal_texts_are_encoded_once_and_empty_ones_not_at_all():
    class Encoder:
        width = 2
        seen: tuple = ()

        def tokenize(self, texts, limit):
            self.seen += tuple(texts)
            mask = np.arange(limit)[None] < np.array([len(t) for t in texts])[:, None]
            return np.zeros(mask.shape, np.int32) + [[len(t)] for t in texts], mask

        def __call__(self, ids, mask):
            return np.repeat(ids[..., None], 2, -1).astype(np.float32), mask

    encoder = Encoder()
    tokens = features.encode_texts(encoder, ["bb", "", "a", "bb"], 3)
    assert encoder.seen == ("a", "bb")
    assert [t.shape for t in tokens] == [(2, 2), (0, 2), (1, 2), (2, 2)]
    assert [t.sum() for t in tokens] == [8, 0, 2, 8]
    assert [t.shape for t in features.encode_texts(encoder, [""], 3)] == [(0, 2)]


def test_face_landmarker_comes_from_the_registry(monkeypatch, tmp_path):
    from avjax.encoders import weights

    monkeypatch.setattr(weights, "fetch", lambda name: tmp_path / name)
    assert features.landmarker() == tmp_path / "face_landmarker"

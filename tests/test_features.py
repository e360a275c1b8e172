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
from avjax.progress import Stopwatch
from avjax.text import template

LITE = features.PRESETS["lite"]


class NoFace:
    """A tracker that never finds a face."""

    def track(self, frames) -> Faces:
        from avjax.media import faces

        return faces._empty(len(frames.times), several=0)


class Everywhere:
    """A tracker that finds the same face in all frames but the second."""

    def track(self, frames) -> Faces:
        from avjax.media import faces

        found = faces._empty(len(frames.times), several=0)
        found.found[:] = True
        found.boxes[:] = (4, 4, 24, 24)
        found.found[1:2], found.boxes[1:2] = False, 0
        return found


def measure(path, tracker=None, staged=None, wanted=(), **columns):
    clip = Clip("c", path, "sad", **columns)
    made, raw = features.measure(clip, LITE, tracker or NoFace(), Stopwatch(), staged, wanted)
    assert wanted or raw == features.Raw(None, None)
    return (made, raw) if wanted else made


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
    record = features.example(Clip("c", path, "sad"), LITE, made | {"text": text}, dict.fromkeys(text, ""))
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


def test_what_encoders_are_given(tmp_path):
    path = clips.write_mp4(tmp_path / "a.mp4", seconds=2)
    made, raw = measure(path, Everywhere(), wanted=("image", "sound"))
    found = made["video"]["video_mask"]
    assert found.sum() == LITE.frames - 1
    assert raw.crops.shape == (found.sum(), features.CROP, features.CROP, 3)
    first, last = made["audio"]["inside"]
    assert len(raw.samples) == last - first > 1.8 * 16000
    assert measure(path, Everywhere(), wanted=("image",))[1].samples is None
    assert measure(path, NoFace(), wanted=("image",))[1].crops is None
    silent = clips.write_mp4(tmp_path / "b.mp4", hz=0)
    assert measure(silent, wanted=("sound",))[1].samples is None


def test_each_second_frame_is_encoded_where_the_preset_says_so(tmp_path):
    path = clips.write_mp4(tmp_path / "a.mp4", seconds=2)
    half = dataclasses.replace(LITE, image=features.Encoding("any", every=2))
    made, raw = features.measure(Clip("c", path, "sad"), half, Everywhere(), Stopwatch(), None, ("image",))
    _, whole = measure(path, Everywhere(), wanted=("image",))
    shown = np.flatnonzero(made["video"]["video_mask"]) % 2 == 0
    np.testing.assert_array_equal(raw.crops, whole.crops[shown])
    assert len(raw.crops) == LITE.frames // 2


def test_what_is_staged_is_not_measured_again(tmp_path):
    path = clips.write_mp4(tmp_path / "a.mp4", seconds=2)
    made, raw = measure(path, Everywhere(), wanted=("image", "sound"))
    again, same = measure(path, tracker="none is needed", staged=made, wanted=("image", "sound"))
    assert again["video"] is made["video"]
    assert again["audio"] is made["audio"]
    np.testing.assert_array_equal(raw.crops, same.crops)
    np.testing.assert_array_equal(raw.samples, same.samples)
    path.unlink()
    assert measure(path, staged=made)["video"] is made["video"], "without need, no file is opened"


def test_encoded_frames_and_sound_as_they_are_staged():
    found = np.array([True, False, True])
    made = features.of_frames(np.array([[1.0, 2.0], [3.0, 4.0]]), found)["steps"]
    assert made.dtype == np.float16
    np.testing.assert_array_equal(made, [[1, 2], [0, 0], [3, 4]])
    steps = np.arange(12.0)[:, None]
    np.testing.assert_array_equal(features.of_sound(steps, 0.24, 0)["steps"], steps)
    # 50 steps a second to 10: means of five, and of the two that are left
    np.testing.assert_array_equal(features.of_sound(steps, 0.24, 10)["steps"], [[2], [7], [10.5]])
    assert features.of_sound(np.zeros((0, 4)), 0.0, 10)["steps"].shape == (0, 4)


def test_streams_of_a_preset_with_encoders(tmp_path):
    made = measure(clips.write_mp4(tmp_path / "a.mp4"), Everywhere())
    frames = len(made["video"]["video"])
    text = {s: np.zeros((1, 4), np.float16) for s in features.TEXTS}
    encoded = {
        "image": {"steps": np.ones((frames, 3), np.float16)},
        "sound": {"steps": np.ones((5, 2), np.float16)},
    }
    half = dataclasses.replace(LITE, image=features.Encoding("any", every=2))
    some = features.example(
        Clip("c", tmp_path / "a.mp4", "sad"),
        half,
        made | {"text": text} | {"image": {"steps": np.ones((-(-frames // 2), 3), np.float16)}},
        dict.fromkeys(text, ""),
    )
    assert len(some["video"]) == len(some["video_mask"]) == len(some["times"]) == -(-frames // 2)
    np.testing.assert_array_equal(some["times"], made["video"]["times"][::2])
    clip, words = Clip("c", tmp_path / "a.mp4", "sad"), dict.fromkeys(text, "")
    both = features.example(clip, LITE, made | encoded | {"text": text}, words)
    assert both["video"].shape == (frames, 3 + made["video"]["video"].shape[1])
    assert both["video"].dtype == np.float16
    assert both["audio"].shape == (5, 2)
    assert both["audio_mask"].all()
    np.testing.assert_array_equal(both["video_mask"], made["video"]["video_mask"])
    alone = features.example(clip, dataclasses.replace(LITE, face=False), made | encoded | {"text": text}, words)
    assert alone["video"].shape == (frames, 3)


def test_provenance_names_what_a_feature_depends_on_and_nothing_else():
    before = {f: features.provenance(f, LITE) for f in features.CODE_VERSION}
    changes = {
        "frames": (7, {"video", "image"}),
        "steps_per_second": (7, {"audio"}),
        "max_seconds": (7, {"audio", "sound"}),
        "image": (features.Encoding("a"), {"image"}),
        "sound": (features.Encoding("a"), {"sound"}),
        "text": (features.Encoding("a"), {"text"}),
        "max_tokens": (7, {"text"}),
        "face": (False, set()),
    }
    assert changes.keys() == {f.name for f in dataclasses.fields(features.Preset)}
    for setting, (value, touched) in changes.items():
        other = dataclasses.replace(LITE, **{setting: value})
        changed = {f for f in before if features.provenance(f, other) != before[f]}
        assert changed == touched, setting
    assert features.provenance("text", LITE, sha256="abc")["weights"] == {"sha256": "abc"}
    with pytest.raises(AvjaxError, match="preset is 'light'; choose one of lite, open, etg"):
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

"""One clip → its features: missing modalities are empty, a part has its own clock, keys follow what matters."""

import dataclasses
import os
import shutil

import numpy as np
import pytest

from avjax.datasets.base import Clip
from avjax.errors import AvjaxError, UnusableMedia
from avjax.features import clip as clip_features
from avjax.features import encode, face_video, presets, provenance
from avjax.media import faces, flow, video
from avjax.media.faces import Faces
from avjax.text import template
from avjax.utils.progress import Stopwatch
from tests import clips

LITE = presets.PRESETS["lite"]


class NoFace:
    """A tracker that never finds a face."""

    def track(self, frames, before=None) -> Faces:
        return faces._empty(len(frames.times), several=0)


class Everywhere:
    """A tracker that finds the same face in all frames but the second."""

    def track(self, frames, before=None) -> Faces:
        track = faces._empty(len(frames.times), several=0)
        track.present[:] = True
        track.boxes[:] = (4, 4, 24, 24)
        if before is None:
            track.present[1:2], track.boxes[1:2] = False, 0
        return track


def measure(path, tracker=None, staged=None, wanted=(), settings=LITE, **columns):
    clip = Clip("c", path, "sad", **columns)
    room = path.parent / "room"
    made, raw = clip_features.measure(
        clip, clip_features.Instruments(settings, tracker or NoFace(), Stopwatch(), room), staged, wanted
    )
    assert wanted or raw == clip_features.Raw()
    return (made, raw) if wanted else made


def spooled(spool):
    """All arrays of a spool."""
    return np.concatenate(list(spool.blocks(7)))


WITH_FACES = dataclasses.replace(LITE, image=presets.Encoding("any"))


def test_clip_with_video_and_audio(tmp_path):
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


def test_a_missing_modality_has_no_steps_of_the_usual_width_and_a_reason(tmp_path):
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
    text = {s: np.zeros((1, 4), np.float32) for s in clip_features.TEXTS}
    record = clip_features.example(Clip("c", path, "sad"), LITE, made | {"text": text}, dict.fromkeys(text, ""))
    assert record["duration"] == pytest.approx(1, abs=0.01)
    assert record["speaker"] == ""


def test_separate_audio_replaces_that_of_the_file(tmp_path):
    path = clips.write_mp4(tmp_path / "a.mp4", hz=150)
    made = measure(path, audio=clips.write_wav(tmp_path / "a.wav", hz=300))
    assert made["audio"]["prosody"][0] == pytest.approx(300, rel=0.02)


def test_source_key_changes_with_the_file_and_the_part(tmp_path):
    one = clips.write_wav(tmp_path / "one.wav", hz=200)
    two = clips.write_wav(tmp_path / "two.wav", hz=300)
    assert one.stat().st_size == two.stat().st_size
    base = Clip("c", one, "sad", audio=two)
    variants = [{}, {"path": two}, {"audio": None}, {"audio": one}, {"start": 0.5}, {"end": 0.5}]
    keys = [provenance.source_key(dataclasses.replace(base, **v)) for v in variants]
    assert len(set(keys)) == len(keys)
    unchanged = dataclasses.replace(base, id="d", label="happy", speaker="ann", transcript="Oh.")
    assert provenance.source_key(unchanged) == keys[0]
    (tmp_path / "moved").mkdir()
    moved = dataclasses.replace(base, path=tmp_path / "moved/one.wav")
    shutil.copy2(one, moved.path)
    assert provenance.source_key(moved) == keys[0], "another folder is no other file"
    os.utime(one, ns=(1, 1))
    assert provenance.source_key(base) != keys[0], "written anew at the same size"
    one.unlink()
    with pytest.raises(FileNotFoundError):
        provenance.source_key(base)


def test_what_encoders_are_given(tmp_path):
    path = clips.write_mp4(tmp_path / "a.mp4", seconds=2)
    made, raw = measure(path, Everywhere(), wanted=("image", "speech"), settings=WITH_FACES)
    present = made["video"]["video_mask"]
    assert present.sum() == LITE.frames - 1
    assert spooled(raw.images).shape == (present.sum(), 256, 256, 3)
    first, last = made["audio"]["inside"]
    assert len(raw.samples) == last - first > 1.8 * 16000
    assert measure(path, Everywhere(), wanted=("image",), settings=WITH_FACES)[1].samples is None
    assert measure(path, NoFace(), wanted=("image",), settings=WITH_FACES)[1].images is None
    silent = clips.write_mp4(tmp_path / "b.mp4", hz=0)
    assert measure(silent, wanted=("speech",))[1].samples is None


def test_every_second_frame_is_encoded(tmp_path):
    path = clips.write_mp4(tmp_path / "a.mp4", seconds=2)
    half = dataclasses.replace(LITE, image=presets.Encoding("any", every=2))
    made, raw = measure(path, Everywhere(), wanted=("image",), settings=half)
    _, full = measure(path, Everywhere(), wanted=("image",), settings=WITH_FACES)
    shown = np.flatnonzero(made["video"]["video_mask"]) % 2 == 0
    np.testing.assert_array_equal(spooled(raw.images), spooled(full.images)[shown])
    assert raw.images.count == LITE.frames // 2


def test_full_frames_are_encoded(tmp_path):
    path = clips.write_mp4(tmp_path / "a.mp4", seconds=2)
    full = dataclasses.replace(LITE, image=presets.Encoding("any", sees="frame", side=24, every=2))
    _, raw = measure(path, NoFace(), wanted=("image",), settings=full)
    frames = video.read_frames(path, count=LITE.frames).images[::2]
    np.testing.assert_array_equal(spooled(raw.images), video.shrunk(frames, 24))
    assert min(raw.images.shape[:2]) == 24
    assert clip_features.seen(np.zeros(LITE.frames, bool), full).all()


EVERY_FRAME = dataclasses.replace(
    LITE, frames=0, image=presets.Encoding("any"), flow=presets.Flow("dis", presets.Encoding("any"), side=32)
)


def test_every_frame_of_a_clip_comes_block_by_block(tmp_path):
    path = clips.write_mp4(tmp_path / "a.mp4", seconds=4)
    made, raw = measure(path, Everywhere(), wanted=("image",), settings=EVERY_FRAME)
    assert made["video"]["video"].shape[0] == 40  # ten a second, in blocks of 16
    assert made["video"]["video_mask"].tolist() == [True, False] + 38 * [True]
    assert raw.images.count == 39
    short = dataclasses.replace(EVERY_FRAME, max_seconds=1.5)
    assert len(measure(path, Everywhere(), settings=short)["video"]["times"]) == 15
    assert len(measure(path, Everywhere(), settings=short, start=3.0)["video"]["times"]) == 10


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (3, 1), (7, 7), (20, 1)])
def test_flow_of_a_pair_is_that_of_its_two_frames_alone(tmp_path, window, stride):
    path = clips.write_mp4(tmp_path / "a.mp4", seconds=4)
    settings = dataclasses.replace(
        EVERY_FRAME, flow=dataclasses.replace(EVERY_FRAME.flow, window=window, stride=stride)
    )
    made, raw = measure(path, Everywhere(), wanted=("flow",), settings=settings)
    frames, box = video.read_frames(path, count=40), np.array([[4, 4, 24, 24]], np.float32)
    ends = face_video.flow_ends(made["video"]["video_mask"], settings)
    assert ends.tolist() == [i for i in range(window, 40) if i % stride == 0 and i != 1]
    flows = spooled(raw.flows)
    assert len(flows) == len(ends)
    for k in (0, len(ends) // 2, len(ends) - 1):
        pair = [
            faces.crops(video.Frames(frames.images[[i]], frames.times[[i]]), np.ones(1, bool), box, 32)
            for i in (ends[k] - window, ends[k])
        ]
        np.testing.assert_array_equal(flows[k], flow.dis(*pair)[0].astype(np.float16))
    pairs = dataclasses.replace(settings, flow=dataclasses.replace(settings.flow, source="an encoder"))
    given = spooled(measure(path, Everywhere(), wanted=("flow",), settings=pairs)[1].flows)
    np.testing.assert_array_equal(given[k], np.concatenate(pair))


def test_what_is_staged_is_not_measured_again(tmp_path):
    path = clips.write_mp4(tmp_path / "a.mp4", seconds=4)
    everything = ("image", "flow", "speech")
    made, raw = measure(path, Everywhere(), wanted=everything, settings=EVERY_FRAME)
    again, same = measure(path, "none is needed", made, everything, EVERY_FRAME)
    assert again["video"] is made["video"]
    assert again["audio"] is made["audio"]
    np.testing.assert_array_equal(spooled(raw.images), spooled(same.images))
    np.testing.assert_array_equal(spooled(raw.flows), spooled(same.flows))
    np.testing.assert_array_equal(raw.samples, same.samples)
    path.unlink()
    assert measure(path, staged=made)["video"] is made["video"], "without need, no file is opened"


def test_each_frame_holds_the_last_flow_that_ended():
    encoded = np.array([[9.0], [1], [2]])  # of no motion, then two flows
    present = np.array([True, True, True, False, True])
    steps = encode.of_flow(encoded, present, np.array([1, 3]))["steps"]
    assert steps.dtype == np.float16
    assert steps[:, 0].tolist() == [9, 1, 1, 0, 2]
    assert encode.of_flow(encoded[:1], present[:2], np.zeros(0, int))["steps"][:, 0].tolist() == [9, 9]


def test_encoded_frames_and_audio_as_they_are_staged():
    present = np.array([True, False, True])
    made = encode.of_frames(np.array([[1.0, 2.0], [3.0, 4.0]]), present)["steps"]
    assert made.dtype == np.float16
    np.testing.assert_array_equal(made, [[1, 2], [0, 0], [3, 4]])
    steps = np.arange(12.0)[:, None]
    np.testing.assert_array_equal(encode.of_speech(steps, 0.24, 0)["steps"], steps)
    # 50 steps a second to 10: means of five, and of the two that are left
    np.testing.assert_array_equal(encode.of_speech(steps, 0.24, 10)["steps"], [[2], [7], [10.5]])
    assert encode.of_speech(np.zeros((0, 4)), 0.0, 10)["steps"].shape == (0, 4)


def test_streams_of_a_preset_with_encoders(tmp_path):
    made = measure(clips.write_mp4(tmp_path / "a.mp4"), Everywhere())
    frames = len(made["video"]["video"])
    text = {s: np.zeros((1, 4), np.float16) for s in clip_features.TEXTS}
    encoded = {
        "image": {"steps": np.ones((frames, 3), np.float16)},
        "speech": {"steps": np.ones((5, 2), np.float16)},
    }
    half = dataclasses.replace(LITE, image=presets.Encoding("any", every=2))
    some = clip_features.example(
        Clip("c", tmp_path / "a.mp4", "sad"),
        half,
        made | {"text": text} | {"image": {"steps": np.ones((-(-frames // 2), 3), np.float16)}},
        dict.fromkeys(text, ""),
    )
    assert len(some["video"]) == len(some["video_mask"]) == len(some["times"]) == -(-frames // 2)
    np.testing.assert_array_equal(some["times"], made["video"]["times"][::2])
    clip, words = Clip("c", tmp_path / "a.mp4", "sad"), dict.fromkeys(text, "")
    both = clip_features.example(clip, LITE, made | encoded | {"text": text}, words)
    assert both["video"].shape == (frames, 3 + made["video"]["video"].shape[1])
    assert both["video"].dtype == np.float16
    assert both["audio"].shape == (5, 2)
    assert both["audio_mask"].all()
    np.testing.assert_array_equal(both["video_mask"], made["video"]["video_mask"])
    alone = clip_features.example(clip, dataclasses.replace(LITE, face=False), made | encoded | {"text": text}, words)
    assert alone["video"].shape == (frames, 3)
    moving = made | encoded | {"text": text, "flow": {"steps": np.ones((frames, 5), np.float16)}}
    flowing = clip_features.example(clip, EVERY_FRAME, moving, words)
    assert flowing["flow"].shape == (frames, 5)
    np.testing.assert_array_equal(flowing["flow_mask"], made["video"]["video_mask"])


def test_flow_is_on_the_time_base_of_the_encoded_frames(tmp_path):
    made = measure(clips.write_mp4(tmp_path / "a.mp4"), Everywhere(), settings=EVERY_FRAME)
    frames = len(made["video"]["video"])
    shown = -(-frames // 3)
    settings = dataclasses.replace(
        EVERY_FRAME, image=presets.Encoding("any", every=3), flow=presets.Flow("dis", None, window=3, stride=3)
    )
    text = {s: np.zeros((1, 4), np.float16) for s in clip_features.TEXTS}
    staged = made | {
        "image": {"steps": np.ones((shown, 2), np.float16)},
        "flow": {"steps": np.arange(frames, dtype=np.float16)[:, None]},
        "text": text,
    }
    packed = clip_features.example(Clip("c", tmp_path / "a.mp4", "sad"), settings, staged, dict.fromkeys(text, ""))
    assert packed["flow"][:, 0].tolist() == list(range(0, frames, 3)), "where a flow just ended"
    np.testing.assert_array_equal(packed["flow_mask"], packed["video_mask"])
    assert len(packed["flow"]) == len(packed["video"]) == len(packed["times"]) == shown > 2


def test_provenance_names_what_a_feature_depends_on_and_nothing_else():
    before = {f: provenance.described(f, LITE) for f in provenance.CODE_VERSION}
    changes = {
        "frames": (7, {"video", "image", "flow"}),
        "steps_per_second": (7, {"audio"}),
        "max_seconds": (7, {"audio", "flow", "speech"}),
        "image": (presets.Encoding("a"), {"image"}),
        "flow": (presets.Flow("a", presets.Encoding("a")), {"flow"}),
        "speech": (presets.Encoding("a"), {"speech"}),
        "window": (presets.Window(), {"window"}),
        "text": (presets.Encoding("a"), {"text"}),
        "max_tokens": (7, {"text"}),
        "face": (False, set()),
        "raw": (True, {"image", "speech", "text"}),
        "random": (True, set()),  # it is in the provenance of the weights
    }
    assert changes.keys() == {f.name for f in dataclasses.fields(presets.Preset)}
    for setting, (value, touched) in changes.items():
        other = dataclasses.replace(LITE, **{setting: value})
        changed = {f for f in before if provenance.described(f, other) != before[f]}
        assert changed == touched, setting
    changed = {
        f
        for f in before
        if provenance.described(f, EVERY_FRAME)
        != provenance.described(f, dataclasses.replace(EVERY_FRAME, max_seconds=7))
    }
    assert changed == {"video", "audio", "image", "flow", "speech"}, "of every frame, those up to there"
    assert provenance.described("text", LITE, sha256="abc")["weights"] == {"sha256": "abc"}
    with pytest.raises(AvjaxError, match="preset is 'light'; choose one of lite, open, etg"):
        presets.preset("light")


def test_usual_pitch_needs_enough_clips_with_voice():
    heard = [("ann", 200.0), ("ann", 220.0), ("ann", 300.0), ("ann", 0.0), ("ben", 100.0), ("ben", 110.0), (None, 90.0)]
    assert clip_features.speaker_pitch(heard) == {"ann": 220.0}


def test_sentences_of_a_clip():
    width = len(clip_features.faces.AU_NAMES)
    still = {"au": np.zeros((4, width), np.float32), "video_mask": np.ones(4, bool), "why": np.array("")}
    spoken = {"prosody": np.array([200, 4, 0], np.float32), "seconds": np.array(2.5), "why": np.array("faint")}
    facts = clip_features.facts(still, spoken)
    assert (facts.seconds, facts.why) == (2.5, {"video": "", "audio": "faint"})
    made = clip_features.describe(facts, "Oh no.", 100.0)
    assert tuple(made) == template.SOURCES
    assert "Oh no" in made["both"]
    assert "high" in made["both"]
    assert "low" in clip_features.describe(facts, None, 400.0)["audio"]
    silent = dataclasses.replace(facts, prosody=np.zeros(3, np.float32))
    assert clip_features.describe(silent, None, None)["audio"] == ""


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
    tokens = encode.encode_texts(encoder, ["bb", "", "a", "bb"], 3)
    assert encoder.seen == ("a", "bb")
    assert [t.shape for t in tokens] == [(2, 2), (0, 2), (1, 2), (2, 2)]
    assert [t.sum() for t in tokens] == [8, 0, 2, 8]
    assert [t.shape for t in encode.encode_texts(encoder, [""], 3)] == [(0, 2)]


def test_an_encoder_that_pools_gives_a_text_one_vector():
    class Encoder:
        width = 2

        def tokenize(self, texts, limit):
            return np.zeros((len(texts), limit), np.int32), np.ones((len(texts), limit), bool)

        def __call__(self, ids, mask):
            return np.ones((len(ids), 2), np.float32), np.ones(len(ids), bool)

    assert [t.shape for t in encode.encode_texts(Encoder(), ["bb", "", "a"], 3)] == [(1, 2), (0, 2), (1, 2)]


def test_face_landmarker_comes_from_the_registry(monkeypatch, tmp_path):
    from avjax.encoders import weights

    monkeypatch.setattr(weights, "fetch", lambda name: tmp_path / name)
    assert clip_features.landmarker() == tmp_path / "face_landmarker"

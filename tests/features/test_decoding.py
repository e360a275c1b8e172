"""Whatever a preset takes of a clip, its video and its audio are decoded once."""

import av
import numpy as np
import pytest

from avjax.datasets.base import Clip
from avjax.features import clip as clip_features
from avjax.features import presets
from avjax.media import faces, video
from avjax.utils.progress import Stopwatch
from tests import clips
from tests.features.test_avtca_window import Boxes

pytest.importorskip("mediapipe", reason="needs avjax[media]")
# Measurements alone, with flow, with encoders, and a span of face images and MFCC.
PRESETS = ("lite", "deiii_lite", "open", "avtca_112")


def measured(clip, preset, tracker, scratch):
    settings = presets.PRESETS[preset]
    instruments = clip_features.Instruments(settings, tracker, Stopwatch(), scratch)
    wanted = {"image", "flow", "speech"}
    made, raw = clip_features.measure(clip, instruments, wanted=wanted)
    assert bool(raw.images) == bool(settings.image)
    assert bool(raw.flows) == bool(settings.flow)
    return made


def frames_in(path):
    """How many frames of video and audio a file has."""
    counts = {}
    for kind in ("video", "audio"):
        with av.open(str(path)) as container:
            counts[kind] = sum(1 for _ in container.decode(**{kind: 0}))
    return counts


@pytest.mark.parametrize("preset", PRESETS)
def test_a_clip_is_decoded_once(tmp_path, monkeypatch, preset):
    path = clips.write_mp4(tmp_path / "clip.mp4", seconds=2.5, fps=25)
    in_file = frames_in(path)
    counts = clips.count_decoding(monkeypatch)
    made = measured(Clip("c", path, "sad"), preset, Boxes((4, 4, 40, 40)), tmp_path)
    assert counts == in_file | {"video passes": 1, "audio passes": 1}
    assert not made["video"]["why"]
    assert not made["audio"]["why"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_real_clip_is_decoded_once(java_sed, tmp_path, monkeypatch, preset):
    path = min((java_sed / "mp4").glob("*.mp4"), key=lambda path: path.stat().st_size)
    in_file = frames_in(path)
    counts = clips.count_decoding(monkeypatch)
    with faces.FaceTracker(clip_features.landmarker()) as tracker:
        made = measured(Clip("c", path, "sad"), preset, tracker, tmp_path)
    assert counts == in_file | {"video passes": 1, "audio passes": 1}
    assert made["video"]["video_mask"].any()


def test_what_is_staged_is_not_decoded_again(tmp_path, monkeypatch):
    clip = Clip("c", clips.write_mp4(tmp_path / "clip.mp4"), "sad")
    settings, tracker = presets.PRESETS["avtca_112"], Boxes((4, 4, 40, 40))
    instruments = clip_features.Instruments(settings, tracker, Stopwatch(), tmp_path)
    counts = clips.count_decoding(monkeypatch)
    made, _ = clip_features.measure(clip, instruments)
    once = dict(counts)
    again, _ = clip_features.measure(clip, instruments, made)
    assert counts == once
    assert all(again[feature] is made[feature] for feature in made)
    # The window alone takes one pass more of each, and comes out the same.
    window = clip_features.measure(clip, instruments, {f: made[f] for f in ("video", "audio")})[0]["window"]
    assert counts == {what: 2 * count for what, count in once.items()}
    for name, array in made["window"].items():
        np.testing.assert_array_equal(window[name], array)


def test_damaged_packets_cost_a_second_pass_and_nothing_else(tmp_path, monkeypatch):
    clip = Clip("c", clips.write_mp4(tmp_path / "clip.mp4", seconds=4), "sad")
    undamaged = measured(clip, "avtca_112", Boxes((4, 4, 40, 40)), tmp_path)
    frames = video._frames

    def damaged(container, stream):
        lost = 10 if stream.type == "video" else 0
        return (frame for i, frame in enumerate(frames(container, stream)) if i >= lost)

    monkeypatch.setattr(video, "_frames", damaged)
    counts = clips.count_decoding(monkeypatch)
    made = measured(clip, "avtca_112", Boxes((4, 4, 40, 40)), tmp_path)
    assert (counts["video"], counts["video passes"]) == (60, 2)
    assert counts["audio passes"] == 1
    assert made["video"]["times"][0] >= 1 > undamaged["video"]["times"][0]
    np.testing.assert_array_equal(made["audio"]["audio"], undamaged["audio"]["audio"])

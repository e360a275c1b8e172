"""An audit names every defect of clips, folds and labels, goes on where it was stopped, and shows names as text."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
import wave

import numpy as np
import pytest
from rich.console import Console

from avjax.checks import clip_facts, findings
from avjax.checks import dataset as dataset_checks
from avjax.checks.clip_facts import Facts
from avjax.datasets.base import Clip, Corpus, Fold, Task
from avjax.datasets.metadata import Metadata
from avjax.errors import AvjaxError
from tests import clips

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def write_wav(path, samples, rate=16000):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((np.asarray(samples) * 32767).astype(np.int16).tobytes())


def sine(seconds, peak, rate=16000):
    return np.clip(peak * np.sin(np.arange(round(seconds * rate)) * 0.1), -1, 1)


def write_dark(path, black, light, grey):
    """A film of frames, 20 a second, `black` of which are black before the `light` ones of that `grey`."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(black + light):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 0 if i < black else grey, np.uint8), "rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_table(root, rows, header="file,label,audio"):
    (root / "labels.csv").write_text("\n".join([header, *rows]) + "\n")


def audited(root, out, **changes):
    options = dataset_checks.Options(**{"faces": False, "processes": 2} | changes)
    return dataset_checks.audit("folder", str(root), out=str(out), options=options)


# ---- Clips -----------------------------------------------------------------------------------------------------------

# Clip → kinds of findings.
DEFECTS = {
    "good": set(),
    "absent": {"missing"},
    "garbage": {"broken"},
    "cut": {"truncated"},
    "mute": {"no audio"},
    "digital": {"silent"},
    "faint": {"silent"},
    "overdriven": {"clipped"},
    "loud": set(),
    "heard": {"no video"},
    "brief": {"short"},
    "slow": {"frame rate"},
    "ten": set(),
    "telephone": {"sample rate"},
    "apart": {"lengths"},
    "dark": {"black lead-in"},
    "quiet_dark": {"silent"},
    "night": {"black"},
    "twin": set(),
}


@pytest.fixture(scope="module")
def defects(tmp_path_factory):
    """The folder of a data set with one clip of each defect."""
    root = tmp_path_factory.mktemp("defects")
    films = {
        "good": {},
        "mute": {"hz": None},
        "digital": {"hz": 0},
        "heard": {"with_video": False},
        "brief": {"seconds": 0.3},
        "slow": {"fps": 5},
        "ten": {"fps": 10},
    }
    for name, settings in films.items():
        clips.write_mp4(root / f"{name}.mp4", **({"fps": 20} | settings))
    (root / "garbage.mp4").write_bytes(b"no film at all" * 100)
    whole = clips.write_mp4(root / "cut.mkv", seconds=4, fps=20).read_bytes()
    (root / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    sounds = {
        "faint": sine(1, 0.0005),
        "overdriven": sine(1, 1.2),
        "loud": sine(1, 0.85),
        "telephone": sine(1, 0.3, 4000),
        "apart": sine(2, 0.3),
        "dark": sine(1, 0.3),
        "quiet_dark": np.zeros(16000),
        "night": sine(1, 0.3),
    }
    for i, (name, samples) in enumerate(sounds.items()):
        write_wav(root / f"{name}.wav", samples, 4000 if name == "telephone" else 16000)
        black = {"dark": 4, "quiet_dark": 4, "night": 20}.get(name, 0)
        write_dark(root / f"{name}.mp4", black, 0 if name == "night" else 20, 80 + 20 * i)
    (root / "twin.mp4").write_bytes((root / "good.mp4").read_bytes())
    rows = [
        f"{name}.{'mkv' if name == 'cut' else 'mp4'},{'ab'[i % 2]},{f'{name}.wav' if name in sounds else ''}"
        for i, name in enumerate(DEFECTS)
    ]
    write_table(root, rows)
    return root


@pytest.fixture(scope="module")
def result(defects, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit")
    return audited(defects, out), out


@pytest.mark.parametrize("clip", DEFECTS)
def test_each_defect_is_named(result, clip):
    kinds = {f["kind"] for f in result[0]["findings"] if f["clip"] == clip}
    assert kinds - {"copy", "copy in test"} == DEFECTS[clip]


def test_what_is_found_says_how_bad_it_is(result):
    severities = {f["kind"]: f["severity"] for f in result[0]["findings"]}
    lost = {"missing", "broken", "truncated", "no audio", "silent", "no video", "black"}
    noted = {"clipped", "short", "frame rate", "sample rate", "lengths", "black lead-in"}
    assert {kind for kind, severity in severities.items() if severity == "loss"} == lost
    assert noted <= {kind for kind, severity in severities.items() if severity == "note"}


def test_reasons_give_the_figures(result):
    reasons = {f["clip"]: f["reason"] for f in result[0]["findings"] if f["clip"] != "good"}
    assert reasons["dark"] == "black for 0.20 s; audio from 0.00 s on"
    assert reasons["digital"] == reasons["quiet_dark"] == "digital silence throughout"
    assert reasons["faint"] == "below -60 dB of full scale throughout"
    assert reasons["apart"] == "1.00 s of video, 2.00 s of audio"
    assert reasons["slow"] == "5 frames a second; expected 10 to 120"
    assert "of the 4.0" in reasons["cut"]


def test_the_copy_is_found_in_the_other_part(result):
    (copy,) = [f for f in result[0]["findings"] if f["kind"].startswith("copy")]
    assert copy["severity"] == "invalid"
    assert copy["clip"] == "good"
    assert copy["reason"].startswith("same content as twin")


def test_page_shows_counts_and_some_pictures(result):
    page = (result[1] / "audit.html").read_text()
    assert "black lead-in (note), 1" in page
    assert 1 <= page.count("data:image/jpeg;base64,") <= dataset_checks.MOST_STRIPS
    assert "http" not in page  # it stands alone
    assert json.loads((result[1] / "audit.json").read_text()) == json.loads(json.dumps(result[0]))


def test_equal_input_gives_equal_bytes(defects, result, tmp_path):
    audited(defects, tmp_path, processes=1)
    for name in ("audit.json", "audit.html"):
        assert (tmp_path / name).read_bytes() == (result[1] / name).read_bytes()


def facts(**changes):
    whole = {"sha256": "a", "frames": 20, "stated_frames": 20, "fps": 20.0, "video": (0.0, 1.0), "audio": (0.0, 1.0)}
    return Facts("clip", [], **(whole | {"peak": 0.5, "rate": 16000, "speaks": 0.1, "stated": 1.0} | changes))


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, []),
        ({"face": True}, []),
        ({"face": False}, ["no face"]),
        ({"stated_frames": 40}, ["damaged"]),
        ({"stated_frames": 40, "stated": 2.0}, ["truncated"]),
        ({"video_stated": 2.0}, ["truncated"]),
        ({"audio_stated": 2.0}, ["truncated"]),
        ({"stated": 1.4}, []),
        ({"stated": 20.9, "video": (0.0, 20.0), "audio": (0.0, 20.0)}, []),
        ({"black": 0.2, "speaks": 0.5}, []),
        ({"fps": 130.0}, ["frame rate"]),
        ({"failed": "its decoder crashed (exit status -11)"}, ["broken"]),
        ({"failed": "no such file"}, ["missing"]),
        ({"no_video": "x", "no_audio": "x"}, ["broken"]),
    ],
)
def test_verdict(changes, kinds):
    assert [f.kind for f in findings.of_clip(facts(**changes), "folder")] == kinds


def test_sound_in_a_file_of_its_own_may_last_longer_than_a_film_that_is_cut():
    cut = facts(stated=4.0, audio=(0.0, 4.0))
    assert [f.kind for f in findings.of_clip(cut, "folder", apart=True)] == ["truncated", "lengths"]


@pytest.mark.parametrize(("dataset", "kinds"), [("dfew", ["short"]), ("mafw:compound", ["short"]), ("meld", [])])
def test_sixteen_frames_are_asked_of_sets_in_frames(dataset, kinds):
    assert [f.kind for f in findings.of_clip(facts(frames=15, stated_frames=15), dataset)] == kinds


def test_part_of_a_file_is_all_that_is_opened(tmp_path):
    path = clips.write_mp4(tmp_path / "long.mp4", seconds=4, fps=20)
    part = clip_facts.inspect(Clip("part", path, "a", start=1.0, end=2.0), [])
    assert part.frames == 20
    assert part.video == pytest.approx((1.0, 2.0), abs=0.05)
    assert part.audio == pytest.approx((1.0, 2.0), abs=0.1)
    assert not list(findings.of_clip(part, "folder"))
    beyond = clip_facts.inspect(Clip("beyond", path, "a", start=1.0, end=9.0), [])
    assert [f.kind for f in findings.of_clip(beyond, "folder")] == ["truncated"]


@pytest.mark.slow
@pytest.mark.weights
def test_known_facts_of_real_clips(java_sed, tmp_path):
    result = audited(java_sed, tmp_path, faces=True)
    kinds = {}
    for finding in result["findings"]:
        kinds.setdefault(finding["kind"], []).append(finding["clip"])
    assert len(kinds["black lead-in"]) == 26
    assert kinds["clipped"]
    assert all(clip.endswith("06_01") for clip in kinds["clipped"])  # angry
    assert set(kinds) == {"black lead-in", "clipped"}  # so no copies, and a face in each


@pytest.mark.weights
def test_pattern_has_no_face(tmp_path):
    clips.write_mp4(tmp_path / "a.mp4", fps=20)
    write_table(tmp_path, ["a.mp4,a"], "file,label")
    for faces in (False, True, False):  # what is asked for is shown, whatever was found before
        result = audited(tmp_path, tmp_path / "out", faces=faces)
        assert ("no face" in {f["kind"] for f in result["findings"]}) == faces
    assert len(recorded(tmp_path / "out")) == 2


# ---- Stopped and started again ---------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    """64 clips of 4 s that differ in their bytes."""
    root = tmp_path / "many"
    content = clips.write_mp4(root / "0.mp4", seconds=4, fps=20).read_bytes()
    for i in range(64):
        (root / f"{i}.mp4").write_bytes(content + (12).to_bytes(4, "big") + b"free" + i.to_bytes(4, "big"))
    write_table(root, [f"{i}.mp4,{'ab'[i % 2]}" for i in range(64)], "file,label")
    return root


def recorded(out):
    path = out / "clips.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def test_killed_and_started_again_it_neither_loses_nor_repeats(many, tmp_path):
    command = ["-m", "avjax.doctor", "data", "--config=configs/etg_folder.py", f"--config.data.root={many}"]
    killed = tmp_path / "killed"
    more = [f"--out={killed}", "--no_faces", "--workers=1"]
    run = subprocess.Popen([sys.executable, *command, *more], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not recorded(killed) and time.monotonic() < deadline:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert 0 < len(recorded(killed)) < 64
    with (killed / "clips.jsonl").open("a") as file:
        file.write('{"id": "63", "key"')  # a line that the kill cut short
    audited(many, killed)
    ids = [json.loads(line)["id"] for line in recorded(killed)]
    assert sorted(ids, key=int) == [str(i) for i in range(64)]
    audited(many, tmp_path / "whole")
    for name in ("audit.json", "audit.html"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_only_what_has_changed_is_opened_again(many, tmp_path):
    audited(many, tmp_path / "out")
    before = recorded(tmp_path / "out")
    os.utime(many / "7.mp4", ns=(1, 1))
    audited(many, tmp_path / "out")
    after = recorded(tmp_path / "out")
    assert after[:64] == before
    assert [json.loads(line)["id"] for line in after[64:]] == ["7"]


@pytest.fixture
def hanging(tmp_path):
    """A clip that is never opened to its end, for nobody writes into its pipe, and a good one."""
    os.mkfifo(tmp_path / "pipe.mp4")
    clips.write_mp4(tmp_path / "good.mp4", fps=20)
    return [Clip(name, tmp_path / f"{name}.mp4", "a") for name in ("pipe", "good")]


def test_others_of_a_handful_do_not_suffer_for_a_clip_that_takes_too_long(hanging):
    batch = [(clip, clip_facts.key_of(clip)) for clip in hanging]
    found = {f.id: f for f in clip_facts._opened([batch], None, 1, 2.0)}
    assert found["pipe"].failed == "took longer than 2 s"
    assert found["good"].frames == 20


def test_clip_that_took_too_long_is_tried_again_next_time(hanging, tmp_path):
    settings = {"processes": 2, "clip_seconds": 1.0}
    found = clip_facts.inspect_all(hanging, tmp_path / "clips.jsonl", Console(), **settings)
    assert found["pipe"].failed == "took longer than 1 s"
    assert [json.loads(line)["id"] for line in recorded(tmp_path)] == ["good"]
    (tmp_path / "pipe.mp4").unlink()
    clips.write_mp4(tmp_path / "pipe.mp4", fps=10)
    found = clip_facts.inspect_all(hanging, tmp_path / "clips.jsonl", Console(), **settings)
    assert {name: facts.frames for name, facts in found.items()} == {"pipe": 10, "good": 20}


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (100, [[10] * 48, [10] * 2, [3_999_995], [10], [9_000_000], [10]]),
        (20, [[10] * 20, [10] * 20, [10] * 10, [3_999_995], [10], [9_000_000], [10]]),
        (0, [[10]] * 50 + [[3_999_995], [10], [9_000_000], [10]]),
    ],
)
def test_small_clips_go_to_workers_by_the_handful(most, expected):
    jobs = [(i, [[size, 0], None, None]) for i, size in enumerate([10] * 50 + [3_999_995, 10, 9_000_000, 10])]
    sizes = [[key[0][0] for _, key in batch] for batch in clip_facts._batches(jobs, most)]
    assert [size for batch in sizes for size in batch] == [key[0][0] for _, key in jobs]
    assert sizes == expected


# ---- Names -----------------------------------------------------------------------------------------------------------


def test_names_and_labels_are_shown_never_obeyed(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    clips.write_mp4(tmp_path / f"{name}.mp4", hz=None, fps=20)
    clips.write_mp4(tmp_path / "other.mp4", fps=20)
    write_table(tmp_path, [f"{name}.mp4,<b>x</b>", "other.mp4,[bold]y[/]"], "file,label")
    audited(tmp_path, tmp_path / "out")
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<img src=x" not in page
    assert "<b>x" not in page


# ---- Folds -----------------------------------------------------------------------------------------------------------


def corpus(speakers="aabb", labels="xyxy", name="folder", **changes):
    made = tuple(
        Clip(str(i), pathlib.Path(f"{i}.mp4"), label, speaker=None if speaker == "-" else speaker)
        for i, (speaker, label) in enumerate(zip(speakers, labels, strict=True))
    )
    return Corpus(name, Task("single", tuple(sorted(set(labels)))), made, **changes)


def kinds(found):
    return [(f.severity, f.kind) for f in found]


@pytest.mark.parametrize(
    ("fold", "expected"),
    [
        (Fold("1", ("0", "1"), ("2", "3")), []),
        (Fold("1", ("0", "1", "2"), ("2", "3")), [("invalid", "overlap"), ("invalid", "shared speakers")]),
        (Fold("1", ("0", "1"), ("2", "3"), ("2", "3")), [("invalid", "equal parts"), ("invalid", "shared speakers")]),
        (Fold("1", ("0", "2"), ("1", "3")), [("invalid", "shared speakers"), ("note", "unseen class")]),
        (Fold("1", ("0",), ("2", "3"), ("1",)), [("note", "shared speakers"), ("note", "unseen class")]),
        (Fold("1", ("0", "1"), ("2", "3"), ("1",)), [("note", "overlap"), ("note", "shared speakers")]),
    ],
)
def test_what_parts_share(fold, expected):
    assert kinds(findings.of_folds(corpus(), [fold])) == expected


def test_official_folds_may_share_speakers_only_where_they_are_so_published():
    fold = Fold("official", ("0", "2"), ("1", "3"))
    meld = corpus(labels="xxxx", name="meld", folds=(fold,))
    assert kinds(findings.of_folds(meld, [fold])) == [("note", "shared speakers")]
    assert kinds(findings.of_folds(dataclasses.replace(meld, name="ravdess"), [fold])) == [
        ("invalid", "shared speakers")
    ]
    assert kinds(findings.of_folds(dataclasses.replace(meld, folds=()), [fold])) == [("invalid", "shared speakers")]


@pytest.mark.parametrize(("overlapping", "severity"), [(False, "invalid"), (True, "note")])
def test_clips_tested_twice(overlapping, severity):
    folds = [Fold("1", ("0", "1"), ("2", "3")), Fold("2", ("0", "1"), ("3",))]
    found = kinds(findings.of_folds(corpus(overlapping=overlapping, labels="xxxx"), folds))
    assert found == [(severity, "tested twice")]


@pytest.mark.parametrize(
    ("hashes", "labels", "expected", "reason"),
    [
        ("abcd", "xyxy", [], ""),
        ("aacd", "xxxy", [("note", "copy")], "same content as 1"),
        ("aacd", "xyxy", [("note", "copy")], "same content as 1; their labels differ"),
        ("abac", "xyxy", [("invalid", "copy in test")], "same content as 2; both sides of fold 1"),
    ],
)
def test_copies(hashes, labels, expected, reason):
    data = corpus(labels=labels)
    known = {c.id: Facts(c.id, [], sha256=h) for c, h in zip(data.clips, hashes, strict=True)}
    found = list(findings.of_copies(data.clips, known, [Fold("1", ("0", "1"), ("2", "3"))]))
    assert kinds(found) == expected
    assert "".join(f.reason for f in found) == reason


def test_parts_of_one_file_are_no_copies():
    parts = [Clip(str(i), pathlib.Path("a.mp4"), "x", start=float(i), end=i + 1.0) for i in range(3)]
    known = {c.id: Facts(c.id, [], sha256="same") for c in parts}
    assert not list(findings.of_copies(parts, known, []))


def test_half_a_division_is_invalid(tmp_path):
    clips.write_mp4(tmp_path / "a.mp4", fps=20)
    clips.write_mp4(tmp_path / "b.mp4", fps=20, hz=300)
    write_table(tmp_path, ["a.mp4,a,train", "b.mp4,b,"], "file,label,split")
    result = audited(tmp_path, tmp_path / "out")
    assert result["counts"][0]["kind"] == "no folds"
    assert "1 of 2 clips have no split" in result["counts"][0]["first"]


# ---- Labels ----------------------------------------------------------------------------------------------------------


def listed(*pairs):
    return types.SimpleNamespace(fold="1", part="test", clips=dict(pairs))


def test_numbers_stand_for_the_classes_that_most_of_their_clips_have():
    data = corpus(labels="xyxyxy", speakers="------").clips
    agreeing = [("00000", "4"), ("1", "7"), ("2", "4"), ("3", "7"), ("4", "4")]
    assert not list(findings.of_lists(data, [listed(*agreeing, ("5", "7"))], []))
    (found,) = findings.of_lists(data, [listed(*agreeing, ("5", "4"))], [])
    assert dataclasses.astuple(found) == ("invalid", "label", "5", "labelled y in the data, 4 (x) in the list")


def test_names_of_classes_stand_for_themselves():
    data = corpus(labels="xyxy", speakers="----").clips
    found = list(findings.of_lists(data, [listed(("0", "y"), ("1", "y"), ("2", "y"), ("3", "y"))], []))
    assert [(f.clip, f.reason) for f in found] == [(i, "labelled x in the data, y in the list") for i in "02"]


def test_what_lists_lack_and_what_is_wrong_with_them():
    data = corpus(speakers="----").clips
    found = list(findings.of_lists(data, [listed(("0", "x"), ("9", "x"))], ["val and test are the same 3 clips"]))
    assert kinds(found) == [("invalid", "list"), ("note", "list coverage"), ("note", "list coverage")]
    assert found[1].reason == "1 clips are in the lists but not in the data: 9"
    assert found[2].reason == "3 clips are in the data but in no list: 1, 2, 3"


def test_counts_against_the_published_ones_and_clips_known_as_broken():
    known = Metadata("A", {"x": 2, "y": 5, "z": None}, clips=9, broken={"1": "no audio in the original"})
    data = corpus(rejected=(("7", "no such file"), ("8", "label is 'q'")))
    assert [f.reason for f in findings.of_counts(data, known)] == [
        "y: 2 clips; published: 5",
        "4 clips; published: 9",
    ]
    assert [(f.clip, f.reason) for f in findings.of_broken(data.clips, known)] == [("1", "no audio in the original")]
    rejected = findings.of_rejected([*data.rejected, ("1", known.broken["1"])], known)
    assert [f.kind for f in rejected] == ["missing", "rejected", "known broken"]
    assert not [*findings.of_counts(data, None), *findings.of_broken(data.clips, None)]


def test_regression_has_no_classes():
    data = dataclasses.replace(corpus(), task=Task("regression", ("valence",)))
    assert findings.class_table(data, None) == []


def test_packages_that_are_missing_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(
        dataset_checks.importlib.util, "find_spec", lambda name: None if name == "mediapipe" else object()
    )
    with pytest.raises(AvjaxError, match=r"needs mediapipe; install with: pip install 'avjax\[media\]'"):
        dataset_checks.audit("folder", str(tmp_path))

"""Unusual and damaged files: each is used, used with missing parts masked, or quarantined with a reason.

All stand in one folder data set. The real commands run over it in a process group of their own, of which nothing is
left afterwards.
"""

import csv
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
import wave
from fractions import Fraction

import numpy as np
import pytest

from avjax.features import store as stores
from avjax.features import tfds
from avjax.features.provenance import Key
from tests import clips, tiny_run
from tests.conftest import REAL

pytestmark = pytest.mark.weights
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
FACE = REAL / "java_sed_open/mp4/01-01-03_01.mp4"
NO_MEDIA = "not a media file, or one that is damaged or cut off where its table of contents is"
NO_FACE = "no face in any frame"
RATES = {"mono": 16000, "stereo": 48000}


# ---- The files -------------------------------------------------------------------------------------------------------


def write(path, images, *, times=None, rotation=0, hz=220.0, layout="mono", quick_start=False, fps=10):  # noqa: PLR0913 - a file has as many properties
    """Writes frames, shown at `times` in seconds, with a sine of `hz` of the same length (None: no audio)."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movflags": "faststart"} if quick_start else {}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        video = container.add_stream("libx264", rate=fps)
        video.height, video.width, video.pix_fmt = *images[0].shape[:2], "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        video.gop_size = 5
        if rotation:
            video.set_display_rotation(rotation)
        audio = container.add_stream("aac", rate=RATES[layout], layout=layout) if hz else None
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = round(1000 * (i / fps if times is None else times[i]))
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio:
            frame = av.AudioFrame.from_ndarray(sine(len(images) / fps, hz, layout), "s16", layout)
            frame.sample_rate, frame.pts, frame.time_base = RATES[layout], 0, Fraction(1, RATES[layout])
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def sine(seconds, hz, layout):
    rate, channels = RATES[layout], {"mono": 1, "stereo": 2}[layout]
    samples = 8000 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(samples.astype(np.int16), channels)[None]


def pattern(count=10, height=64, width=96):
    y, x = np.mgrid[:height, :width]
    return [np.repeat(((x * (i + 1) + 3 * y) % 256).astype(np.uint8)[..., None], 3, -1) for i in range(count)]


def face(count=10):
    """Returns images of a real face."""
    import av

    with av.open(str(FACE)) as container:
        frames = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        return [next(frames) for _ in range(count)]


def damaged(path, change):
    path.write_bytes(bytes(change(bytearray(write(path, pattern(20)).read_bytes()))))


def zero_middle_of_media(data):
    middle = data.index(b"mdat") + 4 + (data.index(b"moov") - data.index(b"mdat")) // 2
    data[middle : middle + 200] = bytes(200)
    return data


def eight_bit(path):
    rate = 8000
    samples = 128 + 60 * np.sin(2 * np.pi * 220 * np.arange(rate) / rate)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 1, rate, 0, "NONE", ""))
        file.writeframes(samples.astype(np.uint8).tobytes())


def without_permission(path):
    write(path, pattern()).chmod(0)


# ---- What comes out --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A file `name` that `make` writes; it is quarantined for `reason`, or measured if that is "".

    `no_video`, `no_audio`: why masked, "" if used; `frames`: number or range; `seconds`, `hz`, `times`: None = any.
    """

    name: str
    make: object
    reason: str = ""
    no_video: str = NO_FACE
    no_audio: str = ""
    frames: object = 10
    seconds: float | None = 1.0
    hz: float | None = 220.0
    times: tuple[float, ...] | None = None
    label: str = ""
    face: bool = False

    @property
    def id(self) -> str:
        return os.fsencode(self.name).decode("utf-8", "backslashreplace").rpartition(".")[0]


FILES = [
    Case("truncated.mp4", lambda p: damaged(p, lambda d: d[: len(d) // 2]), NO_MEDIA),
    Case(
        "truncated_later.mp4",  # the index is at the front: what precedes the cut can be read
        lambda p: p.write_bytes((d := write(p, pattern(20), quick_start=True).read_bytes())[: len(d) * 2 // 3]),
        frames=range(4, 20),
        seconds=None,
        hz=None,
    ),
    Case("header_cut.mp4", lambda p: damaged(p, lambda d: d[40:]),
         "not one frame can be decoded; no audio can be decoded"),
    Case("random.mp4", lambda p: p.write_bytes(np.random.default_rng(0).bytes(50_000)), NO_MEDIA),
    Case("flipped.mp4", lambda p: damaged(p, zero_middle_of_media), frames=range(8, 17), seconds=2.0),
    Case("empty.mp4", lambda p: p.touch(), "an empty file"),
    Case("audio_only.mp4", lambda p: clips.write_mp4(p, with_video=False), no_video="no video stream", frames=0),
    Case("video_only.mp4", lambda p: write(p, pattern(), hz=None), no_audio="no audio stream", seconds=0, hz=None),
    Case("one_frame.mp4", lambda p: write(p, pattern(1), hz=None), no_audio="no audio stream", frames=1, seconds=0,
         hz=None),
    Case("ten_ms.wav", lambda p: clips.write_wav(p, seconds=0.01), no_video="no video stream", frames=0, seconds=0.01,
         hz=None),
    Case("film.jpg", lambda p: write(p, pattern())),
    Case("eight_bit.wav", eight_bit, no_video="no video stream", frames=0),
    Case("stereo.mp4", lambda p: write(p, pattern(), layout="stereo")),
    Case("portrait.mp4", lambda p: write(p, [np.rot90(i, -1) for i in face()], rotation=90), no_video="", face=True),
    Case("uneven.mp4", lambda p: write(p, pattern(4), times=[0, 0.1, 0.7, 1.5], hz=None), no_audio="no audio stream",
         frames=4, times=(0, 0.1, 0.7, 1.5), seconds=0, hz=None),
    Case("two_faces.mp4", lambda p: write(p, [np.hstack([i, i]) for i in face()]), no_video="", face=True),
    Case("no_face.mp4", lambda p: write(p, pattern())),
    Case("black.mp4", lambda p: write(p, [0 * i for i in pattern()])),
    Case(os.fsdecode(b"caf\xe9.mp4"), lambda p: write(p, pattern())),
    Case("no_label.mp4", lambda p: write(p, pattern()), "no label", label=" "),
    Case("doubled.mp4", lambda p: write(p, pattern())),
    Case("doubled.mp3", lambda p: write(p, pattern()),
         "duplicate clip id: an earlier row has it; tell them apart in a column id"),
    Case("other_label.mp4", lambda p: write(p, pattern()), "label 'angri'; did you mean 'angry'?", label="angri"),
    Case("missing.mp4", lambda p: None, "no such file"),
    Case("folder.mp4", lambda p: p.mkdir(), "a folder, not a file"),
    Case("huge.mp4", lambda p: write(p, pattern(1, 2400, 4096)), hz=None, frames=0, seconds=0.1,
         no_video="frames of 4096x2400 pixels; at most 9437184 are read; scale it down"),
    Case("huge_mute.mp4", lambda p: write(p, pattern(1, 2400, 4096), hz=None),
         "frames of 4096x2400 pixels; at most 9437184 are read; scale it down; no audio stream"),
    Case("pipe.mp4", lambda p: os.mkfifo(p), "not a file but a pipe, a socket or a device"),
    Case("loop.mp4", lambda p: p.symlink_to("loop.mp4"), "a symbolic link that leads in a circle"),
]  # fmt: skip
if os.geteuid():
    FILES.append(Case("forbidden.mp4", without_permission, "no permission to read it"))
FILES = [case for case in FILES if FACE.is_file() or not case.face]
USED = [case for case in FILES if not case.reason]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile") / "data"
    root.mkdir()
    rows = ["file,label"]
    for i, case in enumerate(FILES):
        case.make(root / case.name)
        rows.append(f"{case.name},{case.label or ('calm', 'angry')[i % 2]}")
    (root / "labels.csv").write_bytes(os.fsencode("\n".join(rows)))
    (root / "classes.txt").write_text("calm\nangry\n")
    return root


@pytest.fixture(scope="module")
def store(data):
    out = data.parent / "F"
    run("avjax.extract", "--config=configs/extract_folder.py", f"--config.data.root={data}", "--out", out)
    return out


def run(*arguments) -> subprocess.CompletedProcess:
    """Runs a command that must succeed without warnings, in time, and leave no process behind."""
    with subprocess.Popen(
        [sys.executable, "-m", *map(os.fspath, arguments)],
        cwd=REPOSITORY,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "Traceback" not in out + err
    end = time.monotonic() + 3  # a helper that waits for its parent's end may notice it a little later
    while alive := in_session(process.pid):
        assert time.monotonic() < end, f"left behind: {alive}"
        time.sleep(0.05)
    return subprocess.CompletedProcess(arguments, 0, out, err)


def in_session(leader: int) -> list[str]:
    folders = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session, *_ = path.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == leader and state != "Z":
            folders.append(path.parent.name)
    return folders


# ---- Extraction ------------------------------------------------------------------------------------------------------


@pytest.mark.budget(30)
def test_every_file_is_accounted_for(store):
    with (store / "quarantine.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["clip_id"], row["reason"]) for row in csv.DictReader(file)]
    assert len(FILES) >= 25
    assert sorted(i for i, _ in rows) == sorted(case.id for case in FILES if case.reason)
    assert stores.load(store, "lite").ids == [case.id for case in USED]
    assert not any("/" in reason or "Errno" in reason or "Error" in reason for _, reason in rows)


@pytest.mark.parametrize("case", [c for c in FILES if c.reason], ids=lambda c: c.name)
def test_quarantined_with_a_plain_reason(store, case):
    with (store / "quarantine.csv").open(newline="", encoding="utf-8") as file:
        reasons = [row["reason"] for row in csv.DictReader(file) if row["clip_id"] == case.id]
    assert reasons == [case.reason]


@pytest.fixture(scope="module")
def measured(store):
    """Returns clip id → its packed record, with the reasons why parts are missing."""
    records = {e["clip_id"].decode(): e for e in tfds.read(store, "folder", "lite")}
    staged = stores.read_index(store)["presets"]["lite"]["keys"]
    for clip_id, keys in staged.items():
        for feature in ("video", "audio"):
            kept = stores.Store(store).get(clip_id, feature, Key(*keys[feature]))
            records[clip_id] |= {f"{feature}_why": str(kept["why"])} | {k: kept[k] for k in kept if k == "seconds"}
    return records


@pytest.mark.parametrize("case", USED, ids=lambda c: c.id)
def test_used_and_measured_correctly(measured, case):
    made = measured[case.id]
    assert (made["video_why"], made["audio_why"]) == (case.no_video, case.no_audio)
    assert made["video_mask"].any() == (not case.no_video)
    assert made["audio_mask"].any() == (not case.no_audio)
    assert len(made["times"]) in (case.frames if isinstance(case.frames, range) else [case.frames])
    if case.times:
        np.testing.assert_allclose(made["times"], case.times, atol=0.002)
    if case.seconds is not None:
        assert made["seconds"] == pytest.approx(case.seconds, abs=0.07)
    if case.hz is not None:
        assert made["prosody"][0] == pytest.approx(case.hz, rel=0.02)


# ---- Prediction ------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.budget(120)
def test_prediction_takes_and_refuses_the_same_files(data, tmp_path_factory):
    workdir = tiny_run.make(tmp_path_factory)[2]
    named = ["missing.mp4", "film.jpg"]
    done = run("avjax.predict", "--workdir", workdir, "--json", data, *(data / name for name in named))
    output = json.loads(done.stdout)
    # An invalid row of the table does not concern the file.
    fine = {c.name for c in FILES if not c.reason or c.reason.startswith(("no label", "label", "duplicate"))}
    assert {c["file"] for c in output["clips"]} == {shown(data / name) for name in fine}
    assert {r["file"]: r["reason"] for r in output["rejected"]} == {
        shown(data / c.name): c.reason for c in FILES if c.name not in fine and c.name != "folder.mp4"
    }
    lacking = {c["file"]: c["missing"] for c in output["clips"]}
    for case in USED:
        expected = {"video": case.no_video, "audio": case.no_audio}
        missing = lacking[shown(data / case.name)]
        assert {k: v for k, v in missing.items() if k != "sentence"} == {k: v for k, v in expected.items() if v}
    for rejected in output["rejected"]:
        assert done.stderr.count(f"{rejected['file']}: {rejected['reason']}\n") == 1


def shown(path: pathlib.Path) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")

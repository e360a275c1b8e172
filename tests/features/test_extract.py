"""Extraction from end to end on tiny clips: what is kept, what is quarantined, and that nothing is lost by a kill."""

import csv
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from avjax.datasets import registry
from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from avjax.features import extract as extraction
from avjax.features import provenance, tfds
from avjax.features import store as stores
from avjax.media import requirements
from tests import clips
from tests.conftest import REAL

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
COLUMNS = ("file", "label", "id", "speaker", "transcript", "audio", "start", "end")
ROWS = [
    ("c0.mp4", "angry", "", "ann", "Oh no, not again!"),
    ("c1.mp4", "sad", "", "ann"),
    ("sub/c2.mp4", "angry", "", "ann"),
    ("mute.mp4", "sad"),
    ("voice.wav", "angry"),
    ("mute.mp4", "sad", "apart", "", "", "voice.wav"),
    ("long.mp4", "sad", "part", "", "", "", "1", "1.5"),
    ("c0.mp4", "", "unlabelled"),
    ("no.mp4", "sad"),
    ("broken.mp4", "sad"),
    ("empty.mp4", "sad"),
]
USED = ["c0", "c1", "sub/c2", "mute", "voice", "apart", "part"]


def write_data(root: pathlib.Path) -> pathlib.Path:
    for i, name in enumerate(("c0.mp4", "c1.mp4", "sub/c2.mp4")):
        clips.write_mp4(root / name, hz=150 + 50 * i)
    clips.write_mp4(root / "mute.mp4", hz=None)
    clips.write_mp4(root / "long.mp4", seconds=3, hz=300)
    clips.write_wav(root / "voice.wav", hz=250)
    (root / "broken.mp4").write_bytes((root / "c0.mp4").read_bytes()[40:900])
    (root / "empty.mp4").touch()
    write_table(root, ROWS)
    return root


def write_table(root, rows):
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def run(root, out, **changes):
    options = extraction.Options(**{"processes": 1} | changes)
    return extraction.extract("folder", "lite", root=str(root), out=str(out), options=options)


def table(path):
    with path.open(newline="") as file:
        return {row["clip_id"]: row for row in csv.DictReader(file)}


def entry(out):
    return stores.read_index(out)["presets"]["lite"]


def decoded(out, name="folder"):
    """All packed examples, flattened, by clip id."""

    def flat(value, prefix=""):
        if not isinstance(value, dict):
            return {prefix: value if isinstance(value, bytes) else np.asarray(value).tolist()}
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}/{key}").items()}

    return {e["clip_id"].decode(): flat(e) for e in tfds.read(out, name, "lite")}


def stamps(out):
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.glob("staged/**/*.npz")}


def leftovers(out):
    return [p for p in out.rglob("*") if p.name.endswith(".part") or "incomplete" in p.name]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """(data, store) of one complete extraction; not to be changed."""
    root = tmp_path_factory.mktemp("whole")
    data = write_data(root / "data")
    return data, run(data, root / "F", processes=2)


@pytest.fixture
def copied(extracted, tmp_path):
    """(data, store) as `extracted`, to be changed."""
    return tuple(shutil.copytree(source, tmp_path / source.name) for source in extracted)


@pytest.mark.budget(12)
def test_unusable_files_are_quarantined_and_incomplete_clips_are_kept_and_counted(extracted):
    _, out = extracted
    quarantined = {i: row["reason"] for i, row in table(out / "quarantine.csv").items()}
    assert list(quarantined) == ["unlabelled", "no", "empty", "broken"]
    assert quarantined["unlabelled"] == "no label"
    assert quarantined["no"] == "no such file"
    assert quarantined["broken"].startswith("not a media file, or one that is damaged")
    assert quarantined["empty"] == "an empty file"
    loaded = stores.load(out, "lite")
    assert loaded.ids == USED
    # Synthetic patterns have no face; `mute` has no audio either, and is kept for its video.
    assert loaded.counts == {"used": 7, "quarantined": 4, "masked_audio": 1, "masked_video": 7}
    assert [i for i, m in zip(loaded.ids, loaded.masks["audio"], strict=True) if not m.any()] == ["mute"]
    assert not leftovers(out)


def test_audio_and_part_of_a_clip_are_its_own(extracted):
    records = decoded(extracted[1])
    assert records["apart"]["/prosody"][0] == pytest.approx(250, rel=0.02)
    assert records["part"]["/prosody"][0] == pytest.approx(300, rel=0.02)
    assert records["part"]["/duration"] == pytest.approx(0.5, abs=0.02)
    assert len(records["part"]["/times"]) == 5
    assert records["part"]["/times"][0] == pytest.approx(0, abs=0.01)
    assert records["voice"]["/video"] == []
    assert len(records["apart"]["/video"]) == 10
    assert records["c0"]["/speaker"] == b"ann"
    assert b"Oh no, not again" in records["c0"]["/sentence/both"]


def test_provenance_stands_beside_what_it_made(extracted):
    _, out = extracted
    records = {p.stem: json.loads(p.read_text()) for p in (out / "provenance").iterdir()}
    assert sorted(r["feature"] for r in records.values()) == ["audio", "text", "video"]
    for path in out.glob("staged/**/*.npz"):
        feature, key, _ = path.stem.split("-")
        assert records[key]["feature"] == feature
    weights = {r["feature"]: r["weights"] for r in records.values()}
    assert len(weights["video"]["face_landmarker"]) == 64
    assert len(weights["text"]["sha256"]) == 64


def test_again_does_nothing(copied, capsys):
    data, out = copied
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    run(data, out)
    changed = {p.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert changed == {"quarantine.csv", "sentences.csv"}, "written whole, with the same rows"
    assert "8 clips, 7 measured already" in capsys.readouterr().out


def test_moved_data_are_not_measured_again(copied):
    data, out = copied
    before = stamps(out), (out / "index.json").stat().st_mtime_ns
    run(data.rename(data.with_name("moved")), out)
    assert (stamps(out), (out / "index.json").stat().st_mtime_ns) == before


def test_resumes_by_clip_and_sees_what_changed(copied):
    data, out = copied
    content, before = entry(out)["content"], stamps(out)
    for path in out.glob("staged/c1/video-*"):
        path.unlink()
    clips.write_mp4(data / "sub/c2.mp4", hz=400)
    write_table(data, [("c0.mp4", "happy", "", "ann", "Oh no, not again!"), *ROWS[1:]])
    run(data, out)
    again = {p for p, t in stamps(out).items() if before.get(p) != t}
    assert {p.split("/")[1] for p in again} == {"c1", "sub%2Fc2"}
    loaded = stores.load(out, "lite")
    assert loaded.classes == ("angry", "happy", "sad")
    assert loaded.content != content
    assert decoded(out)["sub/c2"]["/prosody"][0] == pytest.approx(400, rel=0.02)


def edit(out, clip_id, text):
    rows = table(out / "sentences.csv")
    rows[clip_id]["both"] = text
    with (out / "sentences.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[clip_id])
        writer.writeheader()
        writer.writerows(rows.values())


def test_only_text_encodes_edited_sentences_and_opens_no_media(copied, monkeypatch, tmp_path):
    data, out = copied
    before, stamped = decoded(out), stamps(out)
    edit(out, "c1", "She is over the moon.")
    data.rename(tmp_path / "away")
    with monkeypatch.context() as without_media:
        without_media.setattr(requirements, "PACKAGES", ("no_such_package",))
        run(data, out, only_text=True)
    after = decoded(out)
    assert {(i, k) for i in before for k in before[i] if before[i][k] != after[i][k]} == {
        ("c1", "/sentence/both"), ("c1", "/text/both")}  # fmt: skip
    assert after["c1"]["/sentence/both"] == b"She is over the moon."
    assert {p.split("/")[1] for p in stamps(out).keys() - stamped.keys()} == {"c1"}
    assert all(stamps(out)[p] == t for p, t in stamped.items())
    # A whole run keeps the edited row, and has nothing to do.
    index = (out / "index.json").read_bytes()
    (tmp_path / "away").rename(data)
    run(data, out)
    assert (out / "index.json").read_bytes() == index
    assert table(out / "sentences.csv")["c1"]["both"] == "She is over the moon."


def test_edited_rows_outlive_the_absence_of_their_clip(copied, capsys):
    data, out = copied
    edit(out, "c1", "She is over the moon.")
    write_table(data, [r for r in ROWS if r[0] != "c1.mp4"])
    run(data, out)
    assert "c1" not in stores.load(out, "lite").ids
    assert "1 edited rows of sentences.csv kept, 1 of them for clips not in this run" in capsys.readouterr().out
    write_table(data, ROWS)
    run(data, out)
    assert decoded(out)["c1"]["/sentence/both"] == b"She is over the moon."


def test_only_text_needs_a_full_run_first(tmp_path):
    with pytest.raises(AvjaxError, match="run without --only first"):
        run(tmp_path, tmp_path / "F", only_text=True)


def test_new_sentences_follow_the_table_of_labels(copied):
    data, out = copied
    write_table(data, [("c0.mp4", "angry", "", "ann", "Never mind."), *ROWS[1:]])
    before = stamps(out)
    run(data, out)
    assert b"Never mind" in decoded(out)["c0"]["/sentence/both"]
    assert {p.split("/")[2][:4] for p in stamps(out).keys() - before.keys()} == {"text"}


def test_files_that_vanish_are_quarantined(copied, monkeypatch):
    data, out = copied
    index, source_key = registry.index, provenance.source_key

    def index_then_lose(*where):
        corpus = index(*where)
        (data / "c0.mp4").unlink()
        return corpus

    def key_then_lose(clip):
        key = source_key(clip) + ("0" if clip.id == "c1" else "")
        if clip.id == "c1":
            clip.path.unlink()
        return key

    monkeypatch.setattr(registry, "index", index_then_lose)
    monkeypatch.setattr(provenance, "source_key", key_then_lose)
    run(data, out)
    reasons = table(out / "quarantine.csv")
    assert reasons["c0"]["reason"] == reasons["c1"]["reason"] == "no such file"
    assert stores.load(out, "lite").ids == USED[2:]


def test_no_usable_clip_at_all(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no media")
    write_table(tmp_path, [("a.mp4", "sad")])
    with pytest.raises(AvjaxError, match=r"no clip of folder can be used; a: .*all reasons: .*quarantine\.csv"):
        run(tmp_path, tmp_path / "F")
    assert list(table(tmp_path / "F/quarantine.csv")) == ["a"]


def test_missing_media_packages_are_named(extracted, tmp_path, monkeypatch):
    monkeypatch.setattr(requirements, "PACKAGES", ("av", "no_such_package"))
    with pytest.raises(
        AvjaxError, match=r"extraction needs no_such_package; install with: pip install 'avjax\[media\]'"
    ):
        run(extracted[0], tmp_path / "F")


def test_clip_that_takes_too_long_is_quarantined(extracted, tmp_path):
    data = shutil.copytree(extracted[0], tmp_path / "data")
    write_table(data, ROWS[:1])
    with pytest.raises(AvjaxError, match=r"no clip of folder can be used; c0: took longer than 0\.001 s"):
        run(data, tmp_path / "F", clip_seconds=0.001)


def test_mafw_miniature(tmp_path):
    data, classes = tmp_path / "data", list(metadata("mafw").classes)
    one = clips.write_mp4(tmp_path / "one.mp4", seconds=0.5, hz=None)
    names = [f"{i:05d}" for i in range(1, 12)]
    (data / "data/clips").mkdir(parents=True)
    for name in names[:-1]:
        shutil.copy(one, data / f"data/clips/{name}.mp4")
    for fold, part in itertools.product(range(5), ("train", "test")):
        folder = data / f"Train & Test Set/single/no_caption/set_{fold + 1}"
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [i for i in range(11) if (i % 5 == fold) == (part == "test")]
        (folder / f"{part}.txt").write_text("".join(f"{names[i]}.mp4 {classes[i]}\r\n" for i in chosen))
    options = extraction.Options(processes=1)
    out = extraction.extract("mafw", "lite", root=str(data), out=str(tmp_path / "F"), options=options)
    loaded = stores.load(out, "lite")
    assert loaded.dataset == "mafw"
    assert loaded.classes == tuple(classes)
    assert loaded.ids == names[:-1]
    assert loaded.counts["quarantined"] == 1
    assert table(out / "quarantine.csv")["00011"]["reason"] == "no such file"
    assert [f.test for f in loaded.folds][:2] == [("00001", "00006"), ("00002", "00007")]
    with pytest.raises(AvjaxError, match="holds features of mafw, not folder"):
        run(data, out)


# ---- kill -9 ---------------------------------------------------------------------------------------------------------

STAGES = {
    "media": lambda out: next(out.glob("staged/*/video-*.npz"), None),
    "text": lambda out: next(out.glob("staged/*/text-*.npz"), None),
    "packing": lambda out: next(out.glob("tfds/*/*/incomplete*"), None),
}


def kill_at(stage, data, out, scratch):
    """Starts an extraction, kills its parent process at the stage, and waits until its workers are gone."""
    process = start(data, out, scratch)
    try:
        while not STAGES[stage](out) and process.poll() is None:
            time.sleep(0.0005)
        children = descendants(process.pid)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -9, f"the run ended before it could be killed during {stage}"
    end = time.monotonic() + 5
    while any(map(alive, children)):
        assert time.monotonic() < end, f"workers outlived the run that was killed during {stage}"
        time.sleep(0.02)


def start(data, out, scratch):
    command = [sys.executable, "-m", "avjax.extract", "--config=configs/extract_folder.py", f"--out={out}",
               f"--config.data.root={data}", "--config.workers=2"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(scratch)}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def descendants(pid):
    parents = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    pids = [pid]
    for parent in pids:
        pids += [child for child, its in parents.items() if its == parent]
    return pids[1:]


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_and_compare(stages, data, undisturbed, tmp_path):
    out, scratch = tmp_path / "killed", tmp_path / "scratch"
    scratch.mkdir()
    for stage in stages:
        kill_at(stage, data, out, scratch)
        with pytest.raises(AvjaxError, match="no finished feature store"):
            stores.load(out, "lite")
    assert start(data, out, scratch).wait() == 0
    assert entry(out)["content"] == entry(undisturbed)["content"]
    assert decoded(out) == decoded(undisturbed)
    for name in ("sentences.csv", "quarantine.csv", "index.json"):
        assert (out / name).read_text() == (undisturbed / name).read_text()
    assert not leftovers(out)
    assert not list(scratch.iterdir())


@pytest.mark.slow
def test_killed_during_media_it_goes_on(extracted, tmp_path):
    kill_and_compare(["media"], *extracted, tmp_path)


@pytest.mark.slow
def test_killed_at_every_stage_it_goes_on(extracted, tmp_path):
    data, out = (shutil.copytree(source, tmp_path / source.name) for source in extracted)
    if (REAL / "java_sed_open/labels.csv").is_file():
        real = sorted((REAL / "java_sed_open/mp4").glob("*.mp4"))[:4]
        for path in real:
            shutil.copy2(path, data / path.name)
        write_table(data, [*ROWS, *((p.name, "sad") for p in real)])
        run(data, out)
        assert entry(out)["counts"]["masked_video"] == 7, "real clips have faces"
    kill_and_compare(["media", "media", "text", "text", "packing", "packing"], data, out, tmp_path)

"""The doctor's checks of the machine and of public lists, and its exit statuses."""

import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest

from avjax.checks import machine as machine_checks
from avjax.encoders import weights
from avjax.encoders.registry import REGISTRY
from avjax.encoders.sources import Entry, File
from avjax.errors import AvjaxError
from tests import clips
from tests.conftest import REAL

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LISTS = REAL / "dfew_mafw_msp_ravdess_folds" / "HiCMAE"


def doctor(*arguments, **environment):
    command = [sys.executable, "-m", "avjax.doctor", *map(str, arguments)]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


# ---- The machine -----------------------------------------------------------------------------------------------------


def pretend(monkeypatch, versions):
    """Patches versions of packages, None for a missing one; others stay as they are."""
    real = importlib.metadata.version

    def version(name):
        if name in versions and versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(machine_checks.importlib.metadata, "version", version)


def by_name(rows):
    return {row.what: row for row in rows}


@pytest.mark.parametrize(
    ("version", "state", "expected"),
    [
        ("0.10.2", "ok", "0.10.2"),
        ("0.4.1", "broken", "0.4.1; supported: <0.13,>=0.10.2"),
        (None, "broken", "missing"),
    ],
)
def test_packages_against_their_ranges(monkeypatch, version, state, expected):
    pretend(monkeypatch, {"jax": version})
    row = by_name(machine_checks.packages())["jax"]
    assert (row.state, row.value) == (state, expected)
    assert row.fix == ("pip install 'jax<0.13,>=0.10.2'" if state == "broken" else "")


def test_python_is_checked(monkeypatch):
    monkeypatch.setattr(machine_checks.platform, "python_version", lambda: "3.9.1")
    row = by_name(machine_checks.packages())["python"]
    assert (row.state, row.value) == ("broken", "3.9.1; supported: >=3.11")


def test_without_its_metadata_no_range_is_known(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine_checks.importlib.metadata, "metadata", missing)
    monkeypatch.setattr(machine_checks.importlib.metadata, "requires", missing)
    assert by_name(machine_checks.packages())["ranges"].state == "note"
    assert not list(machine_checks.extras())


@pytest.mark.parametrize(
    ("versions", "state"),
    [({"av": None}, "note"), ({"av": "12.0.0"}, "broken"), ({"av": "12.0.0", "h5py": None}, "broken")],
)
def test_extras_may_be_missing_but_not_be_out_of_range(monkeypatch, versions, state):
    pretend(monkeypatch, versions)
    (row,) = [row for row in machine_checks.extras() if row.what.startswith("media")]
    assert row.state == state
    assert row.fix == "pip install 'avjax[media]'"
    assert "av" in row.what + row.value


def test_codecs_are_tried():
    rows = by_name(machine_checks.codecs())
    assert list(rows) == ["mp4 (h264, aac)", "flv (flv, mp3)", "mp3 (mp3)", "wav (pcm_s16le)"]
    assert {row.state for row in rows.values()} == {"ok"}


def test_a_codec_that_is_missing_is_broken(monkeypatch):
    monkeypatch.setattr(machine_checks, "_has_codec", lambda codec, mode: codec != "mp3")
    rows = by_name(machine_checks.codecs())
    assert rows["mp3 (mp3)"].state == rows["flv (flv, mp3)"].state == "broken"
    assert rows["mp3 (mp3)"].value == "cannot be decoded: no mp3"
    assert rows["wav (pcm_s16le)"].state == "ok"


def test_a_codec_that_cannot_be_written_is_not_tried(monkeypatch):
    monkeypatch.setattr(machine_checks, "_has_codec", lambda codec, mode: mode == "r" or codec != "libx264")
    row = by_name(machine_checks.codecs())["mp4 (h264, aac)"]
    assert (row.state, row.value) == ("ok", "has a decoder; not tried: no libx264 to write it with")


def test_what_is_written_but_not_read_is_broken(monkeypatch):
    monkeypatch.setattr(machine_checks, "_write", lambda path, video, audio: path.write_bytes(b"nothing"))
    assert {row.state for row in machine_checks.codecs()} == {"broken"}


def test_unknown_codec_is_not_known():
    assert machine_checks._has_codec("aac", "r")
    assert not machine_checks._has_codec("no_such_codec", "r")


def test_without_av_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(machine_checks.importlib.util, "find_spec", lambda name: None)
    (row,) = machine_checks.codecs()
    assert (row.state, row.fix) == ("note", "pip install 'avjax[media]'")


def test_places(monkeypatch, tmp_path):
    monkeypatch.setenv("AVJAX_DATA", str(tmp_path))
    monkeypatch.setenv("AVJAX_CACHE", str(tmp_path / "not" / "there" / "yet"))
    rows = by_name(machine_checks.folders())
    assert {row.state for row in rows.values()} == {"ok"}
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("AVJAX_DATA", str(tmp_path / "none"))
    monkeypatch.setenv("AVJAX_CACHE", str(tmp_path / "file"))
    rows = by_name(machine_checks.folders())
    assert rows["AVJAX_DATA"].state == "note"
    assert rows["AVJAX_CACHE"].state == "broken"


def test_a_small_disk_is_noted(monkeypatch, tmp_path):
    monkeypatch.setenv("AVJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(machine_checks, "_LITTLE_DISK", 1e18)
    assert by_name(machine_checks.folders())["AVJAX_CACHE"].state == "note"


def test_machine_has_devices_and_cores():
    rows = by_name(machine_checks.machine())
    assert rows["device 0"].value.startswith("cpu")
    assert {"cores", "memory"} <= set(rows)


class Tempting:
    """A source that must not be used."""

    def collect(self, files, folder):
        raise AssertionError("downloads")

    def __str__(self):
        return "somewhere"


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Returns the file of the only registered weights, in an empty cache."""
    monkeypatch.setenv("AVJAX_CACHE", str(tmp_path))
    monkeypatch.delenv("AVJAX_WEIGHTS", raising=False)
    for name in list(REGISTRY):
        monkeypatch.delitem(REGISTRY, name)
    expected = File(hashlib.sha256(b"x").hexdigest(), 1)
    monkeypatch.setitem(REGISTRY, "tiny", Entry("a test", "none", {"a.bin": expected}, (Tempting(),)))
    return tmp_path / "weights" / "tiny" / "a.bin"


@pytest.mark.parametrize(
    ("content", "state", "expected"),
    [
        (b"x", "ok", "available, checksums match"),
        (b"y", "broken", "sha256 is"),
        (None, "ok", "absent; fetched at first use: somewhere"),
    ],
)
def test_weights_are_looked_at_not_fetched(tiny, content, state, expected):
    if content is not None:
        tiny.parent.mkdir(parents=True)
        tiny.write_bytes(content)
    (row,) = machine_checks.weights()
    assert row.state == state
    assert expected in row.value


def test_weights_without_a_source_are_noted(tiny, monkeypatch):
    monkeypatch.setitem(REGISTRY, "tiny", Entry("a test", "none", {"a.bin": File("", 0)}, ()))
    (row,) = machine_checks.weights()
    assert (row.state, row.value) == ("note", "absent, and no source is known (a test)")


def test_a_folder_of_ones_own_must_be_whole(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("AVJAX_WEIGHTS", str(tmp_path / "own"))
    assert not weights.is_there("tiny")
    (tmp_path / "own" / "tiny").mkdir(parents=True)
    with pytest.raises(AvjaxError, match="no such file, but the folder was found"):
        weights.is_there("tiny")


def test_what_cannot_be_looked_at_is_broken_and_stops_nothing(monkeypatch):
    def fail():
        raise RuntimeError("driver too old\nmore")

    monkeypatch.setattr(machine_checks, "SECTIONS", {"machine": fail, "folders": machine_checks.folders})
    rows = machine_checks.check()
    assert rows[0] == machine_checks.Row("machine", "all", "RuntimeError: driver too old", "broken")
    assert {row.section for row in rows[1:]} == {"folders"}
    assert machine_checks.as_json(rows)["broken"] >= 1


# ---- Exit statuses ---------------------------------------------------------------------------------------------------


def test_environment_as_json(tmp_path):
    done = doctor("--json", AVJAX_CACHE=str(tmp_path))
    output = json.loads(done.stdout)
    assert done.returncode == (1 if output["broken"] else 0)
    assert {row["section"] for row in output["rows"]} == set(machine_checks.SECTIONS)


def test_a_cache_that_cannot_be_written_is_status_1(tmp_path):
    (tmp_path / "file").touch()
    done = doctor(AVJAX_CACHE=str(tmp_path / "file"))
    assert done.returncode == 1
    assert "broken" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "expected nothing, data, or lists DIR"),
        (["lists"], "expected nothing, data, or lists DIR"),
        (["data"], "no --config"),
        (["lists", "/no/such/folder"], "no list of folds"),
    ],
)
def test_mistakes_in_the_call_are_status_2(arguments, message):
    done = doctor(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("parts", "status"), [(("train", "test"), 0), (("train", "test", "train"), 1)])
def test_data(tmp_path, parts, status):
    """Makes three clips; the third has the content of the second."""
    for i in range(len(parts)):
        clips.write_mp4(tmp_path / f"{i}.mp4", fps=20, hz=220 + 80 * min(i, 1))
    rows = [f"{i}.mp4,a,{part}" for i, part in enumerate(parts)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label,split", *rows]) + "\n")
    flags = ["--config=configs/extract_folder.py", f"--config.data.root={tmp_path}", f"--out={tmp_path / 'out'}"]
    done = doctor("data", *flags, "--no_faces", "--workers=1", "--json")
    assert done.returncode == status, done.stderr
    output = json.loads(done.stdout)
    assert output == json.loads((tmp_path / "out" / "audit.json").read_text())
    assert [f["kind"] for f in output["findings"] if f["severity"] == "invalid"] == ["copy in test"] * status


# ---- Lists -----------------------------------------------------------------------------------------------------------


def write_lists(root, folds):
    """Writes HiCMAE's layout from fold → part → clip numbers, whose label is the last digit's parity."""
    for fold, parts in folds.items():
        for part, numbers in parts.items():
            path = root / f"split{fold}" / f"{part}.csv.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress("\n".join(f"a/{n}.mp4 b/{n}.wav {n % 2}" for n in numbers).encode()))
    return root


VALID = {"01": {"train": range(3), "test": range(3, 6)}, "02": {"train": range(3, 6), "test": range(3)}}


def test_valid_lists(tmp_path):
    done = doctor("lists", write_lists(tmp_path, VALID), "--json")
    assert done.returncode == 0
    output = json.loads(done.stdout)
    assert output["problems"] == []
    assert {(p["fold"], p["part"]): p["labels"] for p in output["parts"]} == {
        ("1", "test"): {"0": 1, "1": 2},
        ("1", "train"): {"0": 2, "1": 1},
        ("2", "test"): {"0": 2, "1": 1},
        ("2", "train"): {"0": 1, "1": 2},
    }


def test_lists_whose_validation_is_test(tmp_path):
    same = VALID | {"01": VALID["01"] | {"val": range(3, 6)}}
    done = doctor("lists", write_lists(tmp_path, same))
    assert done.returncode == 1
    assert "invalid: fold 1: val and test are the same 3 clips" in done.stdout


@pytest.mark.parametrize(("name", "status"), [("msp-improv", 1), ("ravdess", 0)])
def test_real_lists(name, status):
    if not (LISTS / name).is_dir():
        pytest.skip(f"real lists are not at {LISTS / name}")
    done = doctor("lists", LISTS / name, "--json")
    assert done.returncode == status, done.stderr
    output = json.loads(done.stdout)
    tested = sum(part["clips"] for part in output["parts"] if part["part"] == "test")
    assert tested == {"msp-improv": 7787, "ravdess": 1440}[name]
    assert [problem for problem in output["problems"] if "val and test are the same" not in problem] == []
    assert len(output["problems"]) == {"msp-improv": 6, "ravdess": 0}[name]

"""Extraction by Beam: the same examples as by worker processes, on cloud storage too, whatever is killed."""

import csv
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.features import beam, presets, tfds
from avjax.features import store as stores
from avjax.utils import paths
from tests import clips

pytest.importorskip("apache_beam", reason="Apache Beam is not installed (avjax[beam])")

BEAM = "DirectRunner"
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# A cloud storage that is a folder, for all processes of a run: Python imports this file when it starts.
CLOUD = """
import os, fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

class Cloud(DirFileSystem):
    protocol = "gcs"
    def __init__(self, **options):
        super().__init__(path=os.environ["CLOUD"], fs=LocalFileSystem(auto_mkdir=True))
    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("gs://").removeprefix("gcs://")

fsspec.register_implementation("gcs", Cloud, clobber=True)
fsspec.register_implementation("gs", Cloud, clobber=True)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Films with and without audio, an audio file, and a file that is neither."""
    root = tmp_path_factory.mktemp("data") / "R"
    rows = [(f"c{i}.mp4", ("sad", "angry")[i % 2]) for i in range(5)]
    for i, (name, _) in enumerate(rows):
        clips.write_mp4(root / name, hz=None if i == 4 else 150 + 30 * i)
    clips.write_wav(root / "voice.wav", hz=250)
    (root / "broken.mp4").write_bytes(b"not a film")
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *rows, ("voice.wav", "sad"), ("broken.mp4", "sad")])
    return root


def command(data, out, *more):
    return [sys.executable, "-m", "avjax.extract", "--config", "configs/extract_folder.py",
            f"--config.data.root={data}", f"--out={out}", *more]  # fmt: skip


def extract(data, out, *more, **environment):
    done = subprocess.run(
        command(data, out, *more), cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def examples_hash(out):
    """One hash of all decoded examples, in the order of their ids."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in sorted(value):
                digest.update(key.encode())
                add(value[key])
        else:
            array = np.asarray(value)
            digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())

    read = {e["clip_id"]: e for e in tfds.read(out, "folder", "lite")}
    for clip_id in sorted(read):
        add(read[clip_id])
    return digest.hexdigest(), sorted(read)


@pytest.fixture(scope="module")
def local(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "F"
    extract(data, out)
    return out


def entry(out):
    return stores.read_index(out)["presets"]["lite"]


@pytest.mark.thorough
def test_it_gives_what_worker_processes_give(data, local, tmp_path):
    assert "DirectRunner: 7 clips in 1 pieces" in extract(data, tmp_path / "F", "--runner=DirectRunner")
    (digest, ids), theirs = examples_hash(tmp_path / "F"), examples_hash(local)
    assert (digest, ids) == theirs
    assert len(ids) == 6
    assert entry(tmp_path / "F")["content"] == entry(local)["content"]
    assert entry(tmp_path / "F")["counts"] == entry(local)["counts"]
    assert entry(tmp_path / "F")["rejected"] == entry(local)["rejected"]
    assert [i for i, _ in entry(local)["rejected"]] == ["broken"]


@pytest.mark.slow
@pytest.mark.parametrize("runners", [(BEAM, BEAM), (BEAM, "local"), ("local", BEAM)])
def test_killed_and_started_again_it_loses_and_doubles_nothing(data, local, tmp_path, runners):
    out = tmp_path / "F"
    first, second = ([] if name == "local" else [f"--runner={name}"] for name in runners)
    killed = subprocess.Popen(
        command(data, out, *first), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while len(list(out.glob("staged/*/audio-*.npz"))) < 2:
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    before = {p: p.stat().st_mtime_ns for p in out.glob("staged/*/*.npz")}
    assert not (out / "index.json").exists()
    extract(data, out, *second)
    assert examples_hash(out) == examples_hash(local)
    assert entry(out)["content"] == entry(local)["content"]
    kept = {p: p.stat().st_mtime_ns for p in before if "failed" not in p.name and p.exists()}
    assert kept == {p: t for p, t in before.items() if "failed" not in p.name}, "what was staged is not measured again"


@pytest.mark.slow
def test_store_and_media_may_be_on_cloud_storage(data, local, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(CLOUD)
    bucket = tmp_path / "cloud/bucket"
    (bucket / "media").mkdir(parents=True)
    for path in data.iterdir():
        (bucket / "media" / path.name).write_bytes(path.read_bytes())
    environment_of_cloud = {"PYTHONPATH": f"{tmp_path / 'site'}:{REPOSITORY}", "CLOUD": str(tmp_path / "cloud"),
             "AVJAX_CACHE": str(paths.cache())}  # fmt: skip
    extract(data, "gs://bucket/F", "--runner=DirectRunner", "--media=gs://bucket/media", **environment_of_cloud)
    assert not list(data.parent.glob("F*"))
    assert entry(bucket / "F")["content"] == entry(local)["content"]
    assert examples_hash(bucket / "F") == examples_hash(local)
    trained = subprocess.run(
        [sys.executable, "-m", "avjax.train", "--config", "configs/fusion_folder.py:concat", "--config.train.epochs=1",
         "--config.data.features=gs://bucket/F", "--config.protocol.fold_count=2", f"--workdir={tmp_path / 'W'}"],
        cwd=REPOSITORY, env=os.environ | environment_of_cloud, capture_output=True, text=True,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert json.loads((tmp_path / "W/metrics.json").read_text())["counts"]["used"] == 6


def test_a_machine_that_would_make_other_features_is_refused(tmp_path):
    with pytest.raises(AvjaxError, match="would make audio otherwise"):
        beam._SharedExtractor(str(tmp_path), presets.PRESETS["lite"], {"audio": "of another version"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--runner=NoSuchRunner",), "--runner=NoSuchRunner: "),
        (("--media=gs://bucket",), "are of a Beam runner; name it with --runner"),
        (("--runner_options=--x=1",), "are of a Beam runner; name it with --runner"),
    ],
)
def test_flags_that_do_not_fit_are_refused(data, tmp_path, flags, message):
    done = subprocess.run(command(data, tmp_path / "F", *flags), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr

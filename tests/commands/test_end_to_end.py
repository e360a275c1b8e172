"""The commands of the documents, as a user types them, from media files to tables."""

import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from avjax.datasets.metadata import metadata
from tests import clips

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
METRICS = {"dataset", "protocol", "task", "counts", "folds", "mean", "std", "pooled"}


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.thorough
@pytest.mark.budget(150)
@pytest.mark.weights
def test_real_clips_leave_one_speaker_out(java_sed, tmp_path):
    with (java_sed / "labels.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["speaker"] in ("01", "06") and r["sentence"] in ("01", "02")]
    rows = [r for r in rows if r["label"] in ("happy", "sad")]
    data = tmp_path / "R"
    for row in rows:
        (data / row["file"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(java_sed / row["file"], data / row["file"])
    with (data / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("file", "label", "speaker"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    out, workdir = tmp_path / "F", tmp_path / "W"
    python("avjax.extract", "--config", "configs/extract_folder.py", f"--config.data.root={data}", "--out", out)
    with (out / "sentences.csv").open(newline="") as file:
        sentences = {r["clip_id"]: r["both"] for r in csv.DictReader(file)}
    # The emotions that these faces show.
    smiling = {i for i, s in sentences.items() if "pulled-up lip corners" in s}
    assert smiling >= {r["file"].removesuffix(".mp4") for r in rows if r["label"] == "happy"}
    assert len(smiling) < len(rows)
    flags = ["--config.train.epochs=4", "--config.train.seeds=1,2"]
    command = ["avjax.train", "--config", "configs/etg_folder.py:all_clips", f"--config.data.features={out}", *flags]
    python(*command, "--workdir", workdir)
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert set(metrics) >= METRICS
    assert metrics["counts"] == {"used": 8, "quarantined": 0, "masked_audio": 0, "masked_video": 0}
    assert [(f["fold"], f["seed"], f["n_test"], f["speaker_overlap"]) for f in metrics["folds"]] == [
        (fold, seed, 4, 0) for fold in ("01", "06") for seed in (1, 2)
    ]
    with np.load(workdir / "predictions.npz") as rows:
        right = rows["label"] == rows["logits_fusion"].argmax(-1)
        assert metrics["pooled"]["war"] == pytest.approx(right.mean())
    for name in ("report.html", "confusion.png", "curves.png", "config.json", "environment.json", "metrics.jsonl"):
        assert (workdir / name).stat().st_size > 0
    assert list(workdir.glob("events.*"))
    table = python("avjax.evaluate", "--markdown", workdir)
    assert "| W |" in table
    assert "logistic regression, audio+video+text" in table


@pytest.mark.thorough
@pytest.mark.budget(120)
@pytest.mark.weights
def test_mafw_miniature_trains_over_its_five_folds(tmp_path):
    classes = list(metadata("mafw").classes)
    root = tmp_path / "MAFW"
    one = clips.write_mp4(root / "data/clips/00001.mp4", seconds=0.5)
    for i in range(2, 23):
        shutil.copy(one, root / f"data/clips/{i:05d}.mp4")
    for fold in range(5):
        folder = root / f"Train & Test Set/single/no_caption/set_{fold + 1}"
        folder.mkdir(parents=True)
        for part in ("train", "test"):
            chosen = [i for i in range(22) if (i % 5 == fold) == (part == "test")]
            (folder / f"{part}.txt").write_text("".join(f"{i + 1:05d}.mp4 {classes[i % 11]}\n" for i in chosen))
    out, workdir = tmp_path / "F", tmp_path / "W"
    flags = [f"--config.data.root={root}", f"--config.data.features={out}", "--config.train.epochs=2"]
    printed = python("avjax.train", "--config", "configs/etg_mafw.py", *flags, "--workdir", workdir)
    assert "demo" not in printed
    assert (out / "index.json").is_file()  # training extracted the missing features
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert [f["fold"] for f in metrics["folds"]] == ["1", "2", "3", "4", "5"]
    assert sum(f["n_test"] for f in metrics["folds"]) == 22
    assert metrics["protocol"].startswith("5 folds of the data set")
    assert metrics["counts"]["masked_video"] == 22  # a synthetic pattern has no face
    assert metrics["dataset"] == "mafw"


def test_training_with_a_root_that_is_not_mafw_names_what_is_missing(tmp_path):
    command = [sys.executable, "-m", "avjax.train", "--config", "configs/etg_mafw.py", f"--config.data.root={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no MAFW; missing: data/clips" in done.stderr
    assert "Traceback" not in done.stderr

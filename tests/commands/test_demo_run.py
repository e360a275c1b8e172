"""The first command of the README on a fresh machine: uninterrupted, killed ten times, and from a wheel."""

import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from avjax.encoders import weights

pytestmark = [pytest.mark.slow, pytest.mark.weights]
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "avjax.train", "--config", "configs/etg_mafw.py"]
STAMP = "demo corpus (synthetic), not MAFW"
CHANCE = 1 / 11
KILLS = 10


def fresh(root: pathlib.Path, **more: str) -> dict[str, str]:
    """Returns the environment of a machine that has only the weights, which are not fetched again."""
    for name in ("minilm", "face_landmarker"):
        fetched = weights.fetch(name)
        folder = fetched if fetched.is_dir() else fetched.parent
        (root / "cache" / "weights").mkdir(parents=True, exist_ok=True)
        (root / "cache" / "weights" / name).symlink_to(folder)
    kept = {k: v for k, v in os.environ.items() if k not in ("AVJAX_DATA", "AVJAX_WEIGHTS")}
    return kept | {"AVJAX_CACHE": str(root / "cache"), "HOME": str(root), "COLUMNS": "100"} | more


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Runs the command of the README; (environment, run directory, output, seconds)."""
    root = tmp_path_factory.mktemp("whole")
    environment = fresh(root, PYTHONPATH=str(REPOSITORY))
    start = time.monotonic()
    done = subprocess.run(COMMAND, cwd=root, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return environment, root / "runs" / "etg_mafw-demo", done.stdout, time.monotonic() - start


def test_the_data_set_is_named_everywhere(finished_run):
    _, workdir, printed, _ = finished_run
    assert printed.count(STAMP) >= 3  # banner, first line, table
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert metrics["dataset"] == STAMP
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(row)["dataset"] for row in rows} == {STAMP}
    assert STAMP in (workdir / "report.html").read_text()
    assert {f["fold"] for f in metrics["folds"]} == set("12345")
    assert metrics["counts"] == {"used": 220, "quarantined": 0, "masked_audio": 0, "masked_video": 0}


def test_neither_modality_is_enough_and_nothing_else_gives_the_class_away(finished_run):
    metrics = json.loads((finished_run[1] / "metrics.json").read_text())
    mean = {name: scores["mean"]["war"] for name, scores in metrics["reference"].items()}
    error = np.sqrt(CHANCE * (1 - CHANCE) / 220)
    assert mean["length, lead-in, loudness"] < CHANCE + 3 * error
    for alone in ("audio", "video"):
        assert mean[alone] > 2.5 * CHANCE
        assert mean["audio+video"] > mean[alone] + 0.1
    heads = {head: scores["war"] for head, scores in metrics["heads"].items()}
    assert heads["audio"] > 2 * CHANCE
    assert heads["fusion"] > heads["audio"]


def test_killed_at_ten_random_moments_it_ends_in_the_same_bits(finished_run, tmp_path):
    _, finished, _, seconds = finished_run
    environment = fresh(tmp_path, PYTHONPATH=str(REPOSITORY))
    seed = random.randrange(10**6)
    print("seed", seed)
    draw = random.Random(seed)
    fractions = [0.0, *sorted(draw.uniform(0, 0.9) for _ in range(KILLS))]
    for before, after in itertools.pairwise(fractions):
        # Work lost by a kill is repeated, so the kills are spread over the whole run.
        wait = 4 + (after - before) * seconds
        while not _killed(tmp_path, environment, wait):
            shutil.rmtree(tmp_path / "runs")  # it finished before: train again
            wait /= 2
    done = subprocess.run(COMMAND, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    ours, theirs = (np.load(w / "predictions.npz") for w in (tmp_path / "runs/etg_mafw-demo", finished))
    assert ours.files == theirs.files
    for name in ours.files:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert (tmp_path / "runs/etg_mafw-demo/metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()
    assert not list(tmp_path.glob("cache/demo/**/.*.part"))


def _killed(root: pathlib.Path, environment: dict[str, str], seconds: float) -> bool:
    """Returns whether the command was killed after `seconds`, not finished before; no process of it is left."""
    log = root / "output.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            COMMAND, cwd=root, env=environment, start_new_session=True, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            process.wait(seconds)
            assert process.returncode == 0, log.read_text()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # only the command: its workers must notice by themselves
            process.wait()
    print(f"{process.returncode} after {seconds:.1f} s:", *log.read_text().splitlines()[-1:])
    deadline = time.monotonic() + 10
    while (left := _of_session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, f"still there: {left}"
    return process.returncode == -signal.SIGKILL


def _of_session(session: int) -> list[int]:
    pids = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            # After the name, which may contain anything: state, parent, group, session.
            state, _, _, own = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(own) == session and state != "Z":
            pids.append(int(entry.name))
    return pids


def test_wheel_runs_outside_the_checkout(finished_run, tmp_path):
    environment, finished, _, _ = finished_run
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", str(REPOSITORY), "-w", str(tmp_path)], check=True, timeout=600)
    (wheel,) = tmp_path.glob("avjax-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    environment = environment | {"PYTHONPATH": str(tmp_path / "site")}
    where = [sys.executable, "-c", "import avjax; print(avjax.__file__)"]
    assert str(tmp_path) in subprocess.check_output(where, cwd=tmp_path, env=environment, text=True)
    done = subprocess.run(COMMAND, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert STAMP in done.stdout
    ours, theirs = (np.load(w / "predictions.npz") for w in (tmp_path / "runs/etg_mafw-demo", finished))
    for name in ours.files:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)

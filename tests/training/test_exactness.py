"""Runs that are killed or stopped at random times end bit-identical to the undisturbed run."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests import synthetic
from tests.commands.test_train import final

EPOCHS, KILLS, TERMS = 24, 20, 5
CONFIG = "configs/etg_folder.py:audio_only"
LAUNCHER = pathlib.Path(__file__).resolve().parents[2] / "launch" / "local.sh"
KEYS = {
    "model.width": 8,
    "train.epochs": EPOCHS,
    "train.epochs_per_call": 1,
    "train.patience": 0,
    "train.batch_size": 8,
    "train.save_steps": 2,
}
# What a run is made of, and the processes that make it.
MODES = {"resident": 1, "streamed": 1, "two processes": 2}


def command(mode: str, features: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    keys = KEYS | {"data.features": features, "data.mode": "streamed" if mode == "streamed" else "resident"}
    arguments = ["--config", CONFIG, "--workdir", str(workdir), *(f"--config.{k}={v}" for k, v in keys.items())]
    if MODES[mode] == 1:
        return [sys.executable, "-m", "avjax.train", *arguments]
    return [str(LAUNCHER), "--processes", str(MODES[mode]), "--grace", "5", "--", *arguments]


def start(mode: str, features: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "AVJAX_PYTHON": sys.executable}
    env["AVJAX_CACHE"] = str(features.parent / "cache")
    with (workdir.parent / "log").open("w") as out:
        return subprocess.Popen(
            command(mode, features, workdir), env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def output(workdir: pathlib.Path) -> str:
    return (workdir.parent / "log").read_text()


def wait_for(text: str, process: subprocess.Popen, workdir: pathlib.Path) -> None:
    while text not in output(workdir) and process.poll() is None:
        time.sleep(0.02)


def stop(mode: str, features, workdir, how: signal.Signals, seconds: float) -> int:
    """Sends a signal so long after the run has its state; gives the exit status."""
    process = start(mode, features, workdir)
    wait_for("protocol: ", process, workdir)
    time.sleep(seconds)
    if how == signal.SIGKILL:
        kill_all(process)
    else:
        process.send_signal(how)
    return process.wait(120)


def kill_all(process: subprocess.Popen) -> None:
    """Everything of a run at once, as when its machine fails: launchers' processes are groups of their own."""
    for pid in [int(p.name) for p in pathlib.Path("/proc").iterdir() if p.name.isdecimal()]:
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == process.pid:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("features")
    synthetic.write_store(root, synthetic.make(clips=36, speakers=3, signal=0.4))
    return root


def finish(mode: str, features, workdir: pathlib.Path) -> float:
    """Runs to the end; gives the seconds from the protocol to it."""
    process = start(mode, features, workdir)
    wait_for("protocol: ", process, workdir)
    begin = time.monotonic()
    assert process.wait(500) == 0, output(workdir)
    return time.monotonic() - begin


def left(workdir: pathlib.Path) -> set[str]:
    """What is in the run directory; event files have a time in their names."""
    names = {p.name for p in [*workdir.iterdir(), *(workdir / "checkpoints").iterdir()]}
    return {"events" if name.startswith("events.") else name for name in names}


def check_equal(one: pathlib.Path, other: pathlib.Path) -> None:
    for name in ("metrics.json", "predictions.npz", "metrics.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for a, b in zip(final(one), final(other), strict=True):
        assert a.tobytes() == b.tobytes()
    assert left(one) == left(other)
    assert not [p for p in one.rglob("*") if p.name.endswith(".part") or "tmp" in p.name]
    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    by_lane: dict[tuple, list[int]] = {}
    for row in rows:
        by_lane.setdefault((row["fold"], row["seed"]), []).append(row["epoch"])
    assert set(map(tuple, by_lane.values())) == {tuple(range(1, EPOCHS + 1))}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_random_kills_and_stops(mode, features, tmp_path):
    full, cut = tmp_path / "one" / "whole", tmp_path / "other" / "cut"
    for workdir in (full, cut):
        workdir.parent.mkdir()
    seconds = finish(mode, features, full)
    rng = random.Random(0)
    events = rng.sample([signal.SIGKILL] * KILLS + [signal.SIGTERM] * TERMS, KILLS + TERMS)
    ended = []
    for how in events:
        # Most fall within the epochs; as the run goes on from where it was, later ones meet its end and its report.
        status = stop(mode, features, cut, how, rng.uniform(0, seconds / 8))
        ended.append((how.name, status))
        if how == signal.SIGTERM and "told to stop" in output(cut):
            assert status == 128 + signal.SIGTERM
    finish(mode, features, cut)
    check_equal(cut, full)
    print(mode, f"undisturbed {seconds:.1f} s;", ended)

"""The whole command on a small made-up feature store: killed and restarted, finished, changed, interrupted."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from avjax import cli, config, train
from avjax.errors import AvjaxError
from avjax.training import run_directory
from tests import synthetic

CONFIG = "configs/etg_folder.py"
SETTINGS = {
    "model.width": 8,
    "train.epochs": 12,
    "train.epochs_per_call": 1,
    "train.patience": 0,
    "train.batch_size": 8,
}
VARIANT = "audio_only"


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("features")
    synthetic.write_store(root, synthetic.make(clips=36, speakers=3, signal=0.4))
    return root


def settings(features: pathlib.Path, **more):
    chosen = {k.replace(".", "__"): v for k, v in SETTINGS.items()} | {"data__features": str(features)} | more
    return config.settings(f"{CONFIG}:{VARIANT}", **chosen)


def command(features: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    keys = SETTINGS | {"data.features": features}
    main = [sys.executable, "-m", "avjax.train", "--config", f"{CONFIG}:{VARIANT}", "--workdir", str(workdir)]
    return main + [f"--config.{k}={v}" for k, v in keys.items()]


def start(features: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200"}
    env.setdefault("AVJAX_CACHE", str(features.parent / "cache"))
    return subprocess.Popen(
        command(features, workdir), env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(features: pathlib.Path, workdir: pathlib.Path) -> str:
    process = start(features, workdir)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def stop(features: pathlib.Path, workdir: pathlib.Path, at: str, how: signal.Signals = signal.SIGKILL) -> str:
    """Runs until a line of the output begins with `at`, then sends a signal; returns the output."""
    process = start(features, workdir)
    output = []
    for line in process.stdout:
        output.append(line)
        if line.startswith(at):
            process.send_signal(how)
            break
    _, err = process.communicate(timeout=300)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), err
    return "".join([*output, err])


def final(workdir: pathlib.Path) -> list[np.ndarray]:
    """Returns all arrays of the newest checkpoint."""
    import orbax.checkpoint as ocp

    newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
    folder = newest.absolute() / "default"
    reader = ocp.PyTreeCheckpointer()
    # As NumPy arrays, wherever they were, for several processes too.
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree
    )
    tree = reader.restore(folder, restore_args=as_numpy)
    return [np.asarray(v) for v in jax.tree.leaves(tree)]


def assert_equal_runs(one: pathlib.Path, other: pathlib.Path) -> None:
    for name in ("metrics.json", "predictions.npz", "metrics.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for a, b in zip(final(one), final(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def undisturbed(features, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    output = run(features, workdir)
    assert "epoch 12/12" in output
    return workdir


@pytest.mark.budget(45)
def test_a_killed_run_ends_as_if_undisturbed(features, undisturbed, tmp_path):
    stop(features, tmp_path, "epoch 8/")
    output = run(features, tmp_path)
    assert "continuing after epoch" in output
    assert "epoch 3/" not in output
    assert_equal_runs(tmp_path, undisturbed)


@pytest.mark.thorough
@pytest.mark.budget(120)
def test_runs_killed_and_interrupted_in_turn_end_as_if_undisturbed(features, undisturbed, tmp_path):
    stop(features, tmp_path, "epoch 1/")  # the first checkpoint may be half-written
    stop(features, tmp_path, "epoch 5/")
    output = stop(features, tmp_path, "epoch 8/", signal.SIGINT)
    assert "continuing after epoch" in output
    assert "interrupted; the same command continues from this state" in output
    output = run(features, tmp_path)
    assert "continuing after epoch" in output
    assert "epoch 3/" not in output
    assert_equal_runs(tmp_path, undisturbed)


@pytest.mark.thorough
def test_an_interrupt_that_a_library_drops_still_stops_the_run(features, tmp_path, monkeypatch):
    interrupted = threading.Event()
    monkeypatch.setattr(cli, "_interrupted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli._interrupt(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        train.train(settings(features), tmp_path)
    interrupted.clear()
    train.train(settings(features), tmp_path)
    assert (tmp_path / "metrics.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("at", ["protocol:", "9 lanes", *(f"epoch {e}/12" for e in (2, 3, 7, 12))])
def test_killed_at_any_moment(features, undisturbed, tmp_path, at):
    stop(features, tmp_path, at)
    run(features, tmp_path)
    assert_equal_runs(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["report.html", "metrics.json", "predictions.npz"])
def test_killed_while_reporting(features, undisturbed, tmp_path, lost):
    """The files of a report, newest first, do not exist yet."""
    run(features, tmp_path)
    names = ["report.html", "metrics.json", "predictions.npz"]
    for name in names[: names.index(lost) + 1]:
        (tmp_path / name).unlink()
    run(features, tmp_path)
    assert_equal_runs(tmp_path, undisturbed)


def test_every_epoch_and_lane_has_one_row(undisturbed):
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    expected = [(e, f"s{s}", seed) for e in range(1, 13) for s in range(3) for seed in (42, 43, 44)]
    assert [(r["epoch"], r["fold"], r["seed"]) for r in rows] == expected


@pytest.mark.thorough
def test_two_runs_of_one_command_give_equal_files(features, undisturbed, tmp_path):
    train.train(settings(features), tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == (undisturbed / "metrics.json").read_bytes()
    assert (tmp_path / "predictions.npz").read_bytes() == (undisturbed / "predictions.npz").read_bytes()


def test_a_finished_run_says_so_and_changes_nothing(features, undisturbed, capsys):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    train.train(settings(features), undisturbed)
    assert "is finished; nothing to do" in capsys.readouterr().out.replace("\n", " ")
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")} == before


def test_another_configuration_is_refused_with_the_keys_that_differ(features, undisturbed):
    with pytest.raises(AvjaxError, match=r"train\.epochs: was 12, is 13; train\.seeds: .*; choose another --workdir"):
        train.train(settings(features, train__epochs=13, train__seeds=(1,)), undisturbed)


def test_changed_features_are_refused_and_moved_ones_are_not(features, undisturbed, tmp_path):
    moved = tmp_path / "moved"
    synthetic.write_store(moved, synthetic.make(clips=36, speakers=3, signal=0.4))
    train.train(settings(moved), undisturbed)
    synthetic.write_store(tmp_path / "other", synthetic.make(clips=36, speakers=3, signal=0.5))
    with pytest.raises(AvjaxError, match="the features have changed since it started"):
        train.train(settings(tmp_path / "other"), undisturbed)


def test_the_run_directory_is_named_after_the_configuration_and_what_stands_in():
    chosen = config.settings(f"{CONFIG}:audio_only,speaker_norm")
    assert run_directory.default(chosen) == pathlib.Path("runs/etg_folder-audio_only-speaker_norm")
    assert run_directory.default(config.settings("configs/etg_mafw.py"), "demo") == pathlib.Path("runs/etg_mafw-demo")


def test_history_beyond_the_checkpoint_and_cut_lines_are_left_out(tmp_path):
    assert run_directory.read_history(tmp_path, 9) == []
    rows = [{"epoch": e, "fold": "a", "seed": 1} for e in (1, 2, 3)]
    run_directory.write_history(tmp_path, rows)
    assert run_directory.read_history(tmp_path, 2) == rows[:2]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "fo')
    assert run_directory.read_history(tmp_path, 9) == rows


def test_main_stays_linear_and_short():
    assert len(pathlib.Path(train.__file__).read_text().splitlines()) < 300


@pytest.mark.thorough
def test_a_run_directory_on_cloud_storage(features, undisturbed, tmp_path):
    """A folder that is accessed in the same way replaces it."""
    from etils import epath

    workdir = epath.Path(tmp_path / "W")
    train.train(settings(features), workdir)
    for name in ("metrics.json", "metrics.jsonl", "predictions.npz"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert run_directory.is_finished(workdir)
    assert train.train(settings(features), workdir) == workdir


def test_a_dry_run_writes_nothing(features, tmp_path, capsys):
    assert train.train(settings(features), tmp_path / "W", dry=True) is None
    assert "nothing was trained or written" in capsys.readouterr().out
    assert not (tmp_path / "W").exists()

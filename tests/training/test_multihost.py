"""Several processes make one run: the same as one process makes, and none waits for ever for one that is lost."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from avjax import config, models
from avjax.errors import AvjaxError
from avjax.training import batches, checkpoint, loop
from avjax.training import lanes as lane_plans
from avjax.training.checkpoint import Checkpoints
from avjax.training.protocol import folds
from avjax.utils import multihost
from tests import synthetic

CONFIG = "configs/etg_folder.py"
KEYS = {
    "model.width": 8,
    "train.epochs": 3,
    "train.epochs_per_call": 1,
    "train.patience": 0,
    "train.batch_size": 8,
    "train.seeds": "42,",
    "processes.wait": 60,
    "processes.patience": 8,
}


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("features")
    synthetic.write_store(root, synthetic.make(clips=36, speakers=3, signal=0.4))
    return root


def start(
    features: pathlib.Path, workdir: pathlib.Path, process: int, count: int, port: int, **keys
) -> subprocess.Popen:
    """One process of a run, with two devices, its output in a file beside the run directory."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "AVJAX_CACHE": str(features.parent / "cache"),
        "AVJAX_COORDINATOR": f"localhost:{port}",
        "AVJAX_PROCESSES": str(count),
        "AVJAX_PROCESS": str(process),
    }
    chosen = KEYS | {"data.features": features} | keys
    arguments = ["--config", CONFIG, "--workdir", str(workdir), *(f"--config.{k}={v}" for k, v in chosen.items())]
    workdir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "avjax.train", *arguments]
    with (workdir.parent / f"output.{process}").open("w") as out:
        return subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)


def output(workdir: pathlib.Path, process: int) -> str:
    return (workdir.parent / f"output.{process}").read_text()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def rows(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(features, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("alone") / "W"
    process = start(features, workdir, 0, 1, free_port(), **{"mesh.preset": "single"})
    assert process.wait(300) == 0, output(workdir, 0)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "mode"),
    [("dp", "resident"), ("fsdp", "resident"), ("tp", "resident"), ("lanes", "resident"), ("dp", "streamed")],
)
def test_two_processes_make_the_run_of_one(preset, mode, features, alone, tmp_path):
    port, workdir = free_port(), tmp_path / "W"
    keys = {"mesh.preset": preset, "data.mode": mode}
    both = [start(features, workdir, i, 2, port, **keys) for i in range(2)]
    assert [p.wait(400) for p in both] == [0, 0], output(workdir, 0) + output(workdir, 1)
    assert "in 2 processes" in output(workdir, 0)
    assert "epoch" not in output(workdir, 1)  # only one prints
    for ours, one in zip(rows(workdir), rows(alone), strict=True):
        np.testing.assert_allclose(ours["train_loss"], one["train_loss"], rtol=1e-4)
    with np.load(workdir / "predictions.npz") as ours, np.load(alone / "predictions.npz") as one:
        assert set(ours.files) == set(one.files)
    # One process restores bit for bit what two have saved: the digests are those that they computed.
    like = fresh_state(features)
    warned = []
    with Checkpoints(workdir / "checkpoints", warned.append) as checkpoints:
        epoch, state = checkpoints.restore(like)
    assert (epoch, warned) == (3, [])
    read = checkpoint.read(workdir / "checkpoints", "params")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), read["params"])


def fresh_state(features: pathlib.Path) -> loop.State:
    from avjax.features import store

    chosen = config.settings(CONFIG, model__width=8, train__batch_size=8, train__seeds=(42,))
    loaded = store.load(features, chosen.preset, "folder")
    plan = lane_plans.plan(loaded, folds(loaded, chosen.protocol)[0], (42,), chosen.protocol)
    data = batches.resident(loaded, "both", chosen.protocol.standardise)
    return loop.make(models.build(chosen.model, len(loaded.classes)), chosen).init(plan.lanes, data)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_as_one(features, tmp_path):
    """Stopped by SIGTERM to one of them, its checkpoint is taken up by a single process."""
    port, workdir = free_port(), tmp_path / "W"
    both = [start(features, workdir, i, 2, port, **{"train.epochs": 200}) for i in range(2)]
    wait_for(both, workdir, "epoch 2/")
    both[1].send_signal(signal.SIGTERM)
    assert [p.wait(120) for p in both] == [143, 143], output(workdir, 0) + output(workdir, 1)
    assert "stopped on request; the state after epoch" in output(workdir, 0)
    process = start(features, workdir, 0, 1, port, **{"train.epochs": 200, "mesh.preset": "single"})
    assert wait_for([process], workdir, "continuing after epoch")
    process.kill()
    process.wait()


def wait_for(processes: list[subprocess.Popen], workdir: pathlib.Path, text: str) -> bool:
    while text not in output(workdir, 0) and all(p.poll() is None for p in processes):
        time.sleep(0.1)
    return text in output(workdir, 0)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_process_is_named(lost, features, tmp_path):
    port, workdir = free_port(), tmp_path / "W"
    both = [start(features, workdir, i, 2, port, **{"train.epochs": 2000}) for i in range(2)]
    try:
        wait_for(both, workdir, "epoch 2/")
        both[1].send_signal(lost)
        status = both[0].wait(120)
    finally:
        both[1].kill()
        both[1].wait()
    assert status != 0
    assert "process 1 of 2" in output(workdir, 0)
    assert "continues from the last checkpoint" in output(workdir, 0)


@pytest.mark.slow
def test_a_process_that_refuses_takes_the_others_with_it(features, tmp_path):
    port, workdir = free_port(), tmp_path / "W"
    # What the settings alone show wrong is refused before a process joins; that they fit no machine, afterwards.
    keys = [{}, {"mesh.data": 3}]
    both = [start(features, workdir, i, 2, port, **keys[i]) for i in range(2)]
    assert both[1].wait(120) == 2
    assert both[0].wait(120) != 0
    assert "process 1 of 2" in output(workdir, 0)
    assert "has ended: mesh: data 3 takes 3 devices" in output(workdir, 0)


@pytest.mark.slow
def test_a_process_that_never_comes_is_waited_for_so_long(features, tmp_path):
    workdir = tmp_path / "W"
    process = start(features, workdir, 0, 2, free_port(), **{"processes.wait": 5})
    assert process.wait(120) != 0
    assert "did not all join within 5 s" in output(workdir, 0)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"AVJAX_COORDINATOR": "h:1", "AVJAX_PROCESSES": "2", "AVJAX_PROCESS": "0"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # in the batch script, not under srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
        ({"AVJAX_DETECT": "1"}, True),
    ],
)
def test_several_processes_are_told_by_the_environment(environment, expected):
    assert multihost.wanted(environment) == expected


def test_half_an_address_is_an_error():
    with pytest.raises(AvjaxError, match="AVJAX_COORDINATOR is set, AVJAX_PROCESSES, AVJAX_PROCESS is not; set all"):
        multihost.wanted({"AVJAX_COORDINATOR": "h:1"})


def test_one_process_agrees_with_itself():
    assert multihost.agree(True)
    assert not multihost.agree(False)
    with multihost.writer_first():
        pass
    assert not multihost.leave("done")

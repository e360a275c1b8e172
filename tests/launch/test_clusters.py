"""The launchers of clusters, run with replacements of the clusters' tools."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.launching import AWKWARD, DELETE, DESCRIBE, SLURM, SRUN, TPU, Box, ask, needs_launchers, wait_for

pytestmark = needs_launchers


@pytest.fixture
def box(tmp_path) -> Box:
    return Box(tmp_path)


# ---- Cloud TPU, by a stand-in of gcloud -----------------------------------------------------------------------------


def with_states(box, *states: str) -> None:
    """Makes gcloud report these states in turn; NONE: there is no such resource; DENIED: another error."""
    (box.folder / "states").write_text("\n".join(states))
    box.stand_in(
        "gcloud",
        f"""
import pathlib
if "describe" in sys.argv:
    left = pathlib.Path({str(box.folder / "states")!r})
    state, *rest = left.read_text().split()
    left.write_text("\\n".join(rest))
    if state in ("NONE", "DENIED"):
        sys.exit("ERROR: (gcloud) " + ("NOT_FOUND: Resource n" if state == "NONE" else "PERMISSION_DENIED"))
    print(state)
""",
    )


def create(box, *flags: str) -> subprocess.CompletedProcess:
    return box.run(TPU, "create", "--name=n", "--zone=z", "--type=v5litepod-16", "--poll=0.01", *flags)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], [DESCRIBE, ask(), *[DESCRIBE] * 3]),
        (["ACTIVE", "ACTIVE"], [DESCRIBE] * 2),
        (["PROVISIONING", "ACTIVE"], [DESCRIBE] * 2),
        (["SUSPENDED", "ACTIVE"], [DESCRIBE, DELETE, ask(), DESCRIBE]),
        (["FAILED", "ACTIVE"], [DESCRIBE, DELETE, ask(), DESCRIBE]),
        (["SUSPENDING", "SUSPENDED", "ACTIVE"], [DESCRIBE, DESCRIBE, DELETE, ask(), DESCRIBE]),
        (["DELETING", "NONE", "ACTIVE"], [DESCRIBE, DESCRIBE, ask(), DESCRIBE]),
    ],
)
def test_tpu_create_brings_it_to_active(box, states, expected):
    with_states(box, *states)
    done = create(box)
    assert done.returncode == 0, done.stderr
    assert box.calls() == expected
    assert "n is ACTIVE" in done.stderr


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_tpu_create_gives_up_where_it_cannot_be_had(box, state):
    with_states(box, "NONE", "WAITING_FOR_RESOURCES", state)
    done = create(box)
    assert done.returncode == 2
    assert f"n is {state} and was to become ACTIVE" in done.stderr
    assert DELETE not in box.calls()


def test_tpu_other_errors_are_not_taken_for_absence(box):
    with_states(box, "DENIED")
    done = create(box)
    assert done.returncode == 2
    assert "PERMISSION_DENIED" in done.stderr
    assert box.calls() == [DESCRIBE]


def test_tpu_resume_runs_what_it_prints(box):
    with_states(box, "SUSPENDED", "ACTIVE")
    line = ["resume", "--name=n", "--zone=z", "--type=v5litepod-16", "--wheel=w.whl"]
    printed = box.printed(TPU, *line, "--dry_run", "--", *AWKWARD[:-1])
    done = box.run(TPU, *line, "--", *AWKWARD[:-1])
    assert done.returncode == 0, done.stderr
    assert box.calls() == printed


def test_tpu_worker_runs_it_once(box):
    """Runs the line for a worker locally: in the background, with a log, and not a second time while it runs."""
    worker = box.folder / "worker"
    (worker / "avjax_venv" / "bin").mkdir(parents=True)
    (worker / "avjax_venv" / "bin" / "python").symlink_to(sys.executable)
    (box.path / "nohup").symlink_to(shutil.which("nohup"))
    (box.path / "mkdir").symlink_to(shutil.which("mkdir"))
    (box.folder / "program.py").write_text(
        "import os, sys, time; print(sys.argv[1:], os.environ['AVJAX_DETECT'], flush=True); time.sleep(60)"
    )
    line = ["run", "--name=n", "--zone=z", "--module=program", "--dry_run", "--", "a b", "it's"]
    ((*_, command),) = box.printed(TPU, *line)

    def on_worker() -> str:
        line = command.removeprefix("--command=")
        done = subprocess.run(["bash", "-c", line], cwd=worker, env=box.environment(), stdout=-1, text=True, check=True)
        return done.stdout

    assert on_worker() == ""
    pid = int((worker / "avjax_run" / "pid").read_text())
    try:
        wait_for(lambda: (worker / "avjax_run" / "log").read_text() == "['a b', \"it's\"] 1\n")
        assert on_worker() == "the run is going on\n"
    finally:
        os.kill(pid, signal.SIGKILL)


# ---- Slurm, by a stand-in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopping", [True, False])
def test_slurm_requeues_a_job_that_was_requested_to_stop(box, stopping):
    box.stand_in(
        "srun",
        """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("running", flush=True)
time.sleep(60 if "long" in sys.argv else 0)
sys.exit(5)
""",
    )
    box.stand_in("scontrol", "")
    arguments = ["bash", str(SLURM), "--", "long" if stopping else "short"]
    environment = box.environment(SLURM_JOB_ID="17")
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout.readline() == "running\n"
        if stopping:
            script.send_signal(signal.SIGTERM)
        assert script.wait(20) == (143 if stopping else 5)
    srun, *others = box.calls()
    assert srun[:3] == SRUN
    assert others == ([["scontrol", "requeue", "17"]] if stopping else [])


def test_slurm_asks_for_the_signal_and_for_requeueing():
    head = [line for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=B:TERM@120" in head
    assert "#SBATCH --requeue" in head


def test_slurm_runs_from_the_copy_that_sbatch_makes(box, tmp_path):
    """The script runs in another folder, under another name, without the other launchers."""
    box.stand_in("srun", "sys.exit(3)")
    spooled = tmp_path / "spool" / "slurm_script"
    spooled.parent.mkdir()
    shutil.copyfile(SLURM, spooled)
    done = box.run(spooled, "--", "a", SLURM_JOB_ID="17")
    assert (done.returncode, done.stderr) == (3, "")
    assert box.calls() == [[*SRUN, "python", "-m", "avjax.train", "a"]]
    dry = box.run(spooled, "--dry_run", "--", "a", SLURM_JOB_ID="17")
    assert dry.returncode == 2
    assert "expected a dry run by bash launch/slurm.sbatch --dry_run" in dry.stderr
    assert len(dry.stderr.splitlines()) == 1

"""`launch/local.sh` runs several processes as one: arguments, status, signals, failures, nothing left running."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import time

import pytest

from tests.launching import AWKWARD, LOCAL, Box, needs_launchers, wait_for

pytestmark = needs_launchers


@pytest.fixture
def box(tmp_path) -> Box:
    return Box(tmp_path)


PROGRAM = """
import json, os, pathlib, signal, subprocess, sys, time
me = os.environ["AVJAX_PROCESS"]
what, who = sys.argv[1:3] if len(sys.argv) > 2 else ("", "")
folder = pathlib.Path(__file__).parent
if what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if what == "parent":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / f"pid_child{me}").write_text(str(child.pid))
if what == "polite":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved on TERM"))
(folder / f"pid_{me}").write_text(str(os.getpid()))
names = ("AVJAX_COORDINATOR", "AVJAX_PROCESSES", "AVJAX_PROCESS", "XLA_FLAGS", "JAX_PLATFORMS")
print(json.dumps([sys.argv[1:], {n: os.environ.get(n) for n in names}]), flush=True)
if what in ("deaf", "parent", "polite") or (what == "fail" and who != me):
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("saved on INT")
        sys.exit(130)
sys.exit(int(me == who and 7))
"""


class Running:
    def __init__(self, box, *arguments: str):
        (box.folder / "program.py").write_text(PROGRAM)
        command = ["bash", str(LOCAL), "--module=program", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.script, self.box = subprocess.Popen(command, env=box.environment(), **pipes), box

    def pids(self) -> list[int]:
        return [int(p.read_text()) for p in self.box.folder.glob("pid_*") if p.read_text()]

    def started(self, count: int = 2) -> None:
        wait_for(lambda: len(self.pids()) >= count)
        time.sleep(0.1)

    def ended(self, seconds: float = 20) -> tuple[int, list[str], str]:
        """Returns status, lines and messages once the script and all that it started have ended."""
        out, err = self.script.communicate(timeout=seconds)
        wait_for(lambda: not any(alive(pid) for pid in self.pids()))
        return self.script.returncode, out.splitlines(), err


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


def test_local_runs_all_processes_of_a_run(box):
    status, lines, messages = Running(box, "--processes=3", "--devices_per_process=2", "--", *AWKWARD).ended()
    assert (status, messages) == (0, "")
    assert len({line[:3] for line in lines}) == 3
    for line in lines:
        arguments, variables = json.loads(line[4:])
        assert arguments == list(AWKWARD)
        assert (line[:4], variables["AVJAX_PROCESSES"]) == (f"[{variables['AVJAX_PROCESS']}] ", "3")
        assert variables["XLA_FLAGS"] == "--xla_force_host_platform_device_count=2"
        assert variables["JAX_PLATFORMS"] == "cpu"
    assert len({json.loads(line[4:])[1]["AVJAX_COORDINATOR"] for line in lines}) == 1


@needs_proc
@pytest.mark.parametrize(("who", "status"), [("0", 7), ("1", 143)])
def test_local_names_the_process_that_failed_and_ends_the_others(box, who, status):
    run = Running(box, "--processes=2", "--grace=1", "--", "fail", who)
    got, _, messages = run.ended()
    assert got == status
    assert f"process {who} ended with status 7; the others have 1 s to end" in messages
    assert f"ending process {1 - int(who)}" in messages


@needs_proc
def test_local_tells_of_a_failure_after_process_0_is_done(box):
    got, _, messages = Running(box, "--processes=2", "--", "", "1").ended()
    assert got == 7
    assert "process 1 ended with status 7" in messages


@needs_proc
def test_local_names_a_process_that_was_killed(box):
    run = Running(box, "--processes=2", "--grace=1", "--", "polite", "-")
    run.started()
    os.kill(int((box.folder / "pid_0").read_text()), signal.SIGKILL)
    status, lines, messages = run.ended()
    assert status == 137
    assert "process 0 ended with status 137" in messages
    assert "[1] saved on TERM" in lines


@needs_proc
@pytest.mark.parametrize(("sent", "status", "message"), [("INT", 130, "saved on INT"), ("TERM", 1, "saved on TERM")])
def test_local_forwards_signals_and_waits(box, sent, status, message):
    run = Running(box, "--processes=2", "--", "polite", "-")
    run.started()
    run.script.send_signal(getattr(signal, f"SIG{sent}"))
    got, lines, messages = run.ended()
    assert got == status
    assert {f"[0] {message}", f"[1] {message}"} <= set(lines)
    assert f"forwarding SIG{sent} to all processes" in messages


@needs_proc
def test_local_kills_what_does_not_listen(box):
    run = Running(box, "--processes=2", "--grace=1", "--", "deaf", "-")
    run.started()
    os.kill(int((box.folder / "pid_1").read_text()), signal.SIGKILL)
    assert run.ended()[0] == 137


@needs_proc
def test_local_leaves_no_children_of_a_process_behind(box):
    run = Running(box, "--processes=1", "--", "parent", "-")
    run.started(2)
    os.kill(int((box.folder / "pid_0").read_text()), signal.SIGKILL)
    assert run.ended()[0] == 137


@needs_proc
def test_local_leaves_nothing_behind_where_it_is_killed(box):
    run = Running(box, "--processes=2", "--grace=1", "--", "deaf", "-")
    run.started()
    run.script.kill()
    assert run.ended()[0] == -9

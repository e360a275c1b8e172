"""Paths of the launchers, and a sandbox to run them in from which no cluster can be reached."""

import json
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / "launch"
LOCAL, SLURM, TPU, XPK = (LAUNCH / name for name in ("local.sh", "slurm.sbatch", "tpu_vm.sh", "xpk.sh"))
PLAIN_TOOLS = ("bash", "env", "cat", "dirname", "basename", "sed", "mktemp", "rm", "seq", "sleep", "tail")
CLUSTER_TOOLS = ("gcloud", "kubectl", "xpk", "srun", "scontrol", "sbatch")
AWKWARD = ("--config.data.root=/a b/c", "it's", '"two"', "$HOME", "a;b", "*", "", "--", "line\nbreak")
RECORDER = """#!{python}
import json, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
{then}
"""


QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
LOCATION = ["n", "--zone=z"]
DESCRIBE = [*QUEUED, "describe", *LOCATION, "--format=value(state.state)"]
DELETE = [*QUEUED, "delete", *LOCATION, "--force", "--quiet"]
ALL = ["--node=all", "--worker=all"]
SRUN = ["srun", "--kill-on-bad-exit=1", "--label"]
needs_launchers = pytest.mark.skipif(not LAUNCH.is_dir(), reason="launchers are in a checkout")


class Box:
    """A PATH with basic tools only, and replacements of the clusters' tools that record their calls and fail."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.calls_file = folder, folder / "calls.jsonl"
        self.path = folder / "bin"
        self.path.mkdir()
        for name in PLAIN_TOOLS:
            (self.path / name).symlink_to(shutil.which(name))
        (self.path / "python").symlink_to(sys.executable)
        for name in CLUSTER_TOOLS:
            self.stand_in(name, "sys.exit(1)")

    def stand_in(self, name: str, then: str) -> None:
        """Makes a program of that name that records its calls and runs the Python code `then`."""
        text = RECORDER.format(python=sys.executable, calls=str(self.calls_file), name=name, then=then)
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        """Returns the environment variables, and `more`."""
        return {"PATH": str(self.path), "HOME": str(self.folder), "PYTHONPATH": str(self.folder), **more}

    def run(self, script, *arguments: str, **more: str) -> subprocess.CompletedProcess:
        """Runs a launcher."""
        command = ["bash", str(script), *arguments]
        return subprocess.run(command, env=self.environment(**more), capture_output=True, text=True, timeout=60)

    def calls(self) -> list[list[str]]:
        """Returns the recorded calls."""
        return (
            [json.loads(line) for line in self.calls_file.read_text().splitlines()] if self.calls_file.exists() else []
        )

    def printed(self, script, *arguments: str, **more: str) -> list[list[str]]:
        """Returns the words of each command that a dry run prints."""
        done = self.run(script, *arguments, **more)
        assert (done.returncode, done.stderr) == (0, "")
        assert self.calls() == []
        return [shlex.split(line, comments=True) for line in done.stdout.splitlines()]


def shell_words(line: str) -> list[str]:
    """Splits a line into words as a shell does."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def wait_for(condition, seconds: float = 10) -> None:
    """Waits until `condition` is true."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)


def ask(*more: str, type: str = "v5litepod-16", version: str = "v2-alpha-tpuv5-lite") -> list[str]:
    """Returns the gcloud command by which `tpu_vm.sh` requests a TPU."""
    nodes = [] if any("node" in m for m in more) else ["--node-id=n"]
    ours = [m for m in more if "node" in m]
    after = [m for m in more if "node" not in m]
    return [
        *QUEUED,
        "create",
        *LOCATION,
        *nodes,
        *ours,
        f"--accelerator-type={type}",
        f"--runtime-version={version}",
        *after,
    ]

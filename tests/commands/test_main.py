"""The command `avjax` lists its commands and runs each as `python -m avjax.<command>` does."""

import pathlib
import subprocess
import sys

import pytest

from avjax import __main__ as entry

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def call(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "avjax", *args], cwd=REPOSITORY, capture_output=True, text=True)


def test_every_command_is_listed():
    mains = {p.stem for p in (REPOSITORY / "avjax").glob("*.py") if 'if __name__ == "__main__"' in p.read_text()}
    assert set(entry.COMMANDS) == mains - {"__main__"}
    listed = call().stdout
    assert all(f"  {command} " in listed for command in entry.COMMANDS)


@pytest.mark.parametrize(
    ("args", "code", "out", "err"),
    [
        (("train", "--help"), 0, "--workdir", ""),
        (("trian",), 2, "", "error: command is 'trian'; choose one of train, extract"),
        (("train", "--config=configs/extract_folder.py"), 2, "", "avjax.train takes one such as configs/etg_folder.py"),
    ],
)
def test_a_command_runs_by_its_name(args, code, out, err):
    done = call(*args)
    assert (done.returncode, out in done.stdout, err in done.stderr) == (code, True, True)

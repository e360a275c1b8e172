"""Helpers of the benchmark tests: the command as a process, and the committed results."""

import csv
import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import pytest

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
_FOLDER = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"


def bench(*arguments: str) -> subprocess.CompletedProcess:
    """Runs `python -m benchmarks`."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200"}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiles in half the time; results are not used
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], env=env, capture_output=True, text=True)


def assert_one_line(done: subprocess.CompletedProcess, message: str) -> None:
    """Asserts that a command ended with a user error, in one line that contains `message`."""
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def committed(name: str, key: Sequence[str]) -> list[dict[str, str]]:
    """Returns the rows of a benchmark's CSV, no two of the same `key`; skips the test if there is no CSV."""
    path = _FOLDER / f"{name}.csv"
    if not path.is_file():
        pytest.skip("results are in a checkout")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len({tuple(row[column] for column in key) for row in rows}) == len(rows)
    return rows

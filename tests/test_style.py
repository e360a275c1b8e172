"""The tree is formatted and free of lint, and its shell scripts pass shellcheck."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("style is checked in a checkout", allow_module_level=True)


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_lint():
    assert run("ruff", "check", "--no-cache", ".") == ""


def test_format():
    assert run("ruff", "format", "--no-cache", "--check", ".") == ""


def test_shell_scripts():
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    scripts = [".ci/run", *ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")]
    assert len(scripts) > 4
    done = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_file_is_over_500_lines():
    long = {p: n for p in ROOT.glob("avjax/**/*.py") if (n := len(p.read_text().splitlines())) > 500}
    assert not long

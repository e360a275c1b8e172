"""The tree is formatted and free of lint, and its shell scripts pass shellcheck."""

import ast
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


def test_imports_run_one_way():
    """Models know arrays, never files; encoders know weights, never data sets; data sets know disks, never models."""
    never = {
        "models": ("datasets", "media", "text", "encoders", "pipeline", "loop"),
        "encoders": ("datasets", "models", "media", "features"),
        "datasets": ("models", "encoders", "media", "features", "pipeline"),
        "media": ("datasets", "models", "text", "features"),
        "text": ("datasets", "models", "media", "encoders", "features"),
        "report": ("models", "loop", "datasets", "features"),
        "demo": ("models", "encoders", "datasets", "loop", "pipeline"),
        "benches": ("demo", "text"),
    }
    broken = []
    for room, others in never.items():
        others = (*others, *({"demo", "benches"} - {room}))
        for path in (ROOT / "avjax" / room).glob("*.py"):
            broken += [f"{path.name} → {name}" for name in imported(path) if name.split(".")[1] in others]
    assert not broken


def imported(path: pathlib.Path) -> set[str]:
    """Dotted names of avjax that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return {n for n in names if n.startswith("avjax.")}

"""The type checker finds nothing in avjax (its settings are in pyproject.toml)."""

import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]


def check(folder: pathlib.Path) -> subprocess.CompletedProcess:
    return subprocess.run(["pyrefly", "check", "--output-format=min-text"], cwd=folder, capture_output=True, text=True)


def test_there_is_no_error():
    done = check(ROOT)
    assert done.returncode == 0, done.stdout


def test_an_error_would_be_found(tmp_path):
    (tmp_path / "avjax").mkdir()
    (tmp_path / "avjax/broken.py").write_text("def half(x: int) -> int:\n    return y // 2\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    done = check(tmp_path)
    assert done.returncode != 0
    assert "broken.py:2" in done.stdout


def test_the_package_says_that_it_has_types():
    assert (ROOT / "avjax/py.typed").is_file()

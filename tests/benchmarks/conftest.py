"""A machine without PyTorch."""

import importlib.util
import pathlib

import pytest


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))


# Benchmarks are no part of the package: their tests are thorough, but for those of tables and command lines.
_QUICK = ("test_extract.py", "test_scaling.py", "test_startup.py")


@pytest.hookimpl(tryfirst=True)  # before markers choose
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        ours = item.path.parent == pathlib.Path(__file__).parent and item.path.name not in _QUICK
        if ours and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.thorough)

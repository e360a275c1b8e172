"""The tiers of the benchmarks' tests, and a machine without PyTorch."""

import importlib.util
import pathlib

import pytest


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides PyTorch."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))


# Benchmarks are not part of the package: their tests are thorough, except those of tables and command lines.
_QUICK = ("test_extract.py", "test_scaling.py", "test_startup.py")


@pytest.hookimpl(tryfirst=True)  # before tests are selected by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder as thorough, except those that are slow or in a quick file."""
    for item in items:
        ours = item.path.parent == pathlib.Path(__file__).parent and item.path.name not in _QUICK
        if ours and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.thorough)

"""Folders that are made once for all tests of a session, also with several processes."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import filelock
import pytest


@contextlib.contextmanager
def folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[pathlib.Path]:
    """Yields the folder, which may exist already; the other processes of the session wait meanwhile."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with filelock.FileLock(base / f"{name}.lock"):
        yield base / name

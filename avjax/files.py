"""Files that are written whole: a reader, or a run that goes on after a kill, sees the old file or the new one."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from avjax.errors import AvjaxError


@contextlib.contextmanager
def replacing(path: Path, mode: str) -> Iterator[IO]:
    """Opens a file beside `path`, "w" (UTF-8) or "wb", and moves it there when all was written.

    The file beside it is named `.<name>.<process>.part`, so that two writers do not share one.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with part.open(mode, **text) as file:
            yield file
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)


@contextlib.contextmanager
def only_writer(folder: Path, otherwise: str) -> Iterator[None]:
    """Holds `folder` for one process, and clears away what killed ones left beside the files in and below it.

    Args:
      otherwise: what a user can do where that fails, for the error.
    Raises:
      AvjaxError: another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise AvjaxError(f"{folder}: cannot be written ({error.strerror}); {otherwise}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AvjaxError(f"{folder}: another process is writing here; wait for it, or {otherwise}") from error
        _sweep(folder)
        try:
            yield
        finally:
            # Workers that were killed at their time limit leave parts, too.
            _sweep(folder)


def _sweep(folder: Path) -> None:
    for part in folder.glob("**/.*.part"):
        # An orphan of a killed run may still be moving its last one into place.
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole."""
    with replacing(path, "w") as file:
        file.write(text)

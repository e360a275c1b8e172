"""Files that are written whole: a reader, or a run that goes on after a kill, sees the old file or the new one."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


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
def only_writer(folder: Path) -> Iterator[None]:
    """Holds `folder` for one process, and clears away what killed ones left beside the files in and below it.

    Raises:
      BlockingIOError: another process holds it.
      OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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

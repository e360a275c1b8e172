"""Files that are written whole: a reader, or a run that goes on after a kill, sees the old file or the new one."""

import contextlib
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


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole."""
    with replacing(path, "w") as file:
        file.write(text)

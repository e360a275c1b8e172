"""Reads and writes files on this machine and on cloud storage: whole or not at all, and by one process at a time."""

import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import filelock
from etils import epath

from avjax.errors import AvjaxError

_CLOUD = re.compile(r"(gs|s3|az)://")


def place(text: str) -> Path:
    """The path that `text` names: on this machine, or on cloud storage (`gs://`, `s3://`, `az://`).

    Raises:
      AvjaxError: the package that reaches that storage is missing.
    """
    found = _CLOUD.match(text)
    if not found:
        return Path(text).expanduser()
    package = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}[found[1]]
    try:
        (out := epath.Path(text)).exists()
    except ImportError as error:
        raise AvjaxError(f"{text}: needs the package {package} (pip install {package})") from error
    return out


def is_local(path: Path) -> bool:
    """Whether a path is on this machine."""
    return isinstance(path, Path)


def copy_folder(source: Path, target: Path) -> None:
    """Copies the files of a folder, without those of folders in it, from or to any place."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file():
            epath.Path(path).copy(target / path.name, overwrite=True)


@contextlib.contextmanager
def filled(folder: Path, last: str) -> Iterator[Path]:
    """A folder on this machine for work on the files of `folder`: itself, or of one on cloud storage a copy.

    Args:
      last: name of the file that is copied back after all others, as it says that all are there.
    """
    if is_local(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="avjax-") as name:
        here = Path(name)
        copy_folder(folder, here)
        yield here
        for path in sorted((p for p in here.rglob("*") if p.is_file()), key=lambda p: p.name == last):
            target = folder / str(path.relative_to(here))
            target.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(path).copy(target, overwrite=True)


@contextlib.contextmanager
def replacing(path: Path, mode: str) -> Iterator[IO]:
    """Opens a file beside `path`, "w" (UTF-8) or "wb", and moves it there when all was written.

    The file beside it is named `.<name>.<process>.part`, so that two writers do not share one.
    """
    if not is_local(path):
        # Held until it is whole: a stream that is closed by an error would leave a part of it there.
        with io.BytesIO() if "b" in mode else io.StringIO(newline="") as held:
            yield held
            content = held.getvalue()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if "b" in mode else content.encode())
        return
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

    On cloud storage nothing is held: there are no locks there, and whoever writes second wins.

    Args:
      otherwise: what a user can do where that fails, for the error.

    Raises:
      AvjaxError: another process holds it, or it cannot be written.
    """
    if not is_local(folder):
        yield
        return
    lock = filelock.FileLock(folder / ".lock", timeout=0)  # of the system: it goes with a killed process
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise AvjaxError(f"{folder}: another process is writing here; wait for it, or {otherwise}") from error
    except OSError as error:
        raise AvjaxError(f"{folder}: cannot be written ({error.strerror}); {otherwise}") from error
    try:
        _sweep(folder)
        yield
    finally:
        _sweep(folder)  # workers that were killed at their time limit leave parts, too
        lock.release()


def _sweep(folder: Path) -> None:
    for part in folder.glob("**/.*.part"):
        # An orphan of a killed run may still be moving its last one into place.
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole."""
    with replacing(path, "w") as file:
        file.write(text)


def read_json(path: Path, remedy: str = "restore a copy, or make it anew") -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
      AvjaxError: it is missing or holds anything else; the message ends with the `remedy`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AvjaxError(f"{path}: cannot be read as JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise AvjaxError(f"{path}: holds a {type(content).__name__}, not an object; {remedy}")
    return content


def sha256(path: Path) -> str:
    """Returns the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

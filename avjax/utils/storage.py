"""Reads and writes files on this machine and on cloud storage, atomically and by one process at a time."""

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


def as_path(text: str) -> Path:
    """Returns the path that `text` names, on this machine or on cloud storage (`gs://`, `s3://`, `az://`).

    Raises:
      AvjaxError: the package for that storage is missing.
    """
    match = _CLOUD.match(text)
    if not match:
        return Path(text).expanduser()
    package = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}[match[1]]
    try:
        (out := epath.Path(text)).exists()
    except ImportError as error:
        raise AvjaxError(f"{text}: needs the package {package} (pip install {package})") from error
    return out


def is_local(path: Path) -> bool:
    """Returns whether a path is on this machine."""
    return isinstance(path, Path)


def copy_folder(source: Path, target: Path) -> None:
    """Copies the files of a folder, without its subfolders, from and to this machine or cloud storage."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file():
            epath.Path(path).copy(target / path.name, overwrite=True)


@contextlib.contextmanager
def filled(folder: Path, last: str) -> Iterator[Path]:
    """Yields a folder on this machine with the files of `folder`: itself, or a copy that is copied back at the end.

    Args:
      folder: on this machine or on cloud storage.
      last: name of the file that is copied back last, as it marks the others as complete.
    """
    if is_local(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="avjax-") as name:
        local = Path(name)
        copy_folder(folder, local)
        yield local
        for path in sorted((p for p in local.rglob("*") if p.is_file()), key=lambda p: p.name == last):
            target = folder / str(path.relative_to(local))
            target.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(path).copy(target, overwrite=True)


@contextlib.contextmanager
def replacing(path: Path, mode: str) -> Iterator[IO]:
    """Opens a temporary file beside `path`, "w" (UTF-8) or "wb", and moves it to `path` once all is written.

    The temporary file is named `.<name>.<process>.part`, so that two writers do not share one.
    """
    if not is_local(path):
        # Held in memory until complete: a stream closed by an error would leave a partial file.
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
    """Locks `folder` for this process, and deletes temporary files that killed processes left in and below it.

    Cloud storage has no locks; there the last writer wins.

    Args:
      folder: made if it does not exist.
      otherwise: what the user can do if that fails, for the error message.

    Raises:
      AvjaxError: another process holds the lock, or the folder cannot be written.
    """
    if not is_local(folder):
        yield
        return
    lock = filelock.FileLock(folder / ".lock", timeout=0)  # of the operating system: it ends with a killed process
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise AvjaxError(f"{folder}: another process is writing to it; wait for it, or {otherwise}") from error
    except OSError as error:
        raise AvjaxError(f"{folder}: cannot be written ({error.strerror}); {otherwise}") from error
    try:
        _sweep(folder)
        yield
    finally:
        _sweep(folder)  # workers that were killed at their time limit leave temporary files, too
        lock.release()


def _sweep(folder: Path) -> None:
    for part in folder.glob("**/.*.part"):
        # A worker of a killed run may still be moving its last file.
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path, "w") as file:
        file.write(text)


def read_json(path: Path, remedy: str = "restore a copy, or make it anew") -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
      AvjaxError: the file is missing or holds anything else; the message ends with `remedy`.
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

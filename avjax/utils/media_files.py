"""Media files of clips: finds them, checks that they can be opened, and formats their names."""

import errno
import os
import stat
import unicodedata
from pathlib import Path

_WHY = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.ENAMETOOLONG: "no such file: the name is too long",
    errno.ELOOP: "a symbolic link that leads in a circle",
    errno.EACCES: "no permission to read it",
}
# What git leaves instead of a large file that was not fetched.
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1000


def trouble(path: str | os.PathLike) -> str:
    """Returns why `path` cannot be read as a file, in plain words; "" if it can.

    Opens only regular files, as a pipe would block, and only small ones, which may be Git LFS pointers.
    """
    try:
        status = os.stat(path)
        pointer = stat.S_ISREG(status.st_mode) and status.st_size < _POINTER_BYTES and _is_pointer(path)
    except OSError as error:
        return reason_of(error)
    except ValueError:  # a null byte
        return "no such file: the name has a null byte"
    if stat.S_ISDIR(status.st_mode):
        return "a folder, not a file"
    if not stat.S_ISREG(status.st_mode):
        return "not a file but a pipe, a socket or a device"
    if not os.access(path, os.R_OK):
        return _WHY[errno.EACCES]
    if pointer:
        return "a Git LFS pointer, not the file: fetch it with git lfs pull"
    return "" if status.st_size else "an empty file"


def reason_of(error: OSError) -> str:
    """Returns in plain words why a file cannot be read."""
    return _WHY.get(error.errno, f"cannot be read: {error.strerror}")


def _is_pointer(path: str | os.PathLike) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def files(folder: Path, *suffixes: str) -> list[Path]:
    """Returns all files below `folder` with one of `suffixes`, such as ".mp4" (which matches ".MP4"), sorted by path.

    Leaves out hidden files, such as `._film.mp4`, which macOS writes beside `film.mp4`, and files in hidden folders.
    """
    paths = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted(paths)


def shown(name: str) -> str:
    r"""Returns a file name that can be printed and stored: bytes that are not UTF-8, and control characters, as `\xe9`.

    Python represents such bytes as lone surrogates, which neither a terminal nor a UTF-8 file accepts.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode() for c in text)

"""The files behind clips: where they lie, whether one can be opened at all, and how its name is shown."""

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
# What git leaves in the place of a large file that was not fetched.
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1000


def trouble(path: str | os.PathLike) -> str:
    """Why `path` cannot be read as a file, in plain words; "" if it can.

    Opens only regular files, as a pipe would hang it, and of those only small ones, which may be pointers of Git LFS.
    """
    try:
        about = os.stat(path)
        pointer = stat.S_ISREG(about.st_mode) and about.st_size < _POINTER_BYTES and _is_pointer(path)
    except OSError as error:
        return reason_of(error)
    except ValueError:  # a null byte
        return "no such file: the name has a null byte"
    if stat.S_ISDIR(about.st_mode):
        return "a folder, not a file"
    if not stat.S_ISREG(about.st_mode):
        return "not a file but a pipe, a socket or a device"
    if not os.access(path, os.R_OK):
        return _WHY[errno.EACCES]
    if pointer:
        return "a Git LFS pointer, not the file: fetch it with git lfs pull"
    return "" if about.st_size else "an empty file"


def reason_of(error: OSError) -> str:
    """Says in plain words why a file cannot be read."""
    return _WHY.get(error.errno, f"cannot be read: {error.strerror}")


def _is_pointer(path: str | os.PathLike) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def files(folder: Path, *suffixes: str) -> list[Path]:
    """All files below `folder` with one of `suffixes`, such as ".mp4" (or ".MP4" on the disk), in the order of paths.

    Hidden ones are left out, such as `._film.mp4`, which macOS writes beside `film.mp4`, and what is in hidden folders.
    """
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted(found)


def shown(name: str) -> str:
    r"""A file's name as it can be printed and stored: bytes that are not UTF-8, and control characters, as `\xe9`.

    Python hands such bytes over as lone surrogates, which neither a terminal nor a UTF-8 file takes.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode() for c in text)

"""The file behind a clip: whether it can be opened at all, and how its name is shown."""

import errno
import os
import stat
import unicodedata

_WHY = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.ENAMETOOLONG: "no such file: the name is too long",
    errno.ELOOP: "a symbolic link that leads in a circle",
    errno.EACCES: "no permission to read it",
}


def trouble(path: str | os.PathLike) -> str:
    """Why `path` cannot be read as a file, in plain words; "" if it can. Opens nothing, as a pipe would hang it."""
    try:
        about = os.stat(path)
    except OSError as error:
        return _WHY.get(error.errno, f"cannot be read: {error.strerror}")
    except ValueError:  # a null byte
        return "no such file: the name has a null byte"
    if stat.S_ISDIR(about.st_mode):
        return "a folder, not a file"
    if not stat.S_ISREG(about.st_mode):
        return "not a file but a pipe, a socket or a device"
    if not os.access(path, os.R_OK):
        return _WHY[errno.EACCES]
    return "" if about.st_size else "an empty file"


def shown(name: str) -> str:
    r"""A file's name as it can be printed and stored: bytes that are not UTF-8, and control characters, as `\xe9`.

    Python hands such bytes over as lone surrogates, which neither a terminal nor a UTF-8 file takes.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode() for c in text)

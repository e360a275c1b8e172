"""Reads files of tables or arrays as columns or arrays by name: CSV, .npy, .npz, HDF5 and pickles."""

import glob
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from avjax.errors import AvjaxError
from avjax.utils import safe_pickle, tables

_CSV = (".csv", ".tsv", ".txt")


def load(path: Path, header: bool = True) -> object:
    """Reads a file according to its suffix.

    Args:
      path: the file, or a folder of .npy.
      header: whether the first line of a CSV file names the columns.

    Returns:
      for CSV column → texts; for .npz, .h5 and pickles their content; for an .npy, or a folder with one .npy per frame,
      "value" → (steps, d).

    Raises:
      AvjaxError: its suffix is none of these, or it cannot be read.
    """
    if path.is_dir() or path.suffix == ".npy":
        return {"value": np.atleast_2d(frames(path))}
    if path.suffix in _CSV:
        return tables.read_columns(path, header)
    if path.suffix not in _READERS:
        raise AvjaxError(f"{path}: expected {', '.join([*_CSV, *_READERS, '.npy'])}")
    return _READERS[path.suffix](path)


def each(root: Path, path: str) -> dict[str, Path]:
    """Returns the files or folders below `root` that match `path`, by their text for `{key}`.

    Raises:
      AvjaxError: `path` leads out of the root, or has more than one `{key}`.
    """
    before, _, after = path.partition("{key}")
    if "{key}" in after or Path(path).is_absolute() or ".." in Path(path).parts:
        raise AvjaxError(f"path is {path!r}; expected one {{key}}, below the data root")
    name = re.compile(re.escape(before) + r"([^/.][^/]*)" + re.escape(after))
    paths = sorted(root.glob(glob.escape(before) + "*" + glob.escape(after)))
    matches = {p: name.fullmatch(p.relative_to(root).as_posix()) for p in paths}
    return {match[1]: p for p, match in matches.items() if match}


def files_of(path: Path) -> list[Path]:
    """Returns the files of `path`: itself, or the arrays of a folder in the order of their names."""
    return sorted(path.glob("*.npy")) if path.is_dir() else [path]


def inside(root: Path, path: Path) -> bool:
    """Returns whether all files of `path`, with links resolved, are below `root`."""
    folder = Path(os.path.realpath(root))
    return all(Path(os.path.realpath(p)).is_relative_to(folder) for p in (path, *files_of(path)))


def frames(path: Path) -> np.ndarray:
    """Reads the array of an .npy, or those of a folder's .npy, concatenated in the order of their names.

    Raises:
      AvjaxError: there is none, it has no numbers, or the frames are not (d,) or (1, d) with one d.
    """
    arrays = [_npy(file) for file in files_of(path)]
    if not path.is_dir():
        return arrays[0]
    rows = [np.atleast_2d(a) for a in arrays]
    if len({a.shape for a in rows}) != 1 or rows[0].shape[0] != 1 or rows[0].ndim != 2:
        shapes = ", ".join(sorted({str(a.shape) for a in arrays})) or "no .npy"
        raise AvjaxError(f"{path}: {shapes}; expected one vector for each frame, all as long")
    return np.concatenate(rows)


def _npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise AvjaxError(f"{path}: {error}; expected an .npy of numbers") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.ndim not in (1, 2):
        raise AvjaxError(f"{path}: {getattr(array, 'shape', 'an archive')}; expected numbers, (d,) or (steps, d)")
    return array


def entry(location: Path, value: object, path: str) -> Mapping[str, object]:
    """Returns the entry b of the entry a of `value`, the content of the file `location`, for "a/b".

    Raises:
      AvjaxError: there is no such entry, or it holds no arrays by name.
    """
    for name in filter(None, path.split("/")):
        if not isinstance(value, Mapping) or name not in value:
            raise AvjaxError(f"{location}: no entry {name!r} in it")
        value = value[name]
    if not isinstance(value, Mapping):
        raise AvjaxError(f"{location}: holds {type(value).__name__}; expected arrays by name")
    return value


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise AvjaxError(f"{path}: {error}; expected an .npz of numbers and text") from error


def _read_h5(path: Path) -> dict[str, object]:
    import h5py

    def plain(group: Any) -> dict[str, object]:
        return {name: plain(item) if isinstance(item, h5py.Group) else item[()] for name, item in group.items()}

    try:
        with h5py.File(path) as file:
            return plain(file)
    except (OSError, KeyError) as error:
        raise AvjaxError(f"{path}: {error}; expected an HDF5 file") from error


_READERS = {".npz": _read_npz, ".h5": _read_h5, ".pkl": safe_pickle.load}

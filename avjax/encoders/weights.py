"""Fetching of pretrained files, and conversion of their tensors to params.

Sources are tried in order: a local folder, the cache, then those of the entry (`registry`). Nothing is unpickled:
tensors are read only through `formats`.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from avjax.encoders.registry import REGISTRY
from avjax.encoders.sources import Entry, File, Source, Unavailable
from avjax.errors import AvjaxError
from avjax.utils import paths
from avjax.utils.storage import read_json, sha256, write_text

_SUMS = "sha256.json"


def fetch(name: str, weights_dir: str | os.PathLike | None = None) -> Path:
    """Makes the files of a registry entry available and returns their path.

    Args:
      name: a key of REGISTRY.
      weights_dir: a folder that holds `<name>/<file>`; default `$AVJAX_WEIGHTS`. It precedes all other sources.

    Returns:
      The file of an entry that has only one, else the folder (hub layout: config.json, model.safetensors, …). Every
      file has the registered sha256. Files enter the cache atomically, even if several processes fetch them.

    Raises:
      AvjaxError: the name is unknown; a local or cached file is missing or has a wrong checksum; or no source has the
        files: the message gives the reason of each source and what to do.
    """
    entry = _entry(name)
    folder, reason = _folder(name, weights_dir)
    if reason:
        _fill(entry, folder, [f"local folder: {reason}"])
    _check_all(entry, folder)
    return folder / next(iter(entry.files)) if len(entry.files) == 1 else folder


def is_there(name: str) -> bool:
    """Returns whether all files of a registry entry are available locally; fetches nothing.

    Raises:
      AvjaxError: a file has a wrong checksum, or the user's own folder is incomplete.
    """
    entry = _entry(name)
    folder, reason = _folder(name)
    if reason and not all((folder / file).exists() for file in entry.files):
        return False
    _check_all(entry, folder)
    return True


def _entry(name: str) -> Entry:
    if name not in REGISTRY:
        raise AvjaxError(f"{name!r}: no such pretrained weights; registered are: {', '.join(sorted(REGISTRY))}")
    return REGISTRY[name]


def _folder(name: str, weights_dir: str | os.PathLike | None = None) -> tuple[Path, str]:
    """Returns the folder of an entry: the user's own, or that in the cache and the reason why it is used instead."""
    local = weights_dir or os.environ.get("AVJAX_WEIGHTS")
    folder = Path(local).expanduser() / name if local else None
    if folder is not None and folder.is_dir():
        return folder, ""
    reason = f"{folder} is not there" if folder else "none given (weights_dir, AVJAX_WEIGHTS)"
    return paths.cache() / "weights" / name, reason


def convert(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any], name_of: Callable[[str], str], ignored: re.Pattern
) -> dict[str, Any]:
    """Converts PyTorch tensors to the layout of Flax params; every tensor must be used or ignored.

    Args:
      tensors: PyTorch name → array.
      shapes: the params as nested dicts of anything with a `shape`, such as the result of `jax.eval_shape` of an init.
      name_of: maps the path of a Flax module, joined by "/", to the name of its PyTorch module; for params other than
        kernel, scale, embedding and bias (a class token, a layer scale), the path of the param to its full name.
      ignored: matches the names of tensors that may be left over (pretraining heads).

    Returns:
      Nested dicts like `shapes`, float32. Kernels are transposed from (out, in) and split into heads.

    Raises:
      AvjaxError: tensors are missing, left over, or of a wrong shape; the message names them.
    """
    import flax

    expected = flax.traverse_util.flatten_dict(shapes)
    source = {path: _source(path, name_of) for path in expected}
    missing = sorted(set(source.values()) - set(tensors))
    left_over = sorted(n for n in set(tensors) - set(source.values()) if not ignored.search(n))
    if missing or left_over:
        raise AvjaxError(
            "the tensors do not fit the architecture of the configuration; "
            f"missing: {', '.join(missing) or 'none'}; left over: {', '.join(left_over) or 'none'}"
        )
    fitted = {p: _fitted(tensors[source[p]], p[-1], param.shape, source[p]) for p, param in expected.items()}
    return flax.traverse_util.unflatten_dict(fitted)


_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def _source(path: tuple[str, ...], name_of: Callable[[str], str]) -> str:
    """Returns the name of the tensor of the param at `path`."""
    if path[-1] not in _LEAVES:
        return name_of("/".join(path))
    return f"{name_of('/'.join(path[:-1]))}.{_LEAVES[path[-1]]}"


def _fitted(tensor: np.ndarray, leaf: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    # PyTorch stores kernels as (out, in, *window), Flax as (*window, in, out).
    transposed = np.moveaxis(tensor, (0, 1), (-1, -2)) if leaf == "kernel" else tensor
    # Heads split axes and never merge them: every partial product of the sizes must be kept.
    if transposed.size != np.prod(shape) or not set(np.cumprod(transposed.shape)) <= set(np.cumprod(shape)):
        raise AvjaxError(
            f"{name}: shape {tensor.shape} does not fit the param of shape {tuple(shape)}; wrong config.json?"
        )
    return transposed.reshape(shape).astype(np.float32)


def _fill(entry: Entry, folder: Path, reasons: list[str]) -> None:
    """Fetches the missing files of the entry into the cache `folder`; `reasons` are those of earlier sources."""
    missing = {file: expected for file, expected in entry.files.items() if not (folder / file).exists()}
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for source in entry.sources:
        try:
            return _collect(source, missing, folder)
        except Unavailable as error:
            reasons.append(f"{source}: {error}")
    remedies = [f"put {', '.join(missing)} into {folder}", *(s.remedy(missing, folder) for s in entry.sources)]
    raise AvjaxError(
        f"no source gives {', '.join(missing)} ({entry.what}):\n  "
        + "\n  ".join(reasons)
        + "\nDo one of these and try again:\n  "
        + "\n  ".join(remedies)
    )


def _collect(source: Source, files: Mapping[str, File], folder: Path) -> None:
    # On the file system of the destination, so that os.replace is atomic.
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=folder) as incoming:
        source.collect(files, Path(incoming))
        sums = {file: sha256(Path(incoming) / file) for file in files}
        for file, expected in files.items():
            if expected.sha256 and sums[file] != expected.sha256:
                raise Unavailable(f"{file} has sha256 {sums[file]}, expected {expected.sha256}")
        if unpinned := {file: sums[file] for file, expected in files.items() if not expected.sha256}:
            write_text(folder / _SUMS, json.dumps(_kept_sums(folder) | unpinned, indent=1))
        for file in files:
            os.replace(Path(incoming) / file, folder / file)


def _kept_sums(folder: Path) -> dict[str, str]:
    """Returns file → sha256, recorded on arrival, of the files that are not pinned."""
    path = folder / _SUMS
    return read_json(path) if path.is_file() else {}


def _check_all(entry: Entry, folder: Path) -> None:
    kept = _kept_sums(folder)
    for file, expected in entry.files.items():
        _check(folder / file, expected.sha256 or kept.get(file, ""))


def _check(path: Path, expected: str) -> None:
    """Checks a file against its sha256; `expected` is "" for a file in the user's own folder that is not pinned."""
    if not path.is_file():
        raise AvjaxError(f"{path}: no such file, but the folder was found; add the file, or move the folder away")
    if expected and (got := sha256(path)) != expected:
        raise AvjaxError(f"{path}: sha256 is {got}, expected {expected}; delete the file to fetch it anew")

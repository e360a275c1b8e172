"""The one way in which pretrained files enter, and how their tensors become params.

Sources are tried in order: a local folder, the cache, then those of the entry (`registry`). Nothing is unpickled:
tensors are read through `formats` alone.
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
    """Makes the files of a registry entry available and returns where they are.

    Args:
      name: a key of REGISTRY.
      weights_dir: a folder that holds `<name>/<file>`; default `$AVJAX_WEIGHTS`. It comes before every other source.
    Returns:
      The file of an entry that has only one, else the folder (hub layout: config.json, model.safetensors, …). Every
      file has the registered sha256. Files enter the cache whole or not at all, whoever else is fetching them.
    Raises:
      AvjaxError: the name is unknown; a local or cached file has another checksum or is missing; or no source gave
        the files: the message has every source's reason and what to do.
    """
    entry = _entry(name)
    folder, reason = _folder(name, weights_dir)
    if reason:
        _fill(entry, folder, [f"local folder: {reason}"])
    _check_all(entry, folder)
    return folder / next(iter(entry.files)) if len(entry.files) == 1 else folder


def is_there(name: str) -> bool:
    """Whether `fetch` has all files of a registry entry at hand, with the right checksums; fetches nothing.

    Raises:
      AvjaxError: as `fetch`, of a file that is there and is another one, or of an incomplete folder of the user's own.
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
    """Where the files of an entry are: the user's own folder, else that in the cache and why the former is not used."""
    local = weights_dir or os.environ.get("AVJAX_WEIGHTS")
    folder = Path(local).expanduser() / name if local else None
    if folder is not None and folder.is_dir():
        return folder, ""
    reason = f"{folder} is not there" if folder else "none given (weights_dir, AVJAX_WEIGHTS)"
    return paths.cache() / "weights" / name, reason


def convert(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any], name_of: Callable[[str], str], ignored: re.Pattern
) -> dict[str, Any]:
    """Brings PyTorch tensors into the layout of Flax params; every tensor is used or on the ignore list.

    Args:
      tensors: PyTorch name → array.
      shapes: the params as nested dicts of anything with a `shape`, such as `jax.eval_shape` of an init returns.
      name_of: path of a Flax module, parts joined by "/", → name of the PyTorch module it comes from; for a param that
        is none of kernel, scale, embedding and bias (a class token, a layer scale) its whole path → its whole name.
      ignored: matches the names that may be left over (pretraining heads).
    Returns:
      Nested dicts like `shapes`, float32. Kernels are transposed from (out, in) and split into heads.
    Raises:
      AvjaxError: tensors missing, left over, or of another shape, with their names.
    """
    import flax

    wanted = flax.traverse_util.flatten_dict(shapes)
    source = {path: _source(path, name_of) for path in wanted}
    missing = sorted(set(source.values()) - set(tensors))
    left_over = sorted(n for n in set(tensors) - set(source.values()) if not ignored.search(n))
    if missing or left_over:
        raise AvjaxError(
            "the tensors do not fit the architecture of the configuration; "
            f"missing: {', '.join(missing) or 'none'}; left over: {', '.join(left_over) or 'none'}"
        )
    fitted = {p: _fitted(tensors[source[p]], p[-1], param.shape, source[p]) for p, param in wanted.items()}
    return flax.traverse_util.unflatten_dict(fitted)


_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def _source(path: tuple[str, ...], name_of: Callable[[str], str]) -> str:
    """The name of the tensor that becomes the param at `path`."""
    if path[-1] not in _LEAVES:
        return name_of("/".join(path))
    return f"{name_of('/'.join(path[:-1]))}.{_LEAVES[path[-1]]}"


def _fitted(tensor: np.ndarray, leaf: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    # PyTorch keeps kernels as (out, in, *window), Flax as (*window, in, out).
    turned = np.moveaxis(tensor, (0, 1), (-1, -2)) if leaf == "kernel" else tensor
    # Heads split an axis and merge none: every partial product of the sizes must remain one.
    if turned.size != np.prod(shape) or not set(np.cumprod(turned.shape)) <= set(np.cumprod(shape)):
        raise AvjaxError(
            f"{name}: shape {tensor.shape} does not fit the param of shape {tuple(shape)}; wrong config.json?"
        )
    return turned.reshape(shape).astype(np.float32)


def _fill(entry: Entry, folder: Path, reasons: list[str]) -> None:
    """Brings into the cache `folder` those files of the entry that it lacks; `reasons` say why it is needed at all."""
    lacking = {file: expected for file, expected in entry.files.items() if not (folder / file).exists()}
    if not lacking:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for source in entry.sources:
        try:
            return _collect(source, lacking, folder)
        except Unavailable as error:
            reasons.append(f"{source}: {error}")
    remedies = [f"put {', '.join(lacking)} into {folder}", *(s.remedy(lacking, folder) for s in entry.sources)]
    raise AvjaxError(
        f"no source gives {', '.join(lacking)} ({entry.what}):\n  "
        + "\n  ".join(reasons)
        + "\nDo one of these and try again:\n  "
        + "\n  ".join(remedies)
    )


def _collect(source: Source, files: Mapping[str, File], folder: Path) -> None:
    # Beside the destination, so that os.replace is one atomic step on one file system.
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
    """file → sha256 of the files that are not pinned here, as they arrived."""
    path = folder / _SUMS
    return read_json(path) if path.is_file() else {}


def _check_all(entry: Entry, folder: Path) -> None:
    kept = _kept_sums(folder)
    for file, expected in entry.files.items():
        _check(folder / file, expected.sha256 or kept.get(file, ""))


def _check(path: Path, expected: str) -> None:
    """`expected` is "" where nothing is known: a file in the user's own folder that is not pinned."""
    if not path.is_file():
        raise AvjaxError(f"{path}: no such file, but the folder was found; add the file, or move the folder away")
    if expected and (got := sha256(path)) != expected:
        raise AvjaxError(f"{path}: sha256 is {got}, expected {expected}; delete the file to fetch it anew")

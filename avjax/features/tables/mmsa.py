"""Reads features as MMSA (Mao et al. 2022) and MERTools (MER2023) publish them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from avjax.errors import AvjaxError
from avjax.features.tables import readers
from avjax.utils import safe_pickle

MMSA_PARTS = ("train", "valid", "test")


_MMSA = ("id", "raw_text", "text", "audio", "vision", "regression_labels")


def npy_folder(folder: Path) -> dict[str, np.ndarray]:
    """Clip → array of a folder such as `wavlm-large-UTT` (d,) or `manet_FER-FRA` (t, d), one .npy or folder each.

    Raises:
      AvjaxError: there is no clip, or one cannot be read.
    """
    clips = {p.stem if p.is_file() else p.name: p for p in sorted(folder.glob("*")) if p.is_dir() or p.suffix == ".npy"}
    if not clips:
        raise AvjaxError(f"{folder}: no .npy and no folder of such; expected one for each clip")
    return {clip: readers.frames(place) for clip, place in clips.items()}


def mmsa(path: Path) -> dict[str, list]:
    """The utterances of all three parts of a pickle of MMSA, column → one value for each.

    Returns:
      id ("video$_$clip"), part ("train", "valid", "test"), raw_text, text (steps, 768), audio (steps, 74), vision
      (steps, 35), regression_labels, and what else all parts have; of an unaligned file also audio_lengths and
      vision_lengths in steps. Arrays are those of the file, not copies.
    Raises:
      AvjaxError: as `pickles.load`; or a part or a column is missing, columns are of unequal length, or an id is none.
    """
    found = safe_pickle.load(path)
    parts = {part: found.get(part) for part in MMSA_PARTS} if isinstance(found, dict) else {}
    if missing := [part for part in MMSA_PARTS if not isinstance(parts.get(part), dict)]:
        raise AvjaxError(f"{path}: no {', '.join(missing)} in it; expected the three parts of MMSA")
    for part, columns in parts.items():
        _check_mmsa(f"{path}: {part}", columns)
    names = [name for name in parts["train"] if all(name in columns for columns in parts.values())]
    rows = {name: [row for columns in parts.values() for row in columns[name]] for name in names}
    return {"part": [part for part, columns in parts.items() for _ in columns["id"]]} | rows


def _check_mmsa(where: str, columns: Mapping[str, Sequence]) -> None:
    if missing := [name for name in _MMSA if name not in columns]:
        raise AvjaxError(f"{where} has no {', '.join(missing)}; it has {', '.join(map(str, columns))}")
    if len(set((rows := {name: len(column) for name, column in columns.items()}).values())) > 1:
        raise AvjaxError(f"{where} has columns of unequal length: {rows}")
    if odd := [str(i) for i in columns["id"] if not re.fullmatch(r".+\$_\$.+", str(i))]:
        raise AvjaxError(f"{where} has the id {odd[0]!r}; expected VIDEO$_$CLIP")

"""Reads features as MMSA publishes them (Mao et al. 2022, "M-SENA")."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from avjax.errors import AvjaxError
from avjax.utils import safe_pickle

PARTS = ("train", "valid", "test")
_COLUMNS = ("id", "raw_text", "text", "audio", "vision", "regression_labels")


def mmsa(path: Path) -> dict[str, list]:
    """Reads the utterances of all three parts of a pickle of MMSA: column → one value per utterance.

    Returns:
      id ("video$_$clip"), part ("train", "valid", "test"), raw_text, text (steps, 768), audio (steps, 74), vision
      (steps, 35), regression_labels, and other columns that all parts have; for unaligned files also audio_lengths and
      vision_lengths in steps. Arrays are those of the file, not copies.

    Raises:
      AvjaxError: as `safe_pickle.load`; or a part or a column is missing, columns differ in length, or an id is
        malformed.
    """
    content = safe_pickle.load(path)
    parts = {part: content.get(part) for part in PARTS} if isinstance(content, dict) else {}
    if missing := [part for part in PARTS if not isinstance(parts.get(part), dict)]:
        raise AvjaxError(f"{path}: no {', '.join(missing)} in it; expected the three parts of MMSA")
    for part, columns in parts.items():
        _check_part(f"{path}: {part}", columns)
    names = [name for name in parts["train"] if all(name in columns for columns in parts.values())]
    rows = {name: [row for columns in parts.values() for row in columns[name]] for name in names}
    return {"part": [part for part, columns in parts.items() for _ in columns["id"]]} | rows


def _check_part(where: str, columns: Mapping[str, Sequence]) -> None:
    if missing := [name for name in _COLUMNS if name not in columns]:
        raise AvjaxError(f"{where} has no {', '.join(missing)}; it has {', '.join(map(str, columns))}")
    if len(set((rows := {name: len(column) for name, column in columns.items()}).values())) > 1:
        raise AvjaxError(f"{where} has columns of unequal length: {rows}")
    if odd := [str(i) for i in columns["id"] if not re.fullmatch(r".+\$_\$.+", str(i))]:
        raise AvjaxError(f"{where} has the id {odd[0]!r}; expected VIDEO$_$CLIP")

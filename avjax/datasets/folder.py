r"""Any folder of clips with a `labels.csv`.

Columns: `file,label[,id][,speaker][,gender][,split|fold][,transcript][,audio][,start,end]`, separated by commas,
semicolons or tabs; files are relative to the folder, `start` and `end` are seconds, `gender` is female, male or empty.
The table is UTF-8, except for file names that are not: these are written byte for byte as on disk, and shown with
`\xe9` for such a byte.

Instead of `label` there may be columns of numbers, `value:<name>`, such as `value:valence` (task "regression"); of 1
and 0, `is:<name>`, such as `is:happy` (task "multilabel"); or of votes or proportions, `share:<name>`, such as
`share:happy` (task "soft").

Any label is a class, unless there is a file `classes.txt` beside the table, with one class per line, in order. Rows
with another label are then rejected.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from avjax.datasets import labels
from avjax.datasets.base import GENDERS, Clip, Corpus, Task
from avjax.errors import AvjaxError
from avjax.utils import media_files, tables

_MARKS = {"regression": "value:", "multilabel": "is:", "soft": "share:"}
_HINT = (
    "expected a table with the columns file,label[,speaker][,split|fold][,transcript]; a folder data set has it as "
    "labels.csv (set --config.data.root to its folder)"
)
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


def index(root: Path) -> Corpus:
    """Reads `root/labels.csv`; raises as `read`."""
    return read(root / "labels.csv")


def read(table: Path, *, anywhere: bool = False) -> Corpus:
    """Reads a table of clips. Classes are those of `classes.txt` beside it, else the labels in alphabetical order.

    A row is rejected with a reason if it has no label or one that is not a class, a file that cannot be read or is
    outside the folder, or the id of an earlier row.

    Args:
      table: its path.
      anywhere: whether files may be outside the table's folder.

    Raises:
      AvjaxError: no such table, it or `classes.txt` is not UTF-8, it is not CSV, no column `file` or `label`,
        `classes.txt` has no class or one twice, or no usable row.
    """
    rows = tables.read(table, ("file",), hint=_HINT, raw=("file", "audio"), name=lambda text: text.strip().lower())
    root = table.parent
    task, columns = _numbers(table, rows)
    classes = () if columns else _classes(root / "classes.txt")
    clips, rejected, seen = [], [], set()
    for row in rows:
        clip, reason = _clip(root, row, task, columns, anywhere)
        if not reason and classes:
            reason = labels.unknown_label(clip.label, classes)
        if clip and clip.id in seen:
            reason = "duplicate clip id: an earlier row has it; tell them apart in a column id"
        if reason:
            rejected.append((clip.id if clip else (media_files.shown(row["file"]) or "?"), reason))
        else:
            seen.add(clip.id)
            clips.append(clip)
    if not clips:
        first = ": ".join(rejected[0]) if rejected else "there is none"
        raise AvjaxError(f"{table}: none of its {len(rows)} rows can be used; the first: {first}")
    names = tuple(column.partition(":")[2] for column in columns)
    classes = names or classes or tuple(sorted({c.label for c in clips}))
    return Corpus("folder", Task(task, classes), tuple(clips), (), tuple(rejected))


def _numbers(table: Path, rows: Sequence[Mapping]) -> tuple[str, tuple[str, ...]]:
    """Returns the kind of task and the columns of numbers that replace `label`, () if there are none."""
    names = [name for name in rows[0] if name] if rows else ["file", "label"]
    columns = {kind: tuple(c for c in names if c.startswith(mark)) for kind, mark in _MARKS.items()}
    used = {kind: marked for kind, marked in columns.items() if marked}
    if not used:
        tables.check_columns(table, names, ("file", "label"))
        return "single", ()
    if len(used) > 1 or "label" in names:
        got = ", ".join(c for c in names if c == "label" or c.startswith(tuple(_MARKS.values())))
        marks = ", ".join(f"{mark}<name>" for mark in _MARKS.values())
        raise AvjaxError(f"{table}: columns {got}; expected one kind of label: label, {marks}")
    return next(iter(used.items()))


def _classes(path: Path) -> tuple[str, ...]:
    """Reads the lines of `classes.txt`; () if there is no such file."""
    if not path.is_file():
        return ()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise AvjaxError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    classes = tuple(filter(None, lines))
    if not classes or len(set(classes)) < len(classes):
        raise AvjaxError(f"{path}: got {', '.join(classes) or 'no line'}; expected each class once, one per line")
    return classes


def _label(row: Mapping[str | None, str], task: str, columns: tuple[str, ...]) -> tuple[str | tuple[float, ...], str]:
    """Returns a row's label, and why it is unusable ("" if it is usable)."""
    if not columns:
        return row["label"], "" if row["label"] else "no label"
    return labels.numbers(task, {column: row[column] for column in columns})


def _clip(
    root: Path, row: Mapping[str | None, str], task: str, columns: tuple[str, ...], anywhere: bool
) -> tuple[Clip | None, str]:
    """Returns a row's clip, and why it cannot be used ("" if it can)."""
    if not row["file"]:
        return None, "no file name"
    if None in row:
        return None, "more cells than columns; put a text with a separator in it in double quotes"
    try:
        start, end = (float(row[k]) if row.get(k) else None for k in ("start", "end"))
    except ValueError:
        return None, f"start or end is not a number: {row.get('start')!r}, {row.get('end')!r}"
    label, unlabelled = _label(row, task, columns)
    audio = root / row["audio"] if row.get("audio") else None
    clip = Clip(
        id=row.get("id") or media_files.shown(Path(row["file"]).with_suffix("").as_posix()),
        path=root / row["file"],
        label=label,
        audio=audio,
        speaker=row.get("speaker") or None,
        transcript=row.get("transcript") or None,
        start=start,
        end=end,
        split=SPLITS.get(row.get("split", "").lower()),
        fold=row.get("fold") or None,
        gender=row.get("gender", "").lower() or None,
    )
    if unlabelled:
        return clip, unlabelled
    if row.get("split") and clip.split is None:
        return clip, f"split is {row['split']!r}; expected train, val or test"
    if clip.gender and clip.gender not in GENDERS:
        return clip, f"gender is {row['gender']!r}; expected {' or '.join(GENDERS)}, or nothing"
    if not 0 <= (start or 0) < (float("inf") if end is None else end):
        return clip, f"start is {start}, end is {end}; expected 0 <= start < end, in seconds"
    if reason := _trouble(root, clip.path, anywhere):
        return clip, reason
    if audio and (reason := _trouble(root, audio, anywhere)):
        return clip, f"its audio file: {reason}"
    return clip, ""


def _trouble(root: Path, file: Path, anywhere: bool) -> str:
    try:
        inside = anywhere or Path(os.path.realpath(file)).is_relative_to(root.resolve())
    except ValueError:  # a null byte, for which `media_files.trouble` has a reason
        inside = True
    return media_files.trouble(file) if inside else "file lies outside the data folder"

"""Any folder of clips with a `labels.csv`.

Columns: `file,label[,id][,speaker][,split|fold][,transcript][,audio][,start,end]`, separated by commas, semicolons or
tabs; files are relative to the folder, `start` and `end` are seconds.
"""

import csv
from collections.abc import Iterable
from pathlib import Path

from avjax.datasets.base import Clip, Corpus, Task
from avjax.errors import AvjaxError

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


def index(root: Path) -> Corpus:
    """Reads `root/labels.csv`. Classes are the label names in alphabetical order.

    A row without a label, with a file that is not there or leaves the folder, or with an id that was used before is
    rejected with a reason; it does not stop the rest.

    Raises:
      AvjaxError: no `labels.csv`, it is not UTF-8 or not CSV, no column `file` or `label`, or no usable row.
    """
    table = root / "labels.csv"
    rows = _read(table)
    clips, rejected, seen = [], [], set()
    for row in rows:
        clip, reason = _clip(root, row)
        if clip and clip.id in seen:
            reason = "duplicate clip id: an earlier row has it; tell them apart in a column id"
        if reason:
            rejected.append((clip.id if clip else (row["file"] or "?"), reason))
        else:
            seen.add(clip.id)
            clips.append(clip)
    if not clips:
        first = ": ".join(rejected[0]) if rejected else "there is none"
        raise AvjaxError(f"{table}: none of its {len(rows)} rows can be used; the first: {first}")
    return Corpus("folder", Task("single", tuple(sorted({c.label for c in clips}))), tuple(clips), (), tuple(rejected))


def _read(table: Path) -> list[dict[str, str]]:
    """The rows as column name → stripped text, "" where a row is short; `surplus` is what it has beyond the columns."""
    if not table.is_file():
        raise AvjaxError(
            f"{table}: not found; a folder data set needs a labels.csv with the columns file,label"
            "[,speaker][,split|fold][,transcript] (set --config.data.root to its folder)"
        )
    try:
        with table.open(encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            # Spreadsheets of many countries separate by semicolons.
            separator = max(",;\t", key=header.count)
            reader = csv.DictReader(file, delimiter=separator, strict=True, restval="")
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            if missing := {"file", "label"} - set(reader.fieldnames):
                lacking = " or ".join(sorted(missing))
                raise AvjaxError(f"{table}: no column {lacking}; got {header.strip()!r}, expected file,label[,…]")
            return [{n: row[n].strip() for n in reader.fieldnames} | {"surplus": row.get(None, "")} for row in reader]
    except UnicodeDecodeError as error:
        raise AvjaxError(f"{table}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise AvjaxError(
            f'{table}, line {reader.reader.line_num}: {error}; a cell with a quote in it is written "say ""this"""'
        ) from error


def _clip(root: Path, row: dict[str, str]) -> tuple[Clip | None, str]:
    """A row's clip, and why it cannot be used ("" if it can)."""
    if not row["file"]:
        return None, "no file name"
    if row["surplus"]:
        return None, "more cells than columns; put a text with a separator in it in double quotes"
    try:
        start, end = (float(row[k]) if row.get(k) else None for k in ("start", "end"))
    except ValueError:
        return None, f"start or end is not a number: {row.get('start')!r}, {row.get('end')!r}"
    clip = Clip(
        id=row.get("id") or Path(row["file"]).with_suffix("").as_posix(),
        path=root / row["file"],
        label=row["label"],
        audio=root / row["audio"] if row.get("audio") else None,
        speaker=row.get("speaker") or None,
        transcript=row.get("transcript") or None,
        start=start,
        end=end,
        split=SPLITS.get(row.get("split", "").lower()),
        fold=row.get("fold") or None,
    )
    if not clip.label:
        return clip, "no label"
    if row.get("split") and clip.split is None:
        return clip, f"split is {row['split']!r}; expected train, val or test"
    if not 0 <= (start or 0) < (float("inf") if end is None else end):
        return clip, f"start is {start}, end is {end}; expected 0 <= start < end, in seconds"
    return clip, _trouble(root, filter(None, (clip.path, clip.audio)))


def _trouble(root: Path, files: Iterable[Path]) -> str:
    for file in files:
        try:
            if not file.resolve().is_relative_to(root.resolve()):
                return "file lies outside the data folder"
            if not file.is_file():
                return "no such file"
        except (OSError, ValueError) as error:  # a name too long, or with a null byte
            return f"no such file ({error})"
    return ""

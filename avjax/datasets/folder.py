"""Any folder of clips with a `labels.csv`.

Columns: `file,label[,id][,speaker][,split|fold][,transcript][,audio][,start,end]`.
"""

import csv
from pathlib import Path

from avjax.datasets.base import Clip, Corpus, Task
from avjax.errors import AvjaxError

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


def index(root: Path) -> Corpus:
    """Reads `root/labels.csv`. Classes are the label names in alphabetical order.

    A row without a label, with a file that is not there or leaves the folder, or with an id that was used before is
    rejected with a reason; it does not stop the rest.

    Raises:
      AvjaxError: no `labels.csv`, no column `file` or `label`, or no usable row.
    """
    table = root / "labels.csv"
    if not table.is_file():
        raise AvjaxError(
            f"{table}: not found; a folder data set needs a labels.csv with the columns file,label"
            "[,speaker][,split|fold][,transcript] (set --config.data.root to its folder)"
        )
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AvjaxError(f"{table}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    rows = list(csv.DictReader(text.splitlines()))
    missing = {"file", "label"} - set(rows[0] if rows else ())
    if missing:
        raise AvjaxError(f"{table}: no column {' or '.join(sorted(missing))}, or no rows; expected file,label[,…]")
    clips, rejected, seen = [], [], set()
    for row in rows:
        clip, reason = _clip(root, {k: (v or "").strip() for k, v in row.items() if isinstance(v, str | None) and k})
        if clip and clip.id in seen:
            reason = "duplicate clip id: an earlier row has it"
        if reason:
            rejected.append((clip.id if clip else (row.get("file") or "?"), reason))
        else:
            seen.add(clip.id)
            clips.append(clip)
    if not clips:
        raise AvjaxError(f"{table}: none of its {len(rows)} rows can be used; the first: {rejected[0]}")
    return Corpus("folder", Task("single", tuple(sorted({c.label for c in clips}))), tuple(clips), (), tuple(rejected))


def _clip(root: Path, row: dict[str, str]) -> tuple[Clip | None, str]:
    """A row's clip, and why it cannot be used ("" if it can)."""
    if not row["file"]:
        return None, "no file name"
    path = root / row["file"]
    try:
        start, end = (float(row[k]) if row.get(k) else None for k in ("start", "end"))
    except ValueError:
        return None, f"start or end is not a number: {row.get('start')!r}, {row.get('end')!r}"
    clip = Clip(
        id=row.get("id") or Path(row["file"]).with_suffix("").as_posix(),
        path=path,
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
    for file in filter(None, (clip.path, clip.audio)):
        if not file.resolve().is_relative_to(root.resolve()):
            return clip, "file lies outside the data folder"
        if not file.is_file():
            return clip, "no such file"
    return clip, ""

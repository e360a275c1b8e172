"""Reads the fold lists that S2D, HiCMAE, OGM-GE and VAVL publish for DFEW, MAFW, CREMA-D, RAVDESS and MSP-IMPROV."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path, PurePosixPath

from avjax.datasets.folder import SPLITS
from avjax.datasets.folds import overlaps, repeated
from avjax.errors import AvjaxError
from avjax.utils import tables

# ---- Lists of folds -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Listed:
    """A list of the clips of one part of a fold.

    Attributes:
      fold: its name, "" if there is only one split.
      part: "train", "val" or "test".
      clips: clip name → label.
      again: (clip, label) of rows that repeat a clip of the list.
    """

    fold: str
    part: str
    clips: Mapping[str, str]
    again: tuple[tuple[str, str], ...] = ()


_FOLD = re.compile(r"(?:split|set|fold|consensus)[ _-]?0*(\d+)$", re.IGNORECASE)
_PART = re.compile(r"(?<![a-z])(train|val|valid|validation|dev|test)(?![a-z])", re.IGNORECASE)


def fold_lists(folder: Path) -> list[Listed]:
    """Reads the fold lists of one data set, recognised by the names of files and folders and by their first line.

    Formats: `split01/{train,val,test}.csv[.gz]` of HiCMAE, lines `video audio label`; `set_1/train.txt`, lines
    `00025.mp4 anger`; `train_set_1.csv` and `train.csv`, lines `name,label` with or without a header; and
    `label_consensus_1.csv` of VAVL with a column Split_Set, where the label is the class with most votes. A clip is
    named by its file without the suffix. Lists without a fold are left out if others have one; so is a .csv beside a
    .txt of the same name, which has class names instead of numbers.

    Raises:
      AvjaxError: there is no list, two lists are of the same part of a fold, or a line is invalid.
    """
    lists = [listed for path in _candidates(folder) for listed in _lists(folder, path)]
    lists = [(path, one) for path, one in lists if one.fold] or lists
    if not lists:
        raise AvjaxError(f"{folder}: no list of folds; expected files such as split01/train.csv or train_set_1.csv")
    paths_of = defaultdict(list)
    for path, one in lists:
        paths_of[one.fold, one.part].append(path.relative_to(folder).as_posix())
    for (fold, part), paths in paths_of.items():
        if len(paths) > 1:
            raise AvjaxError(
                f"{folder}: {paths[0]} and {paths[1]} are both {part} of fold {fold or 'none'}; name the folder of one "
                "data set and one kind of label"
            )
    return [one for _, one in lists]


def _candidates(folder: Path) -> list[Path]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and re.search(r"\.(csv|csv\.gz|txt)$", p.name))
    return [p for p in paths if p.suffix != ".csv" or p.with_suffix(".txt") not in paths]


def _lists(folder: Path, path: Path) -> list[tuple[Path, Listed]]:
    """Reads the lists in a file; [] if it is not a list."""
    stem = path.name.partition(".")[0]
    names = (stem, path.parent.relative_to(folder).name)
    fold = next((m[1] for name in names if (m := _FOLD.search(name))), "")
    part = _PART.search(stem)
    rows = _rows(path) if part or fold else []
    if rows and "Split_Set" in rows[0]:
        return [(path, _listed(path, fold, p, labels)) for p, labels in _by_share(path, rows).items()]
    if not part:
        return []
    rows = rows[1:] if rows and rows[0][0] == "video_name" else rows
    return [(path, _listed(path, fold, SPLITS[part[1].lower()], [_clip(path, row) for row in rows]))]


def _rows(path: Path) -> list[list[str]]:
    """Reads the cells of each line, separated by commas if the first line has one, else by blanks."""
    rows = tables.read_cells(path)
    return rows if rows and len(rows[0]) > 1 else [" ".join(row).split() for row in rows]


def _clip(path: Path, row: Sequence[str]) -> tuple[str, str]:
    """Returns (clip, label) of a line; HiCMAE's OpenFace frames are in a folder with _aligned after the clip name."""
    if len(row) not in (2, 3) or not all(row):
        raise AvjaxError(f"{path}: the line {' '.join(row)!r}; expected a clip and its label")
    return PurePosixPath(row[0].strip()).stem.removesuffix("_aligned"), row[-1].strip()


def _by_share(path: Path, rows: Sequence[Sequence[str]]) -> dict[str, list[tuple[str, str]]]:
    """Reads a list of VAVL: part → (clip, class with most votes, the first of a tie); FileName, the classes, SpkrID."""
    header, *rows = rows
    parts = defaultdict(list)
    try:
        file, end, split = (header.index(name) for name in ("FileName", "SpkrID", "Split_Set"))
        for row in rows:
            votes = [float(cell) for cell in row[file + 1 : end]]
            label = header[file + 1 + votes.index(max(votes))]
            parts[{"development": "val"}.get(row[split].lower(), row[split].lower())].append(
                _clip(path, (row[file], label))
            )
    except (ValueError, IndexError) as error:
        raise AvjaxError(
            f"{path}: {error}; expected FileName, a column for each class, SpkrID and Split_Set"
        ) from error
    if odd := [part for part in parts if part not in ("train", "val", "test")]:
        raise AvjaxError(f"{path}: Split_Set is {odd[0]!r}; expected Train, Development or Test")
    return parts


def _listed(path: Path, fold: str, part: str, rows: Sequence[tuple[str, str]]) -> Listed:
    if not rows:
        raise AvjaxError(f"{path}: no line in it; expected a clip and its label")
    clips, again = {}, []
    for clip, label in rows:
        if clip in clips:
            again.append((clip, label))
        else:
            clips[clip] = label
    return Listed(fold, part, clips, tuple(again))


def problems(lists: Sequence[Listed]) -> list[str]:
    """Returns a line for each problem of fold lists: clips in two parts, tested twice or never, or with two labels."""
    by_fold = defaultdict(dict)
    for one in lists:
        by_fold[one.fold][one.part] = one.clips.keys()
    lines = [line for fold, parts in by_fold.items() for line in _shared(fold, parts)]
    tested = [clip for parts in by_fold.values() for clip in parts.get("test", ())]
    if several := repeated(tested):
        lines.append(f"{len(several)} clips are tested in several folds, such as {min(several)}")
    if len(by_fold) > 1 and (never := {c for one in lists for c in one.clips} - set(tested)):
        lines.append(f"{len(never)} clips are tested in no fold, such as {min(never)}")
    if twice := [clip for one in lists for clip, _ in one.again]:
        lines.append(f"{len(twice)} times a list has a clip twice, such as {min(twice)}")
    return lines + _two_labels(lists)


def _shared(fold: str, parts: Mapping[str, Set[str]]) -> Iterator[str]:
    where = f"fold {fold}: " if fold else ""
    for one, other, both in overlaps(parts):
        if parts[one] == parts[other]:
            yield f"{where}{one} and {other} are the same {len(both)} clips"
        else:
            yield f"{where}{len(both)} clips are in {one} and {other}, such as {both[0]}"


def _two_labels(lists: Sequence[Listed]) -> list[str]:
    labels = defaultdict(set)
    for one in lists:
        for clip, label in (*one.clips.items(), *one.again):
            labels[clip].add(label)
    if not (two := sorted(clip for clip, names in labels.items() if len(names) > 1)):
        return []
    return [f"{len(two)} clips have two labels, such as {two[0]}: {' and '.join(sorted(labels[two[0]]))}"]

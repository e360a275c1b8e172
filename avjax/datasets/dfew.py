"""DFEW: 11,697 clips of films, seven emotions, five official folds (Jiang et al., ACM Multimedia 2020).

The official lists number the classes from 1, the public ones of S2D from 0, in the same order.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from avjax.datasets import fold_tables
from avjax.datasets.base import Corpus
from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from avjax.utils import media_files, tables

_FILMS = "Clip/original"
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)


def index(root: Path) -> Corpus:
    """Indexes `root/Clip/original/**/ID.mp4` by `root/EmoLabel_DataSplit/{train,test}(single-labeled)/set_{1..5}.csv`.

    Lists may also be called `train_set_1.csv` and `test_set_1.csv`. Numbers of clips may be padded with zeros or not;
    ids have five digits. A clip that a list names is rejected with a reason, and is in no fold, where the disk lacks
    it or its label is no class.

    Raises:
      AvjaxError: the layout is not DFEW's (the message names every missing part), there are frames alone, a name is no
        number, it is not clear whether labels count from 0 or from 1, no clip is there, or the lists contradict each
        other: two labels for a clip, a clip twice in one fold, or not tested exactly once over all folds.
    """
    films, splits = root / _FILMS, root / "EmoLabel_DataSplit"
    if not films.is_dir() and any(root.glob("Clip/clip_224x224*")):
        raise AvjaxError(f"{root}: has frames alone (Clip/clip_224x224…); the films of {_FILMS} are needed, with audio")
    paths = {
        (str(fold), part): _list(splits / f"{part}(single-labeled)", part, fold)
        for fold in range(1, metadata("dfew").folds + 1)
        for part in ("train", "test")
    }
    fold_tables.check_there(root, "dfew", (films, *paths.values()), "'Clip/original' and 'EmoLabel_DataSplit'")
    found = fold_tables.read(splits, paths, _rows)
    names = _names(splits, set(found.labels.values()))
    # What is no class keeps its number, and is rejected by that.
    named = dataclasses.replace(found, labels={n: names.get(label, label) for n, label in found.labels.items()})
    # The first of several, in the order of their paths.
    there = {_id(p.stem): p for p in reversed(media_files.files(films, ".mp4")) if _NUMBER.fullmatch(p.stem)}
    return fold_tables.corpus("dfew", named, films, {n: there.get(n, films / f"{int(n)}.mp4") for n in named.labels})


def _list(folder: Path, part: str, fold: int) -> Path:
    plain, other = folder / f"set_{fold}.csv", folder / f"{part}_set_{fold}.csv"
    return other if other.is_file() and not plain.is_file() else plain


def _id(number: str) -> str:
    return f"{int(number):05d}"


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Where it stands, a clip's id and its number of a class, of each row of a fold list."""
    for row in tables.read(path, ("video_name", "label")):
        if not _NUMBER.fullmatch(row["video_name"]):
            raise AvjaxError(f"{path}: video_name is {row['video_name']!r}; expected a number such as 02522")
        yield str(path), _id(row["video_name"]), row["label"]


def _names(splits: Path, found: set[str]) -> dict[str, str]:
    """Number → class, the first number by all lists together."""
    classes = tuple(metadata("dfew").classes)
    first, beyond = "0", str(len(classes))
    if (first in found) == (beyond in found):
        raise AvjaxError(
            f"{splits}: labels are {', '.join(sorted(found)[:10])}; expected 1 to {beyond} (official) or 0 to "
            f"{len(classes) - 1} (S2D) in all lists together"
        )
    return {str(number): name for number, name in enumerate(classes, 0 if first in found else 1)}

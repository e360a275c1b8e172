"""DFEW: 11,697 movie clips, seven emotions, five official folds (Jiang et al., ACM Multimedia 2020).

The official lists number the classes from 1, the public lists of S2D from 0, in the same order.
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

_VIDEOS = "Clip/original"
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)


def index(root: Path) -> Corpus:
    """Indexes `root/Clip/original/**/ID.mp4` by `root/EmoLabel_DataSplit/{train,test}(single-labeled)/set_{1..5}.csv`.

    Lists may also be named `train_set_1.csv` and `test_set_1.csv`. Clip numbers may be padded with zeros; ids have
    five digits. A listed clip is rejected with a reason, and is in no fold, if its file is missing or its label is not
    a class.

    Raises:
      AvjaxError: the layout is not DFEW's (the message names every missing part), there are only frames, a name is not
        a number, it is unclear whether labels count from 0 or from 1, no clip exists, or the lists contradict each
        other: two labels for a clip, a clip twice in one fold, or not tested exactly once over all folds.
    """
    videos, splits = root / _VIDEOS, root / "EmoLabel_DataSplit"
    if not videos.is_dir() and any(root.glob("Clip/clip_224x224*")):
        raise AvjaxError(
            f"{root}: has only frames (Clip/clip_224x224…); the videos of {_VIDEOS} are needed, with audio"
        )
    paths = {
        (str(fold), part): _list(splits / f"{part}(single-labeled)", part, fold)
        for fold in range(1, metadata("dfew").folds + 1)
        for part in ("train", "test")
    }
    fold_tables.check_present(root, "dfew", (videos, *paths.values()), "'Clip/original' and 'EmoLabel_DataSplit'")
    lists = fold_tables.read(splits, paths, _rows)
    names = _names(splits, set(lists.labels.values()))
    # A label that is not a class stays a number, and is rejected because of it.
    named = dataclasses.replace(lists, labels={n: names.get(label, label) for n, label in lists.labels.items()})
    # Of several files of a clip, the first by path.
    paths_of = {_id(p.stem): p for p in reversed(media_files.files(videos, ".mp4")) if _NUMBER.fullmatch(p.stem)}
    return fold_tables.corpus(
        "dfew", named, videos, {n: paths_of.get(n, videos / f"{int(n)}.mp4") for n in named.labels}
    )


def _list(folder: Path, part: str, fold: int) -> Path:
    plain, other = folder / f"set_{fold}.csv", folder / f"{part}_set_{fold}.csv"
    return other if other.is_file() and not plain.is_file() else plain


def _id(number: str) -> str:
    return f"{int(number):05d}"


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (location, clip id, class number) of each row of a fold list."""
    for row in tables.read(path, ("video_name", "label")):
        if not _NUMBER.fullmatch(row["video_name"]):
            raise AvjaxError(f"{path}: video_name is {row['video_name']!r}; expected a number such as 02522")
        yield str(path), _id(row["video_name"]), row["label"]


def _names(splits: Path, numbers: set[str]) -> dict[str, str]:
    """Returns number → class; the labels of all lists together show whether numbers start at 0 or 1."""
    classes = tuple(metadata("dfew").classes)
    first, beyond = "0", str(len(classes))
    if (first in numbers) == (beyond in numbers):
        raise AvjaxError(
            f"{splits}: labels are {', '.join(sorted(numbers)[:10])}; expected 1 to {beyond} (official) or 0 to "
            f"{len(classes) - 1} (S2D) in all lists together"
        )
    return {str(number): name for number, name in enumerate(classes, 0 if first in numbers else 1)}

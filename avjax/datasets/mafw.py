"""MAFW, single-label protocol: 9,172 clips, 11 emotions, five official folds (Liu et al., ACM Multimedia 2022).

Its descriptive captions are annotators' words about the emotion, and never an input.
"""

import re
from collections import Counter
from pathlib import Path

from avjax import source
from avjax.datasets import labels as labelling
from avjax.datasets.about import about
from avjax.datasets.base import Clip, Corpus, Fold, Task
from avjax.errors import AvjaxError

_LISTS = "Train & Test Set/single/no_caption"
# A plain file name: a list is not to lead out of the folder of clips.
_LINE = re.compile(r"([\w-]+)\.mp4\s+(\w+)", re.ASCII)


def index(root: Path) -> Corpus:
    """Indexes `root/data/clips/*.mp4` by `root/Train & Test Set/single/no_caption/set_{1..5}/{train,test}.txt`.

    A clip that a list names is rejected with a reason, and is in no fold, where the disk lacks it or its label is not
    one of the eleven; so the count is stated.

    Raises:
      AvjaxError: the layout is not MAFW's (the message names every missing part), a line is not `00025.mp4 anger`,
        no label is one of the eleven, no clip is there, or the lists contradict each other: two labels for a clip, a
        clip twice in one fold, or not tested exactly once over all folds.
    """
    known = about("mafw")
    lists = {
        (fold, part): root / _LISTS / f"set_{fold}" / f"{part}.txt"
        for fold in range(1, known.folds + 1)
        for part in ("train", "test")
    }
    missing = [str(p.relative_to(root)) for p in (root / "data" / "clips", *lists.values()) if not p.exists()]
    if missing:
        raise AvjaxError(
            f"{root}: no MAFW here; missing: {', '.join(missing)}. Set --config.data.root to the folder that holds "
            "'data/clips' and 'Train & Test Set' (or put it at $AVJAX_DATA/mafw)"
        )
    labels: dict[str, str] = {}
    parts = {key: _read_list(path, labels) for key, path in lists.items()}
    _check_folds(root / _LISTS, parts, known.folds)
    classes = tuple(known.classes)
    if not any(label in classes for label in labels.values()):
        raise AvjaxError(f"{root / _LISTS}: not one label of these lists is one of {', '.join(classes)}")
    clips = {name: root / "data" / "clips" / f"{name}.mp4" for name in sorted(labels)}
    reasons = {n: labelling.trouble(labels[n], classes) or source.trouble(path) for n, path in clips.items()}
    there = {name for name, reason in reasons.items() if not reason}
    if not there:
        raise AvjaxError(
            f"{root / 'data' / 'clips'}: holds none of the {len(clips)} clips that the fold lists name; "
            f"the first: {': '.join(next(iter(reasons.items())))}"
        )
    folds = tuple(
        Fold(str(f), *(tuple(n for n in parts[f, p] if n in there) for p in ("train", "test")))
        for f in range(1, known.folds + 1)
    )
    return Corpus(
        "mafw",
        Task("single", classes),
        tuple(Clip(id=n, path=p, label=labels[n]) for n, p in clips.items() if n in there),
        folds,
        tuple((n, reason) for n, reason in reasons.items() if reason),
    )


def _read_list(path: Path, labels: dict[str, str]) -> list[str]:
    """The clip names of a fold list; adds their labels to `labels`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise AvjaxError(f"{path}: not UTF-8 (byte {error.start}); is it a list of no_caption?") from error
    names = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if not match:
            raise AvjaxError(f"{path}, line {number}: {line.strip()!r}; expected a clip and its label: 00025.mp4 anger")
        name, label = match[1], match[2].lower()
        if labels.setdefault(name, label) != label:
            raise AvjaxError(f"{path}, line {number}: {name} is {label!r}, but another list says {labels[name]!r}")
        names.append(name)
    return names


def _check_folds(lists: Path, parts: dict[tuple[int, str], list[str]], folds: int) -> None:
    for fold in range(1, folds + 1):
        _check_once(
            f"{lists / f'set_{fold}'}: in train and test of one fold", parts[fold, "train"] + parts[fold, "test"]
        )
    tested = [name for fold in range(1, folds + 1) for name in parts[fold, "test"]]
    _check_once(f"{lists}: tested in two folds", tested)
    if never := {name for names in parts.values() for name in names} - set(tested):
        raise AvjaxError(f"{lists}: tested in no fold: {_some(never)}; are these the official lists?")


def _check_once(trouble: str, names: list[str]) -> None:
    if repeated := {name for name, count in Counter(names).items() if count > 1}:
        raise AvjaxError(f"{trouble}, or listed twice: {_some(repeated)}; are these the official lists?")


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

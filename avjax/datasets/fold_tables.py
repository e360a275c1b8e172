"""Reads and checks official fold lists, and makes data sets of them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from avjax.datasets.base import Clip, Corpus, Fold, Task
from avjax.datasets.folds import repeated, some
from avjax.datasets.labels import unknown_label
from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from avjax.utils import media_files

# A fold's name and "train" or "test".
Part = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Lists:
    """Fold lists, read and checked.

    Attributes:
      folder: the folder of the lists.
      parts: (fold, "train" or "test") → clip names, in the order of the list.
      labels: name → label.
    """

    folder: Path
    parts: Mapping[Part, Sequence[str]]
    labels: Mapping[str, str]


def check_present(root: Path, corpus: str, paths: Iterable[Path], holds: str) -> None:
    """Raises an AvjaxError that names all missing `paths`, and describes the expected folder by what it `holds`."""
    if missing := [str(path.relative_to(root)) for path in paths if not path.exists()]:
        raise AvjaxError(
            f"{root}: no {metadata(corpus).title}; missing: {', '.join(missing)}. Set --config.data.root to the "
            f"folder that holds {holds} (or put it at $AVJAX_DATA/{corpus})"
        )


def read(folder: Path, paths: Mapping[Part, Path], rows: Callable[[Path], Iterable[tuple[str, str, str]]]) -> Lists:
    """Reads the fold lists of a data set.

    Args:
      folder: the folder of the lists, for error messages.
      paths: (fold, "train" or "test") → path of the list.
      rows: function of a path that yields (location, clip name, label) of each row.

    Raises:
      AvjaxError: the lists contradict each other: two labels for a clip, a clip twice in one fold, or not tested
        exactly once over all folds.
    """
    parts: dict[Part, list[str]] = {}
    labels: dict[str, str] = {}
    for key, path in paths.items():
        parts[key] = []
        for where, name, label in rows(path):
            if labels.setdefault(name, label) != label:
                raise AvjaxError(f"{where}: {name} is {label!r}, but another list has {labels[name]!r}")
            parts[key].append(name)
    _check_folds(folder, parts)
    return Lists(folder, parts, labels)


def corpus(name: str, lists: Lists, folder: Path, videos: Mapping[str, Path]) -> Corpus:
    """Makes a data set with one label per clip from fold lists.

    A clip is rejected with a reason, and is in no fold, if its file is missing or its label is not a class.

    Args:
      name: registry name of the data set.
      lists: its fold lists.
      folder: the folder of videos, for error messages.
      videos: clip name → path.

    Raises:
      AvjaxError: no label is a class, or no clip can be used.
    """
    classes, labels = tuple(metadata(name).classes), lists.labels
    if not any(label in classes for label in labels.values()):
        raise AvjaxError(f"{lists.folder}: not one label of these lists is one of {', '.join(classes)}")
    reasons = {n: unknown_label(labels[n], classes) or media_files.trouble(videos[n]) for n in sorted(labels)}
    usable = {n: videos[n] for n, reason in reasons.items() if not reason}
    if not usable:
        first = ": ".join(next(iter(reasons.items())))
        raise AvjaxError(
            f"{folder}: holds none of the {len(labels)} clips that the fold lists name; the first: {first}"
        )
    return Corpus(
        name,
        Task("single", classes),
        tuple(Clip(id=n, path=path, label=labels[n]) for n, path in usable.items()),
        _folds(lists, usable),
        tuple((n, reason) for n, reason in reasons.items() if reason),
    )


def _folds(lists: Lists, usable: Iterable[str]) -> tuple[Fold, ...]:
    return tuple(
        Fold(f, *(tuple(n for n in lists.parts[f, part] if n in usable) for part in ("train", "test")))
        for f in dict.fromkeys(fold for fold, _ in lists.parts)
    )


def _check_folds(folder: Path, parts: Mapping[Part, list[str]]) -> None:
    folds = dict.fromkeys(fold for fold, _ in parts)
    for fold in folds:
        _check_once(f"{folder}, fold {fold}: in train and test of one fold", parts[fold, "train"] + parts[fold, "test"])
    tested = [name for fold in folds for name in parts[fold, "test"]]
    _check_once(f"{folder}: tested in two folds", tested)
    if never := sorted({name for names in parts.values() for name in names} - set(tested)):
        raise AvjaxError(f"{folder}: tested in no fold: {some(never)}; are these the official lists?")


def _check_once(trouble: str, names: list[str]) -> None:
    if twice := sorted(repeated(names)):
        raise AvjaxError(f"{trouble}, or listed twice: {some(twice)}; are these the official lists?")

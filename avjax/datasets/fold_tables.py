"""Official fold lists, which are checked before use, and the data sets that they make."""

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
    """Fold lists that were read and checked.

    Attributes:
      place: their folder.
      parts: (fold, "train" or "test") → names of clips, in the order of the list.
      labels: name → label.
    """

    place: Path
    parts: Mapping[Part, Sequence[str]]
    labels: Mapping[str, str]


def check_there(root: Path, corpus: str, paths: Iterable[Path], holds: str) -> None:
    """Raises an AvjaxError that names all of `paths` that are not there, and the folder wanted by what it `holds`."""
    if missing := [str(path.relative_to(root)) for path in paths if not path.exists()]:
        raise AvjaxError(
            f"{root}: no {metadata(corpus).title} here; missing: {', '.join(missing)}. Set --config.data.root to the "
            f"folder that holds {holds} (or put it at $AVJAX_DATA/{corpus})"
        )


def read(place: Path, paths: Mapping[Part, Path], rows: Callable[[Path], Iterable[tuple[str, str, str]]]) -> Lists:
    """Reads the fold lists below `place`.

    Args:
      rows: path → where the row stands, a clip's name, its label, for each row.
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
    _check_folds(place, parts)
    return Lists(place, parts, labels)


def corpus(name: str, lists: Lists, place: Path, films: Mapping[str, Path]) -> Corpus:
    """The data set `name` of single labels, whose clips are those of the lists.

    A clip is rejected with a reason, and is in no fold, where the disk lacks it or its label is no class; so the count
    is stated.

    Args:
      place: the folder of films; films: a clip's name → its file.
    Raises:
      AvjaxError: no label is a class, or no clip is there.
    """
    classes, labels = tuple(metadata(name).classes), lists.labels
    if not any(label in classes for label in labels.values()):
        raise AvjaxError(f"{lists.place}: not one label of these lists is one of {', '.join(classes)}")
    reasons = {n: unknown_label(labels[n], classes) or media_files.trouble(films[n]) for n in sorted(labels)}
    there = {n: films[n] for n, reason in reasons.items() if not reason}
    if not there:
        first = ": ".join(next(iter(reasons.items())))
        raise AvjaxError(f"{place}: holds none of the {len(labels)} clips that the fold lists name; the first: {first}")
    return Corpus(
        name,
        Task("single", classes),
        tuple(Clip(id=n, path=path, label=labels[n]) for n, path in there.items()),
        _folds(lists, there),
        tuple((n, reason) for n, reason in reasons.items() if reason),
    )


def _folds(lists: Lists, there: Iterable[str]) -> tuple[Fold, ...]:
    return tuple(
        Fold(f, *(tuple(n for n in lists.parts[f, part] if n in there) for part in ("train", "test")))
        for f in dict.fromkeys(fold for fold, _ in lists.parts)
    )


def _check_folds(place: Path, parts: Mapping[Part, list[str]]) -> None:
    folds = dict.fromkeys(fold for fold, _ in parts)
    for fold in folds:
        _check_once(f"{place}, fold {fold}: in train and test of one fold", parts[fold, "train"] + parts[fold, "test"])
    tested = [name for fold in folds for name in parts[fold, "test"]]
    _check_once(f"{place}: tested in two folds", tested)
    if never := sorted({name for names in parts.values() for name in names} - set(tested)):
        raise AvjaxError(f"{place}: tested in no fold: {some(never)}; are these the official lists?")


def _check_once(trouble: str, names: list[str]) -> None:
    if twice := sorted(repeated(names)):
        raise AvjaxError(f"{trouble}, or listed twice: {some(twice)}; are these the official lists?")

"""Data sets: an index of clips, a task, and folds as lists of clip ids."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from avjax.utils import media_files


@dataclasses.dataclass(frozen=True)
class Task:
    """What is predicted.

    Attributes:
      kind: "single" (one of the classes per clip), "soft" (a share of each class), "multilabel" (yes or no to each),
        "regression" (a number for each); see `avjax.tasks`.
      classes: names of the classes, labels or values.
    """

    kind: str
    classes: tuple[str, ...]


GENDERS = ("female", "male")


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip of a data set, before anything was read from it.

    Attributes:
      id: unique within the data set.
      path: the media file; audio: a separate sound file, or None when the sound is in `path`.
      label: class name; of other tasks a number for each of `Task.classes`.
      speaker, transcript: or None where unknown; gender: of the speaker, one of `GENDERS`, or None.
      start, end: seconds, the part of the file that is the clip, or None for all of it.
      split: "train", "val" or "test" of an official split, or None.
      fold: name of the fold in which the clip is tested, or None.
      dialogue, turn: its conversation and its place in it, or None.
    """

    id: str
    path: Path
    label: str | tuple[float, ...]
    audio: Path | None = None
    speaker: str | None = None
    transcript: str | None = None
    start: float | None = None
    end: float | None = None
    split: str | None = None
    fold: str | None = None
    dialogue: str | None = None
    turn: int | None = None
    gender: str | None = None

    def trouble(self) -> str:
        """Says why a file of the clip cannot be read; "" where all can. Whoever names clips asks, once."""
        reason = media_files.trouble(self.audio) if self.audio else ""
        return media_files.trouble(self.path) or (reason and f"its audio file: {reason}")


@dataclasses.dataclass(frozen=True)
class Fold:
    """One division of a data set: `name`, ids to train on, ids of an official validation part, ids to test on."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    val: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Name of a part → its ids."""
        return {"train": self.train, "val": self.val, "test": self.test}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An indexed data set.

    Attributes:
      name: its registry name.
      task: what is predicted.
      clips: all clips of the protocol, in a stable order.
      folds: official folds, or () where the protocol makes them from the clips.
      rejected: (clip id, reason) of rows that name no usable clip.
      overlapping: whether official folds test some clips twice: one is then to be chosen by `protocol.only`, and
        figures of several are never pooled.
    """

    name: str
    task: Task
    clips: tuple[Clip, ...]
    folds: tuple[Fold, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    overlapping: bool = False


Index = Callable[[Path], Corpus]


def make_corpus(
    name: str, clips: Iterable[Clip], reasons: Mapping[str, str], lacking: str, kind: str = "single"
) -> Corpus:
    """Makes the data set `name` of those clips that can be used; the others are rejected with a reason.

    Args:
      reasons: id → why a clip cannot be used, beside those that are known to be broken (`avjax.datasets.metadata`).
      lacking: what the error says where there is no clip.
      kind: of the task.
    Raises:
      AvjaxError: no clip is there, or none can be used.
    """
    known = metadata(name)
    kept: dict[str, Clip] = {}
    rejected = []
    for clip in clips:
        twice = "duplicate clip id: another file has this name" if clip.id in kept else ""
        if reason := twice or known.broken.get(clip.id) or reasons.get(clip.id) or clip.trouble():
            rejected.append((clip.id, reason))
        else:
            kept[clip.id] = clip
    if not kept:
        why = f"none of {len(rejected)} clips can be used; the first: {': '.join(rejected[0])}" if rejected else lacking
        raise AvjaxError(f"{why}; set --config.data.root to the folder of the download")
    return Corpus(name, Task(kind, tuple(known.classes)), tuple(kept.values()), (), tuple(rejected))

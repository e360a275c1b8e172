"""What a data set is to avjax: an index of clips, a task, and folds as lists of clip ids."""

import dataclasses
from collections.abc import Callable
from pathlib import Path


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

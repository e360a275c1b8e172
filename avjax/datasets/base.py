"""Types of data sets: an index of clips, a task, and folds as lists of clip ids."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from avjax.utils import media_files


@dataclasses.dataclass(frozen=True)
class Task:
    """The prediction target of a data set.

    Attributes:
      kind: "single" (one class per clip), "soft" (a proportion of each class), "multilabel" (each class present or
        absent) or "regression" (a number for each target); see `avjax.tasks`.
      classes: names of the classes or regression targets.
    """

    kind: str
    classes: tuple[str, ...]


GENDERS = ("female", "male")


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip of a data set; its media files have not been opened yet.

    Attributes:
      id: unique within the data set.
      path: the media file.
      label: class name; for other tasks than "single", a number for each of `Task.classes`.
      audio: a separate audio file, or None when the audio is in `path`.
      speaker, transcript: None where unknown.
      start, end: bounds of the clip within the file, in seconds; None for those of the file.
      split: "train", "val" or "test" of an official split, or None.
      fold: name of the fold that tests the clip, or None.
      dialogue, turn: its conversation and its position in it, or None.
      gender: of the speaker, one of `GENDERS`, or None.
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
        """Returns why a file of the clip cannot be read, "" if all can. Readers of data sets call it once per clip."""
        reason = media_files.trouble(self.audio) if self.audio else ""
        return media_files.trouble(self.path) or (reason and f"its audio file: {reason}")


@dataclasses.dataclass(frozen=True)
class Fold:
    """A fold of a data set: its name and the ids of clips to train on, to test on and, if official, to validate on."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    val: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Returns part name → clip ids."""
        return {"train": self.train, "val": self.val, "test": self.test}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An indexed data set.

    Attributes:
      name: its registry name.
      task: what is predicted.
      clips: all clips of the protocol, in a stable order.
      folds: official folds, or () where the protocol makes them from the clips.
      rejected: (clip id, reason) of rows without a usable clip.
      overlapping: whether official folds test some clips twice. Then `protocol.only` must choose one; results of
        several are never pooled.
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
    """Makes a data set of the usable clips and rejects the others with a reason.

    Args:
      name: registry name of the data set.
      clips: all its clips.
      reasons: id → why a clip cannot be used, in addition to those known to be broken (`avjax.datasets.metadata`).
      lacking: error message if there is no clip.
      kind: kind of the task.

    Raises:
      AvjaxError: there is no clip, or none can be used.
    """
    facts = metadata(name)
    kept: dict[str, Clip] = {}
    rejected = []
    for clip in clips:
        twice = "duplicate clip id: another file has this name" if clip.id in kept else ""
        if reason := twice or facts.broken.get(clip.id) or reasons.get(clip.id) or clip.trouble():
            rejected.append((clip.id, reason))
        else:
            kept[clip.id] = clip
    if not kept:
        why = f"none of {len(rejected)} clips can be used; the first: {': '.join(rejected[0])}" if rejected else lacking
        raise AvjaxError(f"{why}; set --config.data.root to the folder of the download")
    return Corpus(name, Task(kind, tuple(facts.classes)), tuple(kept.values()), (), tuple(rejected))

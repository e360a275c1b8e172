"""How a configuration says which tables there are and what is to be read out of them, in plain values."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from avjax.datasets import labels
from avjax.errors import AvjaxError
from avjax.features import store as stores
from avjax.features.tables import mmsa, mosei, openface
from avjax.utils import tables

STREAMS = (*stores.STREAMS, "text")
FACTS = ("label", "id", "speaker", "gender", "transcript", "split", "fold", "dialogue", "turn")


@dataclasses.dataclass(frozen=True)
class Format:
    """What is read otherwise than its ending says.

    Attributes:
      read: path → columns, or of a file per clip arrays by name.
      mask: the column that says which of a row's steps there are, "" for none; beside: other files of its folder that
        it may read, too.
    """

    read: Callable[[Path], Mapping[str, Sequence]] | None = None
    mask: str = ""
    beside: tuple[str, ...] = ()


FORMATS = {
    "": Format(),
    "mmsa": Format(mmsa.mmsa),
    "mosei": Format(mosei.read, beside=mosei.BESIDE),
    "openface": Format(openface.openface, mask="mask"),
}


@dataclasses.dataclass(frozen=True)
class File:
    """One table, or one for each split, or one file for each clip.

    Attributes:
      path: below the data root. `{split}` in it stands for each word of `Description.splits`; `#a/b` at its end goes to
        the entry b of the entry a of a pickle or an HDF5 file. `{key}` stands for the key of a clip that has the file
        to itself: a table whose rows are steps, arrays by name, an .npy (column "value"), or a folder of one for each
        frame. Such a file that cannot be read rejects its clip.
      format: one of `FORMATS`, or "" where the ending says it.
      key: the column of the rows' keys; or "file:column" of another file with as many rows in the same order; or "*"
        where the names in the file are the keys, each with an array (column "value") or with arrays by name; or ""
        where the rows' numbers from 0 are the keys, "train-0" with splits.
      pattern: a regular expression; its first group is the key.
      header: whether the first line of a CSV file names the columns; else these are called "0", "1", ….
      padding: "zeros" where a step of zeros alone is none; "" where every step counts.
      missing: "zeros" where what is no finite number counts as 0; "" where it rejects its row.
      lengths: column → the column of how many of its steps there are; those beyond are none. A mapping, or pairs.
    """

    path: str
    key: str = ""
    pattern: str = ""
    header: bool = True
    padding: str = ""
    format: str = ""
    missing: str = ""
    lengths: Mapping[str, str] | tuple[tuple[str, str], ...] = ()

    @property
    def form(self) -> Format:
        """How it is read."""
        return FORMATS[self.format]

    def keys_of(self) -> str:
        """The other file that has the keys, or ""."""
        return self.key.partition(":")[0] if ":" in self.key else ""


@dataclasses.dataclass(frozen=True)
class Fact:
    """Where something about a clip is found, and how it is read; steps that are not given are left out.

    Attributes:
      of: "file:column", or "key".
      at_least: a number becomes "1" from here on, "0" below.
      pattern: a regular expression for the whole; its first group is taken.
      names: pairs of what is there and what it is called. For the label they give the order of the classes.
    """

    of: str
    at_least: float | None = None
    pattern: str = ""
    names: tuple[tuple[str, str], ...] = ()

    def read(self, value: object) -> tuple[str, str]:
        """The fact, and why there is none ("" if there is)."""
        text = text_of(value)
        if self.at_least is not None:
            number = tables.number(text)
            if not math.isfinite(number):
                return "", f"is {text!r}; expected a number"
            text = str(int(number >= self.at_least))
        if self.pattern:
            match = re.fullmatch(self.pattern, text)
            if not match:
                return "", f"is {text!r}; expected {self.pattern}"
            text = match[1]
        if self.names and text not in (names := dict(self.names)):
            return "", f"is {text!r}; expected one of {', '.join(names)}"
        return (names[text] if self.names else text), ""


@dataclasses.dataclass(frozen=True)
class Description:
    """What is where.

    Attributes:
      files: name → `File`.
      streams: one of `STREAMS` → references that are put side by side: "file:column" or "file:first..last", columns of
        numbers, or arrays (rows, d) of one step or (rows, steps, d).
      facts: one of `FACTS` → `Fact`; `dialogue` and `turn` come together, and either `label` or `targets` is given.
      splits: pairs of the word in file names and train, val or test.
      targets: name → `Fact`, or pairs; numbers instead of `label`.
      task: the task of the targets (`avjax.tasks`): "regression", "multilabel" (1 or 0) or "soft" (proportions or
        votes).
    """

    files: Mapping[str, File]
    streams: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, Fact]
    splits: tuple[tuple[str, str], ...] = ()
    targets: Mapping[str, Fact] = dataclasses.field(default_factory=dict)
    task: str = "regression"

    @classmethod
    def of(cls, plain: Mapping) -> "Description":
        """Checks a description in plain values, such as a part of a configuration.

        Raises:
          AvjaxError: a key or a name in it is unknown or missing.
        """
        try:
            entries = dict(plain)
            files = {name: File(**entry) for name, entry in entries.pop("files").items()}
            facts = {name: Fact(**entry) for name, entry in entries.pop("facts", {}).items()}
            targets = {name: Fact(**entry) for name, entry in dict(entries.pop("targets", {})).items()}
            description = cls(files, dict(entries.pop("streams")), facts, targets=targets, **entries)
        except (TypeError, KeyError) as error:
            raise AvjaxError(f"tables: {error} does not fit; see avjax.features.tables.join.Description") from error
        _known("streams", description.streams, STREAMS)
        _known("facts", facts, FACTS)
        _known("formats", filter(None, (file.format for file in files.values())), [*filter(None, FORMATS)])
        _known("task", [description.task], labels.NUMBERS)
        if ("label" in facts) == bool(targets) or not description.streams:
            raise AvjaxError("tables: expected a stream, and the fact label or targets, not both")
        if ("dialogue" in facts) != ("turn" in facts):
            raise AvjaxError("tables: expected the facts dialogue and turn both or neither")
        if odd := [name for name, file in files.items() if "{key}" in file.path and file.key]:
            raise AvjaxError(f"tables.files.{odd[0]}: has a key, and {{key}} in its path; expected one of both")
        _known("files", [*description.used, *filter(None, map(File.keys_of, files.values()))], files)
        return description

    @property
    def used(self) -> list[str]:
        """The files that streams and facts are read from; an entry that no reference names is not opened."""
        references = [r for each in self.streams.values() for r in each]
        references += [fact.of for fact in (*self.facts.values(), *self.targets.values()) if fact.of != "key"]
        return list(dict.fromkeys(r.partition(":")[0] for r in references))

    def paths(self, name: str) -> dict[str, str]:
        """The paths of a file by their word for the split, "" where there is but one."""
        path = self.files[name].path
        return {word: path.replace("{split}", word) for word, _ in self.splits} if "{split}" in path else {"": path}


def _known(what: str, given: Iterable[str], there: Iterable[str]) -> None:
    if unknown := [name for name in given if name not in there]:
        raise AvjaxError(f"tables.{what}: {', '.join(map(repr, unknown))} is unknown; expected {', '.join(there)}")


def text_of(value: object) -> str:
    """A cell as text: bytes are UTF-8, a whole number has no point."""
    if isinstance(value, bytes):
        return value.decode()
    whole = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value) if whole else value).strip()

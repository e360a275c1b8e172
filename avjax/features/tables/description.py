"""The description of tables in a configuration, in plain values: which files there are and what is read from them."""

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
    """A format of files that their suffix does not determine.

    Attributes:
      read: path → columns, or for a file per clip arrays by name.
      mask: the column that marks the valid steps of a row, "" for none.
      beside: other files of the same folder that it may also read.
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
      path: relative to the data root. `{split}` stands for each word of `Description.splits`; `#a/b` at the end selects
        the entry b of the entry a of a pickle or an HDF5 file. `{key}` stands for the key of a clip with a file of its
        own: a table whose rows are steps, arrays by name, an .npy (column "value"), or a folder with one .npy per
        frame. If such a file cannot be read, its clip is rejected.
      key: the column of the rows' keys; or "file:column" of another file with as many rows in the same order; or "*" if
        the names in the file are the keys, each with an array (column "value") or with arrays by name; or "" if the
        rows' numbers from 0 are the keys, "train-0" with splits.
      pattern: a regular expression; its first group is the key.
      header: whether the first line of a CSV file names the columns; otherwise they are "0", "1", ….
      padding: "zeros" if all-zero steps are padding; "" if every step counts.
      format: one of `FORMATS`, or "" if the suffix determines it.
      missing: "zeros" to replace non-finite numbers by 0; "" to reject their rows.
      lengths: column → the column of its numbers of valid steps; later steps are padding. A mapping, or pairs.
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
        """Returns its format."""
        return FORMATS[self.format]

    def keys_of(self) -> str:
        """Returns the other file that has the keys, or ""."""
        return self.key.partition(":")[0] if ":" in self.key else ""


@dataclasses.dataclass(frozen=True)
class Fact:
    """The source of a fact about a clip, and how it is read; conversions without a setting are skipped.

    Attributes:
      of: "file:column", or "key".
      at_least: a threshold: numbers from it become "1", smaller ones "0".
      pattern: a regular expression for the full text; its first group is used.
      names: pairs (text, name). For the label they determine the order of the classes.
    """

    of: str
    at_least: float | None = None
    pattern: str = ""
    names: tuple[tuple[str, str], ...] = ()

    def read(self, value: object) -> tuple[str, str]:
        """Returns the fact, and why there is none ("" if there is one)."""
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
    """The files and what is read from them.

    Attributes:
      files: name → `File`.
      streams: one of `STREAMS` → references that are concatenated: "file:column" or "file:first..last", columns of
        numbers, or arrays (rows, d) of one step or (rows, steps, d).
      facts: one of `FACTS` → `Fact`; `dialogue` and `turn` come together, and either `label` or `targets` is given.
      splits: pairs of a word in file names and train, val or test.
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
        """Makes a description from plain values, such as a part of a configuration, and checks it.

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
        _check_names("streams", description.streams, STREAMS)
        _check_names("facts", facts, FACTS)
        _check_names("formats", filter(None, (file.format for file in files.values())), [*filter(None, FORMATS)])
        _check_names("task", [description.task], labels.NUMBERS)
        if ("label" in facts) == bool(targets) or not description.streams:
            raise AvjaxError("tables: expected a stream, and the fact label or targets, not both")
        if ("dialogue" in facts) != ("turn" in facts):
            raise AvjaxError("tables: expected the facts dialogue and turn both or neither")
        if wrong := [name for name, file in files.items() if "{key}" in file.path and file.key]:
            raise AvjaxError(f"tables.files.{wrong[0]}: has a key, and {{key}} in its path; expected one of both")
        _check_names("files", [*description.used, *filter(None, map(File.keys_of, files.values()))], files)
        return description

    @property
    def used(self) -> list[str]:
        """Returns the files of streams and facts; files without any reference are not opened."""
        references = [r for each in self.streams.values() for r in each]
        references += [fact.of for fact in (*self.facts.values(), *self.targets.values()) if fact.of != "key"]
        return list(dict.fromkeys(r.partition(":")[0] for r in references))

    def paths(self, name: str) -> dict[str, str]:
        """Returns the paths of a file by the word of their split, "" if there is only one."""
        path = self.files[name].path
        return {word: path.replace("{split}", word) for word, _ in self.splits} if "{split}" in path else {"": path}


def _check_names(what: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    if unknown := [name for name in given if name not in allowed]:
        raise AvjaxError(f"tables.{what}: {', '.join(map(repr, unknown))} is unknown; expected {', '.join(allowed)}")


def text_of(value: object) -> str:
    """Returns a cell as text: bytes are decoded as UTF-8, integers have no decimal point."""
    if isinstance(value, bytes):
        return value.decode()
    integer = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value) if integer else value).strip()

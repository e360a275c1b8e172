r"""Features that somebody else has measured: tables of them → a corpus and one packed preset of the feature store.

A configuration describes them under `tables` (`Description`), in plain values:

    "tables": {
        "files": {"face": {"path": "face.csv", "key": "name"}, "sound": {"path": "sound_{split}.npz", "key": "id"}},
        "streams": {"video": ("face:AU01_r..AU45_c",), "audio": ("sound:mfcc",)},
        "facts": {"label": {"of": "face:emotion"}, "speaker": {"of": "key", "pattern": r"(\d+)_.*"}},
        "splits": (("train", "train"), ("dev", "val"), ("test", "test"))}

`.csv`, `.tsv`, `.txt`, `.npz`, `.h5` and pickles (`avjax.datasets.pickles`) are read. Rows of different files meet by
their keys. What cannot be used is counted and has its reason in `quarantine.csv`.
"""

import csv
import dataclasses
import hashlib
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from avjax import assets
from avjax.datasets import pickles
from avjax.datasets import store as stores
from avjax.datasets.base import Clip, Corpus, Task
from avjax.datasets.folder import SPLITS
from avjax.errors import AvjaxError

CODE_VERSION = 1  # raised when a change of code changes what is packed
STREAMS = (*stores.STREAMS, "text")
TEXT_SOURCE = "given"  # by which `model.text_source` names the stream `text`
FACTS = ("label", "id", "speaker", "gender", "transcript", "split", "fold", "dialogue", "turn")


@dataclasses.dataclass(frozen=True)
class File:
    """One table, or one for each split.

    Attributes:
      path: below the data root. `{split}` in it stands for each word of `Description.splits`; `#a/b` at its end goes to
        the entry b of the entry a of a pickle or an HDF5 file.
      key: the column of the rows' keys; or "file:column" of another file with as many rows in the same order; or "*"
        where the names in the file are the keys, each with an array (column "value") or with arrays by name; or ""
        where the rows' numbers from 0 are the keys, "train-0" with splits.
      pattern: a regular expression; its first group is the key.
      header: whether the first line of a CSV file names the columns; else these are called "0", "1", ….
      padding: "zeros" where a step of zeros alone is none; "" where every step counts.
    """

    path: str
    key: str = ""
    pattern: str = ""
    header: bool = True
    padding: str = ""

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
        text = _text(value)
        if self.at_least is not None:
            number = _number(text)
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
      facts: one of `FACTS` → `Fact`; `label` must be there, `dialogue` and `turn` come together.
      splits: pairs of the word in file names and train, val or test.
    """

    files: Mapping[str, File]
    streams: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, Fact]
    splits: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, plain: Mapping) -> "Description":
        """Checks a description in plain values, such as a part of a configuration.

        Raises:
          AvjaxError: a key or a name in it is unknown or missing.
        """
        try:
            entries = dict(plain)
            files = {name: File(**entry) for name, entry in entries.pop("files").items()}
            facts = {name: Fact(**entry) for name, entry in entries.pop("facts").items()}
            description = cls(files, dict(entries.pop("streams")), facts, **entries)
        except (TypeError, KeyError) as error:
            raise AvjaxError(f"tables: {error} does not fit; see avjax.datasets.tables.Description") from error
        _known("streams", description.streams, STREAMS)
        _known("facts", facts, FACTS)
        if "label" not in facts or ("dialogue" in facts) != ("turn" in facts) or not description.streams:
            raise AvjaxError("tables: expected a stream, the fact label, and dialogue and turn both or neither")
        _known("files", [*description.used, *filter(None, map(File.keys_of, files.values()))], files)
        return description

    @property
    def used(self) -> list[str]:
        """The files that streams and facts are read from; an entry that no reference names is not opened."""
        references = [r for each in self.streams.values() for r in each]
        references += [fact.of for fact in self.facts.values() if fact.of != "key"]
        return list(dict.fromkeys(r.partition(":")[0] for r in references))

    def paths(self, name: str) -> dict[str, str]:
        """The paths of a file by their word for the split, "" where there is but one."""
        path = self.files[name].path
        return {word: path.format(split=word) for word, _ in self.splits} if "{split}" in path else {"": path}


def _known(what: str, given: Iterable[str], there: Iterable[str]) -> None:
    if unknown := [name for name in given if name not in there]:
        raise AvjaxError(f"tables.{what}: {', '.join(map(repr, unknown))} is unknown; expected {', '.join(there)}")


def obtain(config) -> stores.Features:
    """The features that `config.tables` describes; the store is made first, or again where a file has changed.

    Args:
      config: a configuration with `tables`, `dataset` (the store's name), `preset` and `data`.
    Raises:
      AvjaxError: no data are there and no store either, or see `make`.
    """
    place = stores.place(config.dataset, config.data.features)
    root = Path(config.data.root).expanduser() if config.data.root else assets.data_root(config.dataset)
    if root.is_dir():
        make(config.dataset, config.preset, Description.of(config.tables.to_dict()), root, place)
    elif config.data.root or not stores.is_finished(place, config.preset, config.dataset):
        raise AvjaxError(f"{root}: no such folder; set --config.data.root to where the {config.dataset} tables are")
    return stores.load(place, config.preset, config.dataset)


def make(name: str, preset: str, description: Description, root: Path, place: Path) -> None:
    """Packs tables into the feature store at `place`, unless it was made of the same description and files.

    Raises:
      AvjaxError: see `read`; or the store holds another data set or cannot be written.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*(:[a-z0-9_]+)?", name):
        raise AvjaxError(f"dataset is {name!r}; expected small letters, digits and underscores, and perhaps :target")
    with stores.Store(place, name).locked() as store:
        sources = {path: _sha256(root, path) for path in _all_paths(description)}
        about = {"code": CODE_VERSION, "description": dataclasses.asdict(description), "sources": sources}
        recipe = hashlib.sha256(json.dumps([stores.VERSION, about]).encode()).hexdigest()
        if store.is_packed(preset, recipe):
            return
        corpus, steps = read(name, description, root)
        store.write_table("quarantine.csv", ("clip_id", "reason"), corpus.rejected)
        counts = {"used": len(corpus.clips), "quarantined": len(corpus.rejected)} | {
            f"masked_{s}": sum(not (s in each and each[s][1].any()) for each in steps) for s in ("audio", "video")
        }
        made_by = {s: store.record({"feature": s, **about}) for s in description.streams}
        records = map(_example, corpus.clips, steps)
        store.pack(corpus, corpus.clips, preset, records, recipe, {"counts": counts, "rejected": corpus.rejected, "made_by": made_by})


def _all_paths(description: Description) -> list[str]:
    """The files to be read, without the entry in them."""
    names = description.used
    names = [*names, *(other for n in names if (other := description.files[n].keys_of()))]
    return list(dict.fromkeys(p.partition("#")[0] for n in names for p in description.paths(n).values()))


def _sha256(root: Path, path: str) -> str:
    if not (root / path).is_file():
        raise AvjaxError(f"{root / path}: no such file; set --config.data.root to the folder that {path!r} is in")
    with (root / path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# A stream (or a key) → steps (n, d) float32 and their mask (n,).
Steps = dict[str, tuple[np.ndarray, np.ndarray]]


def _example(clip: Clip, steps: Steps) -> dict[str, object]:
    """The record of a clip in the packed view, as `avjax.features.example`, without what only media can tell."""
    streams = {s: steps[s] for s in steps if s != "text"}
    text = {TEXT_SOURCE: steps["text"][0][steps["text"][1]]} if "text" in steps else {}
    return {
        "clip_id": clip.id,
        "label": clip.label,
        "speaker": clip.speaker or "",
        **{s: x for s, (x, _) in streams.items()},
        **{f"{s}_mask": mask for s, (_, mask) in streams.items()},
        "sentence": dict.fromkeys(text, clip.transcript or ""),
        "text": text,
    }


@dataclasses.dataclass(frozen=True)
class _Table:
    """A file that was read: column → one value per row; `row` key → its number; `split` key → its word, if any."""

    columns: Mapping[str, Sequence]
    row: Mapping[str, int]
    split: Mapping[str, str]


def read(name: str, description: Description, root: Path) -> tuple[Corpus, list[Steps]]:
    """Reads all tables and joins their rows.

    A row is rejected with a reason where a stream or the label of its key is missing, a number is not finite, or a fact
    is not as described.

    Returns:
      the corpus (clips in the order of their keys in the files), and the streams of each clip.
    Raises:
      AvjaxError: a file is missing, cannot be read or has no such column, a key stands in it twice, two clips have one
        id or one turn, or no row can be used.
    """
    tables = {n: _table(description, n, root) for n in description.used}
    streams = {s: [(r, _stream(description, tables, r)) for r in each] for s, each in description.streams.items()}
    clips, steps, rejected = [], [], []
    for key in dict.fromkeys(k for table in tables.values() for k in table.row):
        clip, reason = _clip(description, tables, key)
        if not reason:
            made, reason = _steps(streams, key)
        if reason:
            rejected.append((clip.id if clip else key, reason))
        else:
            clips.append(clip)
            steps.append(made)
    if not clips:
        raise AvjaxError(f"{root}: none of {len(rejected)} rows can be used; the first: {': '.join(rejected[0])}")
    _check_unique("id", (c.id for c in clips))
    _check_unique("dialogue and turn", ((c.dialogue, c.turn) for c in clips if c.dialogue))
    classes = tuple(dict.fromkeys(n for _, n in description.facts["label"].names)) or sorted({c.label for c in clips})
    return Corpus(name, Task("single", tuple(classes)), tuple(clips), rejected=tuple(rejected)), steps


def _check_unique(what: str, values: Iterable) -> None:
    if twice := [str(v) for v, n in Counter(values).items() if n > 1]:
        raise AvjaxError(f"{len(twice)} times two clips have one {what}, such as {twice[0]}; each must have its own")


def _clip(description: Description, tables: Mapping[str, _Table], key: str) -> tuple[Clip | None, str]:
    """The clip of a key, or why it cannot be used."""
    facts, reason = _facts(description, tables, key)
    if reason:
        return None, reason
    split, turn = facts["split"], facts.get("turn")
    if not facts["label"]:
        return None, "no label"
    if split and split.lower() not in SPLITS:
        return None, f"split is {split!r}; expected train, val or test"
    if turn and not turn.isdecimal():
        return None, f"turn is {turn!r}; expected a whole number"
    facts |= {"split": SPLITS[split.lower()] if split else None, "turn": int(turn) if turn else None}
    return Clip(path=Path(), **facts), ""


def _facts(description: Description, tables: Mapping[str, _Table], key: str) -> tuple[dict[str, str | None], str]:
    """What is known of a key, None where a cell is empty, and why something cannot be known ("" if all can)."""
    words = {t.split[key] for t in tables.values() if key in t.split}
    if len(words) > 1:
        return {}, f"is in the splits {' and '.join(sorted(words))}"
    facts = {"id": key, "split": dict(description.splits)[words.pop()] if words else None}
    for name, fact in description.facts.items():
        value, reason = _fact(fact, tables, key)
        if reason:
            return {}, f"{name} {reason}"
        facts[name] = value or None
    return facts, ""


def _fact(fact: Fact, tables: Mapping[str, _Table], key: str) -> tuple[str, str]:
    if fact.of == "key":
        return fact.read(key)
    file, _, column = fact.of.partition(":")
    values, row = _column(tables[file].columns, file, column), tables[file].row.get(key)
    return ("", f"has no row in {file}") if row is None else fact.read(values[row])


def _steps(streams: Mapping[str, Sequence[tuple[str, Steps]]], key: str) -> tuple[Steps, str]:
    """The streams of a key, or why it cannot be used."""
    steps = {}
    for name, parts in streams.items():
        if lacking := [reference for reference, rows in parts if key not in rows]:
            return {}, f"{name} has no row in {', '.join(lacking)}"
        read = [rows[key] for _, rows in parts]
        if len({len(x) for x, _ in read}) > 1:
            counts = ", ".join(f"{len(x)} in {reference}" for (reference, _), (x, _) in zip(parts, read, strict=True))
            return {}, f"{name} has {counts} steps; expected as many in each"
        x, mask = np.concatenate([x for x, _ in read], -1), np.all([mask for _, mask in read], 0)
        if bad := np.count_nonzero(~np.isfinite(x)):
            return {}, f"{name} has {bad} values that are no finite numbers"
        steps[name] = np.where(mask[:, None], x, 0), mask
    return steps, ""


def _stream(description: Description, tables: Mapping[str, _Table], reference: str) -> Steps:
    """What a reference names: key → steps and their mask."""
    file, _, columns = reference.partition(":")
    table, zeros = tables[file], description.files[file].padding == "zeros"
    try:
        picked = [_numbers(table.columns[c]) for c in _range(table.columns, file, columns)]
    except (TypeError, ValueError) as error:
        raise AvjaxError(f"{reference}: {error}; expected numbers") from error
    if all(np.ndim(c[0]) == 0 for c in picked):
        picked = [np.stack(picked, -1)]
    rows = [np.concatenate([np.atleast_2d(c[i]) for c in picked], -1) for i in range(len(picked[0]))]
    if len(shapes := {(x.ndim, x.shape[-1]) for x in rows}) > 1 or shapes.pop()[0] != 2:
        raise AvjaxError(f"{reference}: rows such as {rows[0].shape}; expected (d,) or (steps, d) with one d")
    return {k: (rows[i], rows[i].any(-1) if zeros else np.ones(len(rows[i]), bool)) for k, i in table.row.items()}


def _range(columns: Mapping[str, Sequence], file: str, reference: str) -> list[str]:
    """The names from `first` to `last` in "first..last", or the one name."""
    first, _, last = reference.partition("..")
    for name in filter(None, (first, last)):
        _column(columns, file, name)
    names = list(columns)
    return names[names.index(first) : names.index(last or first) + 1]


def _column(columns: Mapping[str, Sequence], file: str, name: str) -> Sequence:
    if name not in columns:
        some = ", ".join(list(columns)[:8]) + (", …" if len(columns) > 8 else "")
        raise AvjaxError(f"tables: no column {name!r} in {file}; it has {some}")
    return columns[name]


def _numbers(column: Sequence) -> Sequence[np.ndarray]:
    """Rows as float32; text that is no number, and what is too large for one, is not finite."""
    with np.errstate(over="ignore"):
        if all(isinstance(v, str) for v in column):
            return np.array([_number(v) for v in column]).astype(np.float32)
        if len({np.shape(v) for v in column}) == 1:
            return np.asarray(column).astype(np.float32, casting="same_kind")
        return [np.asarray(v).astype(np.float32, casting="same_kind") for v in column]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode()
    whole = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value) if whole else value).strip()


def _table(description: Description, name: str, root: Path) -> _Table:
    """Reads a file, or its files for all splits, and gives its rows their keys."""
    file = description.files[name]
    columns, words = _columns(description, name, root)
    own = words
    if other := file.keys_of():
        others, own = _columns(description, other, root)
        keys = _column(others, other, file.key.partition(":")[2])
    elif file.key:
        keys = _column(columns, name, file.key)
    else:
        keys = [f"{word}-{i}".strip("-") for word in dict.fromkeys(words) for i in range(words.count(word))]
    if own != words:
        raise AvjaxError(
            f"{name}: rows {dict(Counter(words))}, but {dict(Counter(own))} in {file.key}; expected as many"
        )
    keys = [_key(name, file.pattern, _text(key)) for key in keys]
    if twice := [k for k, n in Counter(keys).items() if n > 1]:
        raise AvjaxError(f"{name}: {len(twice)} keys stand there twice, such as {twice[0]!r}; expected each once")
    return _Table(columns, {k: i for i, k in enumerate(keys)}, {k: w for k, w in zip(keys, words, strict=True) if w})


def _key(name: str, pattern: str, text: str) -> str:
    match = re.fullmatch(pattern or "(.+)", text)
    if not match:
        raise AvjaxError(f"{name}: {text!r} is no key; expected {pattern or 'a name in every row'}")
    return match[1]


def _columns(description: Description, name: str, root: Path) -> tuple[dict[str, Sequence], list[str]]:
    """The columns of a file, those of all splits one after the other, and each row's word for its split."""
    file = description.files[name]
    parts = {word: _read(root, path, file) for word, path in description.paths(name).items()}
    first = next(iter(parts.values()))
    counts = {word: len(next(iter(part.values()), ())) for word, part in parts.items()}
    for word, part in parts.items():
        if list(part) != list(first):
            raise AvjaxError(f"{name}: its files do not have the same columns ({word}: {', '.join(list(part)[:8])})")
    if not (words := [word for word, count in counts.items() for _ in range(count)]):
        raise AvjaxError(f"{name}: no rows in {', '.join(description.paths(name).values())}")
    return {c: [row for part in parts.values() for row in part[c]] for c in first}, words


def _read(root: Path, path: str, file: File) -> dict[str, Sequence]:
    """Column → one value per row of one file."""
    place, entry = root / path.partition("#")[0], path.partition("#")[2]
    if place.suffix in (".csv", ".tsv", ".txt"):
        return _read_csv(place, file.header)
    if place.suffix not in _READERS:
        raise AvjaxError(f"{place}: expected .csv, .tsv, .txt, {', '.join(_READERS)}")
    value = _READERS[place.suffix](place)
    for name in filter(None, entry.split("/")):
        if not isinstance(value, Mapping) or name not in value:
            raise AvjaxError(f"{place}: no entry {name!r} in it")
        value = value[name]
    if not isinstance(value, Mapping):
        raise AvjaxError(f"{place}: holds {type(value).__name__}; expected arrays by name")
    columns = _by_name(place, value) if file.key == "*" else dict(value)
    if len(lengths := {len(c) if isinstance(c, list) or np.ndim(c) else -1 for c in columns.values()}) > 1:
        raise AvjaxError(f"{place}: arrays of {', '.join(map(str, sorted(lengths)))} rows; expected as many in each")
    return columns


def _by_name(place: Path, value: Mapping[str, object]) -> dict[str, list]:
    """The columns of a file whose names are the keys, "*" among them."""
    rows = [row if isinstance(row, Mapping) else {"value": row} for row in value.values()]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise AvjaxError(f"{place}: its entries do not all have {', '.join(map(str, rows[0]))}")
    return {"*": list(value)} | {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def _read_csv(path: Path, header: bool) -> dict[str, Sequence[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            rows = [row for row in csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise AvjaxError(f"{path}: {error}; expected a table in UTF-8, its cells separated by , ; or tabs") from error
    if not rows:
        raise AvjaxError(f"{path}: is empty")
    names = [n.strip() for n in rows.pop(0)] if header else [str(i) for i in range(len(rows[0]))]
    if len(set(names)) < len(names):
        raise AvjaxError(f"{path}: two columns have one name; set header to False if it has no names")
    for number, row in enumerate(rows, 1 + header):
        if len(row) != len(names):
            raise AvjaxError(f"{path}, row {number}: {len(row)} cells; expected {len(names)}")
    return dict(zip(names, zip(*rows, strict=True) if rows else [()] * len(names), strict=True))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise AvjaxError(f"{path}: {error}; expected an .npz of numbers and text") from error


def _read_h5(path: Path) -> dict[str, object]:
    import h5py

    def plain(group) -> dict[str, object]:
        return {name: plain(item) if isinstance(item, h5py.Group) else item[()] for name, item in group.items()}

    try:
        with h5py.File(path) as file:
            return plain(file)
    except (OSError, KeyError) as error:
        raise AvjaxError(f"{path}: {error}; expected an HDF5 file") from error


_READERS = {".npz": _read_npz, ".h5": _read_h5, ".pkl": pickles.load}

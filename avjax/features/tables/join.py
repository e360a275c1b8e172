r"""Precomputed features: tables → a corpus and one packed preset of the feature store.

A configuration describes them under `tables` (`Description`), in plain values:

    "tables": {
        "files": {"face": {"path": "face.csv", "key": "name"}, "voice": {"path": "voice_{split}.npz", "key": "id"}},
        "streams": {"video": ("face:AU01_r..AU45_c",), "audio": ("voice:mfcc",)},
        "facts": {"label": {"of": "face:emotion"}, "speaker": {"of": "key", "pattern": r"(\d+)_.*"}},
        "splits": (("train", "train"), ("dev", "val"), ("test", "test"))}

All options: `avjax.features.tables.description`. File types: `avjax.features.tables.readers`; published formats:
`openface`, `mmsa` and `mosei` beside it. Rows of different files are joined by their keys. Rejected rows are counted
and listed with reasons in `quarantine.csv`.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from avjax.datasets import labels
from avjax.datasets.base import Clip, Corpus, Task
from avjax.datasets.folder import SPLITS
from avjax.datasets.folds import repeated
from avjax.errors import AvjaxError
from avjax.features import store as stores
from avjax.features import tfds
from avjax.features.tables import readers
from avjax.features.tables.description import FORMATS, Description, Fact, File, Format, text_of
from avjax.settings import Settings
from avjax.utils import paths as assets
from avjax.utils.storage import sha256
from avjax.utils.tables import number

CODE_VERSION = 1  # incremented when a change of code changes what is packed
TEXT_SOURCE = "given"  # the name of the stream `text` for `model.text_source`


def obtain(settings: Settings) -> stores.Features:
    """Loads the features that `tables` describes; makes the store first, or again if a file has changed.

    Raises:
      AvjaxError: there are neither data nor a store, or see `make`.
    """
    store = stores.path_of(settings.dataset, settings.data.features)
    root = assets.data_root(settings.dataset, settings.data.root)
    if root.is_dir():
        make(settings.dataset, settings.preset, Description.of(settings.tables), root, store)
    elif settings.data.root or not stores.is_finished(store, settings.preset, settings.dataset):
        raise AvjaxError(f"{root}: no such folder; set --config.data.root to where the {settings.dataset} tables are")
    return stores.load(store, settings.preset, settings.dataset)


def make(name: str, preset: str, description: Description, root: Path, folder: Path) -> None:
    """Packs tables into the feature store at `folder`, unless it was made from the same description and files.

    Raises:
      AvjaxError: see `read`; or the store holds another data set or cannot be written.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*(:[a-z0-9_]+)?", name):
        raise AvjaxError(f"dataset is {name!r}; expected small letters, digits and underscores, and perhaps :target")
    with stores.Store(folder, name).locked() as store:
        sources = {path: _sha256(root, path) for path in _all_paths(description, root)}
        inputs = {"code": CODE_VERSION, "description": dataclasses.asdict(description), "sources": sources}
        recipe = hashlib.sha256(json.dumps([tfds.VERSION, inputs]).encode()).hexdigest()
        if store.is_packed(preset, recipe):
            return
        corpus, steps = read(name, description, root)
        store.write_table("quarantine.csv", ("clip_id", "reason"), corpus.rejected)
        made_by = {s: store.record({"feature": s, **inputs}) for s in description.streams}
        parts = [lambda: map(_example, corpus.clips, steps)]
        store.pack(corpus, corpus.clips, preset, parts, recipe, {"rejected": corpus.rejected, "made_by": made_by})


def _all_paths(description: Description, root: Path) -> list[str]:
    """Returns the files to be read, without entries in them."""
    names = description.used
    names = [*names, *(other for n in names if (other := description.files[n].keys_of()))]
    paths = dict.fromkeys(
        path_read
        for name in names
        for path in description.paths(name).values()
        for path_read in _read_for(root, path.partition("#")[0], description.files[name].form)
    )
    return list(paths)


def _read_for(root: Path, path: str, form: Format) -> list[str]:
    """Returns the files that are read for a path of a description."""
    if "{key}" in path:
        return _of_clips(root, path)
    beside = [Path(path).with_name(name).as_posix() for name in form.beside]
    return [path, *(other for other in beside if (root / other).is_file())]


def _of_clips(root: Path, pattern: str) -> list[str]:
    paths = [path for path in readers.each(root, pattern).values() if readers.inside(root, path)]
    return [file.relative_to(root).as_posix() for path in paths for file in readers.files_of(path)]


def _sha256(root: Path, path: str) -> str:
    if not (root / path).is_file():
        raise AvjaxError(f"{root / path}: no such file; set --config.data.root to the folder that {path!r} is in")
    return sha256(root / path)


# A stream (or a key) → steps (n, d) float32 and their mask (n,).
Steps = dict[str, tuple[np.ndarray, np.ndarray]]
# (path, format, header) → the content of a file.
Load = Callable[[Path, str, bool], object]


def _example(clip: Clip, steps: Steps) -> dict[str, object]:
    """Makes the record of a clip in the packed view, as `avjax.features.clip.example` without media measurements."""
    streams = {s: steps[s] for s in steps if s != "text"}
    text = {TEXT_SOURCE: steps["text"][0][steps["text"][1]]} if "text" in steps else {}
    return {
        "clip_id": clip.id,
        "label": clip.label if isinstance(clip.label, str) else np.array(clip.label, np.float32),
        "speaker": clip.speaker or "",
        **{s: x for s, (x, _) in streams.items()},
        **{f"{s}_mask": mask for s, (_, mask) in streams.items()},
        "sentence": dict.fromkeys(text, clip.transcript or ""),
        "text": text,
    }


@dataclasses.dataclass(frozen=True)
class _Table:
    """The rows of a file, or of one file per clip.

    Attributes:
      columns: column → one value per row.
      row: key → its row number.
      split: key → the word of its split, if any.
      broken: key → why its file cannot be read.
    """

    columns: Mapping[str, Sequence]
    row: Mapping[str, int]
    split: Mapping[str, str]
    broken: Mapping[str, str]


def read(name: str, description: Description, root: Path) -> tuple[Corpus, list[Steps]]:
    """Reads all tables and joins their rows.

    A row is rejected with a reason if a stream or the label of its key is missing, a number is not finite, a fact does
    not fit its description, or its own file cannot be read.

    Returns:
      the corpus (clips in the order of their keys in the files), and the streams of each clip.

    Raises:
      AvjaxError: a file is missing, cannot be read or lacks a column, a key occurs in it twice, two clips have the same
        id or the same turn, or no row can be used.
    """
    load = functools.cache(_load)
    tables = {n: _table(description, n, root, load) for n in description.used}
    streams = {s: [_stream(description, tables, r) for r in each] for s, each in description.streams.items()}
    clips, steps, rejected = [], [], []
    for key in dict.fromkeys(k for table in tables.values() for k in (*table.row, *table.broken)):
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
    return Corpus(name, _task(description, clips), tuple(clips), rejected=tuple(rejected)), steps


def _task(description: Description, clips: Sequence[Clip]) -> Task:
    if description.targets:
        return Task(description.task, tuple(description.targets))
    named = tuple(dict.fromkeys(name for _, name in description.facts["label"].names))
    return Task("single", named or tuple(sorted({c.label for c in clips})))


def _check_unique(what: str, values: Iterable) -> None:
    if twice := repeated(values):
        raise AvjaxError(f"{len(twice)} times two clips have one {what}, such as {twice[0]}; each must have its own")


def _clip(description: Description, tables: Mapping[str, _Table], key: str) -> tuple[Clip | None, str]:
    """Returns the clip of a key, or why it cannot be used."""
    if broken := [table.broken[key] for table in tables.values() if key in table.broken]:
        return None, broken[0]
    facts, reason = _facts(description, tables, key)
    if not reason and description.targets:
        facts["label"], reason = _targets(description, tables, key)
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


def _targets(description: Description, tables: Mapping[str, _Table], key: str) -> tuple[tuple[float, ...], str]:
    targets = {name: _fact(fact, tables, key) for name, fact in description.targets.items()}
    if reasons := [f"{name} {reason}" for name, (_, reason) in targets.items() if reason]:
        return (), reasons[0]
    return labels.numbers(description.task, {name: text for name, (text, _) in targets.items()})


def _facts(description: Description, tables: Mapping[str, _Table], key: str) -> tuple[dict[str, object], str]:
    """Returns the facts of a key, None for empty cells, and why one of them cannot be read ("" if all can)."""
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


@dataclasses.dataclass(frozen=True)
class _Stream:
    """A `reference` to columns `picked` of a table, which are concatenated row by row on demand."""

    reference: str
    file: File
    table: _Table
    picked: Sequence[Sequence[np.ndarray]]
    count: Sequence[int] | None  # steps of each row, or None for all
    valid: Sequence[np.ndarray] | None  # which steps of each row there are, or None for all

    def row(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps (n, d) of a key and their mask."""
        at = self.table.row[key]
        parts = [np.atleast_2d(column[at]) for column in self.picked]
        x = parts[0] if len(parts) == 1 else np.concatenate(parts, -1)
        if self.count is not None:
            x = x[: self.count[at]]
        if self.file.missing == "zeros":
            x = np.where(np.isfinite(x), x, 0)
        if self.valid is not None:
            return x, self.valid[at]
        return x, x.any(-1) if self.file.padding == "zeros" else np.ones(len(x), bool)


def _steps(streams: Mapping[str, Sequence[_Stream]], key: str) -> tuple[Steps, str]:
    """Returns the streams of a key, or why it cannot be used."""
    steps = {}
    for name, parts in streams.items():
        if lacking := [part.reference for part in parts if key not in part.table.row]:
            return {}, f"{name} has no row in {', '.join(lacking)}"
        read = [part.row(key) for part in parts]
        if len({len(x) for x, _ in read}) > 1:
            counts = ", ".join(f"{len(x)} in {part.reference}" for part, (x, _) in zip(parts, read, strict=True))
            return {}, f"{name} has {counts} steps; expected as many in each"
        x, mask = np.concatenate([x for x, _ in read], -1), np.all([mask for _, mask in read], 0)
        if bad := np.count_nonzero(~np.isfinite(x)):
            return {}, f"{name} has {bad} values that are no finite numbers"
        steps[name] = np.where(mask[:, None], x, 0), mask
    return steps, "" if any(mask.any() for _, mask in steps.values()) else "no stream has a step"


def _stream(description: Description, tables: Mapping[str, _Table], reference: str) -> _Stream:
    name, _, columns = reference.partition(":")
    file, table = description.files[name], tables[name]
    names = _range(table.columns, name, columns)
    try:
        picked = [_numbers(table.columns[c]) for c in names]
    except (TypeError, ValueError) as error:
        raise AvjaxError(f"{reference}: {error}; expected numbers") from error
    if all(np.ndim(c[0]) == 0 for c in picked):
        picked = [np.stack(picked, -1)]
    for column in picked:
        forms = {(max(np.ndim(x), 1), np.shape(x)[-1] if np.ndim(x) else 1) for x in column}
        if len({width for _, width in forms}) > 1 or any(dims > 2 for dims, _ in forms):
            raise AvjaxError(f"{reference}: rows such as {np.shape(column[0])}; expected (d,) or (steps, d) with one d")
    lengths = [length for c, length in dict(file.lengths).items() if c in names]
    count = _counts(reference, _column(table.columns, name, lengths[0])) if lengths else None
    mask = file.form.mask
    return _Stream(reference, file, table, picked, count, table.columns[mask] if mask else None)


def _counts(reference: str, column: Sequence) -> list[int]:
    counts = [text_of(value) for value in column]
    if odd := [text for text in counts if not text.isdecimal()]:
        raise AvjaxError(f"{reference}: a length of {odd[0]!r} steps; expected whole numbers")
    return list(map(int, counts))


def _range(columns: Mapping[str, Sequence], file: str, reference: str) -> list[str]:
    """Returns the names from `first` to `last` in "first..last", or the single name."""
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
    """Converts rows to float32, without a copy if they are; text that is no number, and overflows, are not finite."""
    with np.errstate(over="ignore"):
        if all(isinstance(v, str) for v in column):
            return np.array([number(v) for v in column]).astype(np.float32)
        rows = [np.asarray(v).astype(np.float32, casting="same_kind", copy=False) for v in column]
        return rows if rows[0].ndim else np.stack(rows)


def _table(description: Description, name: str, root: Path, load: Load) -> _Table:
    """Reads a file, or its files for all splits, and assigns the keys of its rows."""
    file = description.files[name]
    columns, words, keys, broken = _columns(description, name, root, load)
    own = words
    if other := file.keys_of():
        others, own, *_ = _columns(description, other, root, load)
        keys = _column(others, other, file.key.partition(":")[2])
    elif file.key:
        keys = _column(columns, name, file.key)
    if own != words:
        raise AvjaxError(
            f"{name}: rows {dict(Counter(words))}, but {dict(Counter(own))} in {file.key}; expected as many"
        )
    keys = [_key(name, file.pattern, text_of(key)) for key in keys]
    if twice := repeated(keys):
        raise AvjaxError(f"{name}: {len(twice)} keys stand there twice, such as {twice[0]!r}; expected each once")
    split = {k: w for k, w in zip(keys, words, strict=True) if w}
    broken = {_key(name, file.pattern, key): reason for key, reason in broken.items()}
    return _Table(columns, {k: i for i, k in enumerate(keys)}, split, broken)


def _key(name: str, pattern: str, text: str) -> str:
    match = re.fullmatch(pattern or "(.+)", text)
    if not match:
        raise AvjaxError(f"{name}: {text!r} is no key; expected {pattern or 'a name in every row'}")
    return match[1]


# The columns of a file, each row's word for its split, the rows' own keys, and key → why its file cannot be read.
Rows = tuple[dict[str, Sequence], list[str], list[str], dict[str, str]]


def _columns(description: Description, name: str, root: Path, load: Load) -> Rows:
    """Reads the columns of a file, those of all splits concatenated."""
    file, paths = description.files[name], description.paths(name)
    per_split = "{key}" not in file.path
    broken: dict[str, str] = {}
    parts = {
        w: _read_columns(root, p, file, load) if per_split else _clips(root, p, file, load, broken)
        for w, p in paths.items()
    }
    first = next(iter(parts.values()))
    for word, part in parts.items():
        if list(part) != list(first):
            raise AvjaxError(f"{name}: its files do not have the same columns ({word}: {', '.join(list(part)[:8])})")
    counts = {word: len(next(iter(part.values()), ())) for word, part in parts.items()}
    if not (words := [word for word, count in counts.items() for _ in range(count)]):
        raise AvjaxError(f"{name}: no rows in {', '.join(paths.values())}")
    columns = {c: [row for part in parts.values() for row in part[c]] for c in first}
    numbered = [f"{word}-{i}".strip("-") for word, count in counts.items() for i in range(count)]
    return columns, words, numbered if per_split else columns["*"], broken


def _load(path: Path, form: str, header: bool) -> object:
    return FORMATS[form].read(path) if form else readers.load(path, header)


def _read_columns(root: Path, path: str, file: File, load: Load) -> dict[str, Sequence]:
    """Reads one file: column → one value per row."""
    path, _, entry = path.partition("#")
    location = root / path
    value = readers.entry(location, load(location, file.format, file.header), entry)
    columns = _by_name(location, value) if file.key == "*" else dict(value)
    if len(lengths := {len(c) if isinstance(c, list | tuple) or np.ndim(c) else -1 for c in columns.values()}) > 1:
        raise AvjaxError(f"{location}: arrays of {', '.join(map(str, sorted(lengths)))} rows; expected as many in each")
    return columns


def _by_name(path: Path, value: Mapping[str, object]) -> dict[str, list]:
    """Returns the columns of a file whose names are the keys, with the keys as column "*"."""
    rows = [row if isinstance(row, Mapping) else {"value": row} for row in value.values()]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise AvjaxError(f"{path}: its entries do not all have {', '.join(map(str, rows[0]))}")
    return {"*": list(value)} | {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def _clips(root: Path, path: str, file: File, load: Load, broken: dict[str, str]) -> dict[str, list]:
    """Reads the columns of one file per clip, "*" for the keys; adds unreadable files to `broken`."""
    path, _, entry = path.partition("#")
    rows = {}
    for key, location in readers.each(root, path).items():
        try:
            if not readers.inside(root, location):
                raise AvjaxError(f"{location}: lies outside the data folder")
            value = readers.entry(location, load(location, file.format, file.header), entry)
            rows[key] = {name: _of_steps(column) for name, column in value.items()}
        except AvjaxError as error:
            broken[key] = str(error)
    if not rows:
        raise AvjaxError(f"{root / path}: {next(iter(broken.values()), 'no such file')}")
    forms = {key: [(name, np.ndim(v), np.shape(v)[1:]) for name, v in row.items()] for key, row in rows.items()}
    usual = Counter(map(tuple, forms.values())).most_common(1)[0][0]
    for key in [key for key in rows if tuple(forms[key]) != usual]:
        broken[key] = f"{path.replace('{key}', key)}: holds other columns or widths than the most of these files"
        del rows[key]
    return {"*": list(rows)} | {name: [row[name] for row in rows.values()] for name, *_ in usual}


def _of_steps(column: object) -> object:
    """Converts the texts of a table whose rows are steps to numbers (steps, 1)."""
    texts = isinstance(column, tuple)
    return np.array([number(text) for text in column], np.float32)[:, None] if texts else column

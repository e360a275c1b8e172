"""The feature store: one staged file per clip and feature, and the TFDS view that is packed from them.

    F/scratch/                            spools of images for the encoders; removed afterwards
    F/staged/<clip>/<feature>-<key>.npz   key = hash of how the feature was made; only replaced as a whole
    F/provenance/<key>.json               the record behind that hash
    F/sentences.csv                       the sentences, to be read and edited
    F/quarantine.csv                      clip_id,reason
    F/tfds/avjax_<dataset>/<preset>/      the packed view (array_record; no TensorFlow)
    F/index.json                          written last: a store without it is unfinished; index-<target>.json for
                                          other labels of the same clips (`crema_d:crowd`), which share staged features

Every file is written to a temporary name and renamed, so a killed run leaves no partial file.
"""

import contextlib
import csv
import dataclasses
import hashlib
import json
import shutil
import tempfile
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from avjax import tasks
from avjax.datasets.base import Clip, Corpus, Fold, Task
from avjax.datasets.metadata import corpus as corpus_of
from avjax.datasets.metadata import target as target_of
from avjax.errors import AvjaxError
from avjax.features import tfds
from avjax.features.provenance import Key
from avjax.utils import paths, storage, tables
from avjax.utils.storage import is_local, only_writer, read_json, replacing, write_text

STREAMS = ("video", "flow", "audio")  # flow if the preset has it
_PARTS = ("train", "test", "val")
_INDEXED = ("id", "label", "speaker", "transcript", "split", "fold", "dialogue", "turn", "gender")


@dataclasses.dataclass(frozen=True)
class Features:
    """All features of a data set, padded to its longest clip.

    Attributes:
      dataset, classes, folds: as in the index.
      content: hash of all packed values.
      task: kind of task (`avjax.tasks`).
      ids, clips, label, speakers: one entry per used clip; `label` as `tasks.encoded`; an unknown speaker is "".
      arrays: `video`, `audio`, `flow` if present, `text_<source>` → (n, steps, d) float32, zeros where masked; `video`
        may be images, (n, steps, h, w, 3) uint8, and a text token ids, (n, steps, 1) int32; `surface` with one step, if
        the clips themselves were measured.
      masks: the same names → (n, steps) bool.
      sentences: text source → n strings.
      counts: used, quarantined, masked_audio, masked_video.
      made_by: feature → key of its provenance record.
      random: whether encoders had random weights, so that scores are meaningless.
      constants: batch key → array of the data set as a whole, such as the texts of the classes.
      packed: root, data set and preset of the view, if the arrays are left on disk (`arrays` is then empty).
      rejected: (clip id, reason) of clips that are not used.
    """

    dataset: str
    classes: tuple[str, ...]
    folds: tuple[Fold, ...]
    content: str
    ids: list[str]
    clips: list[Clip]
    label: np.ndarray
    speakers: list[str]
    arrays: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    sentences: dict[str, list[str]]
    counts: dict[str, int]
    made_by: dict[str, str]
    random: bool = False
    task: str = "single"
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    packed: tuple[Path, str, str] | None = None
    rejected: tuple[tuple[str, str], ...] = ()


class Store:
    """A feature store at `root`, for writing data set `dataset` (whose target determines the index)."""

    def __init__(self, root: Path, dataset: str = "") -> None:
        self.root = root
        self.dataset = dataset
        # For measured inputs that are not encoded yet: always on this machine, since they are memory-mapped.
        self.scratch = root / "scratch" if is_local(root) else _scratch(root)

    @contextlib.contextmanager
    def locked(self) -> Iterator["Store"]:
        """Locks the store for one writer, and removes what killed writers left.

        Raises:
          AvjaxError: another process is writing to it, it holds another data set, or it cannot be written.
        """
        with only_writer(self.root, "choose another --out"):
            datasets = {read_json(path)["dataset"] for path in self.root.glob("index*.json")}
            if other := [name for name in sorted(datasets) if corpus_of(name) != corpus_of(self.dataset)]:
                raise AvjaxError(f"{self.root}: holds features of {other[0]}, not {self.dataset}; use another --out")
            self._sweep()
            try:
                yield self
            finally:
                self._sweep()

    def _sweep(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        for unfinished in self.root.glob(f"tfds/*/*/*{tfds.UNFINISHED}*"):
            shutil.rmtree(unfinished)

    def _staged(self, clip_id: str, feature: str, key: Key) -> Path:
        return self.root / "staged" / safe_name(clip_id) / f"{feature}-{key}.npz"

    def has(self, clip_id: str, feature: str, key: Key) -> bool:
        """Returns whether a feature of a clip is staged."""
        return self._staged(clip_id, feature, key).is_file()

    def put(self, clip_id: str, feature: str, key: Key, arrays: Mapping[str, np.ndarray]) -> None:
        """Stages one feature of one clip; a reader sees all of it or nothing.

        Raises:
          AvjaxError: it cannot be written: the disk is full, or permission is denied.
        """
        try:
            with replacing(self._staged(clip_id, feature, key), "wb") as file:
                np.savez(file, **arrays)
        except OSError as error:
            raise AvjaxError(f"{self.root}: cannot be written ({error.strerror}); fix that and start again") from error

    def drop(self, clip_id: str, feature: str, key: Key) -> None:
        """Removes a staged feature, if it exists."""
        self._staged(clip_id, feature, key).unlink(missing_ok=True)

    def get(self, clip_id: str, feature: str, key: Key, *names: str) -> dict[str, np.ndarray]:
        """Reads the arrays `names` of a staged feature, by default all."""
        with self._staged(clip_id, feature, key).open("rb") as raw, np.load(raw) as file:
            return {name: file[name] for name in names or file.files}

    def record(self, provenance: Mapping[str, object]) -> str:
        """Stores a provenance record and returns its key."""
        text = json.dumps(provenance, indent=1, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = self.root / "provenance" / f"{key}.json"
        if not path.exists():
            write_text(path, text)
        return key

    def note(self, key: str, measurements: Mapping[str, object]) -> None:
        """Adds measurements of features to their provenance record."""
        path = self.root / "provenance" / f"{key}.json"
        write_text(path, json.dumps(read_json(path) | {"measured": measurements}, indent=1, sort_keys=True))

    def noted(self, key: str) -> bool:
        """Returns whether `note` was called for the provenance record."""
        return "measured" in read_json(self.root / "provenance" / f"{key}.json")

    def write_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Writes a CSV file of the store as a whole."""
        with replacing(self.root / name, "w") as file:
            csv.writer(file).writerows([columns, *rows])

    def read_table(self, name: str, columns: Sequence[str]) -> list[dict[str, str]]:
        """Reads a CSV file of the store; [] if it does not exist yet.

        Raises:
          AvjaxError: it is not UTF-8, as some spreadsheet programs save it, or lacks one of `columns`.
        """
        path = self.root / name
        return tables.read(path, columns, cell=str) if path.is_file() else []

    def is_packed(self, preset: str, recipe: str) -> bool:
        """Returns whether the packed view of `preset` was made from `recipe`, a hash of all its inputs."""
        index = read_index(self.root, self.dataset)
        return bool(index) and index["presets"].get(preset, {}).get("recipe") == recipe

    def read_measured(self, preset: str) -> tuple[Corpus, list[tuple[Clip, dict[str, Key]]]]:
        """Returns the data set and [(clip, {feature: key})] of the last complete extraction; opens no media.

        Raises:
          AvjaxError: there was none.
        """
        index = read_index(self.root, self.dataset)
        keys = index["presets"].get(preset, {}).get("keys", {}) if index else {}
        if not keys or any(c["id"] not in keys for c in index["clips"]):
            raise AvjaxError(
                f"{self.root}: not all clips are measured with preset {preset!r}; run without --only first"
            )
        clips = _clips(index)
        task = Task(index["task"], tuple(index["classes"]))
        corpus = Corpus(index["dataset"], task, tuple(clips), _folds(index))
        return corpus, [(c, {f: Key(*key) for f, key in keys[c.id].items() if f != "text"}) for c in clips]

    def pack(
        self,
        corpus: Corpus,
        clips: Sequence[Clip],
        preset: str,
        parts: Sequence[tfds.Part],
        recipe: str,
        entries: Mapping[str, object],
        **how: object,
    ) -> None:
        """Packs the examples of `parts`, one per clip of `clips`, into the TFDS view, and writes the index.

        All presets of a store describe the same clips: presets packed from other clips become unfinished. `entries` are
        further entries of this preset in the index: provenance, and `rejected` (clip id, reason); `how` are further
        arguments of `tfds.pack`.
        """
        data = _described(corpus, clips)
        index = read_index(self.root, self.dataset)
        if index:
            for name, entry in index["presets"].items():
                # Unfinished until the last line, but still available to `read_measured`.
                if name == preset or any(index[k] != v for k, v in data.items()):
                    entry |= {"recipe": None, "content": None}
            write_text(index_path(self.root, self.dataset), json.dumps(index))
        tfds.remove(self.root, corpus.name, preset)
        content, masked = tfds.pack(self.root, corpus, preset, parts, **how)
        counts = {"used": len(clips), "quarantined": len(entries["rejected"])}
        counts |= {f"masked_{stream}": masked.get(stream, len(clips)) for stream in ("audio", "video")}
        presets = (index["presets"] if index else {}) | {
            preset: {"recipe": recipe, "content": content, "counts": counts, **entries}
        }
        write_text(index_path(self.root, self.dataset), json.dumps({"presets": presets, **data}, indent=1))


def path_of(dataset: str, given: str = "") -> Path:
    """Returns the path of a feature store: `given`, or by default `$AVJAX_CACHE/features/<corpus>`.

    Raises:
      AvjaxError: none is given for a folder of clips: several folders must not share a store.
    """
    if dataset == "folder" and not given:
        raise AvjaxError(
            "no feature store named; give a folder data set its own, with --out of avjax.extract and "
            "--config.data.features of avjax.train"
        )
    return storage.as_path(given) if given else paths.cache() / "features" / corpus_of(dataset)


def index_path(root: Path, dataset: str = "") -> Path:
    """Returns the path of the index of `dataset` in the store at `root`."""
    target = target_of(dataset)
    return root / (f"index-{target}.json" if target else "index.json")


def _scratch(root: Path) -> Path:
    return Path(tempfile.gettempdir()) / f"avjax-{hashlib.sha256(str(root).encode()).hexdigest()[:16]}"


def read_index(root: Path, dataset: str = "") -> dict | None:
    """Reads the store's index of `dataset`; None if it does not exist yet."""
    path = index_path(root, dataset)
    return read_json(path) if path.is_file() else None


def is_finished(root: Path, preset: str, dataset: str = "") -> bool:
    """Returns whether the store at `root` holds a complete packed view of `preset` with the labels of `dataset`."""
    index = read_index(root, dataset)
    return bool(index) and bool(index["presets"].get(preset, {}).get("content"))


def load(root: Path, preset: str, dataset: str = "", *, on_disk: bool = False) -> Features:
    """Reads the packed view of `preset` from the store at `root`, or leaves its arrays `on_disk` (`packed.Packed`).

    If a corpus has several targets, `dataset` selects the index.

    Raises:
      AvjaxError: there is no finished store, or it lacks the preset or its packed view; the message names the command.
    """
    index = read_index(root, dataset)
    if not is_finished(root, preset, dataset):
        available = ", ".join(name for name in (index["presets"] if index else {}) if is_finished(root, name, dataset))
        raise AvjaxError(
            f"{root}: no finished feature store with preset {preset!r}"
            + (f" (it has: {available})" if available else "")
            + f"; make it with: python -m avjax.extract --config configs/extract_….py:{preset} "
            f"--config.data.root=YOUR_DATA --out {root}"
        )
    view = index["presets"][preset]
    name = index["dataset"]
    if not tfds.folder(root, name, preset).is_dir():
        raise AvjaxError(
            f"{tfds.folder(root, name, preset)}: the packed view is gone; delete {index_path(root, dataset)} and run "
            "avjax.extract again (staged features are reused)"
        )
    clips = _clips(index)
    rows, arrays, masks = [], {}, {}
    if not on_disk:
        examples = {e["clip_id"].decode(): e for e in tfds.read(root, name, preset)}
        rows = [examples[c.id] for c in clips]
        arrays, masks = stacked(rows)
    return Features(
        dataset=index["dataset"],
        classes=tuple(index["classes"]),
        folds=_folds(index),
        content=view["content"],
        ids=[c.id for c in clips],
        clips=clips,
        label=tasks.encoded([c.label for c in clips], tuple(index["classes"]), index["task"]),
        speakers=[c.speaker or "" for c in clips],
        arrays=arrays,
        masks=masks,
        sentences={s: [r["sentence"][s].decode() for r in rows] for s in (rows[0]["sentence"] if rows else ())},
        counts=view["counts"],
        made_by=view["made_by"],
        random=view.get("random", False),
        task=index["task"],
        packed=(root, name, preset) if on_disk else None,
        rejected=tuple(map(tuple, view.get("rejected", ()))),
    )


def _clips(index: Mapping) -> list[Clip]:
    def label(given: str | Sequence[float]) -> str | tuple[float, ...]:
        return given if isinstance(given, str) else tuple(given)

    return [Clip(path=Path(), **clip | {"label": label(clip["label"])}) for clip in index["clips"]]


def stacked(examples: Sequence[Mapping]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Stacks the streams of at least one example (`avjax.features.clip.example`) to `Features.arrays` and `masks`."""
    arrays, masks = {}, {}
    if "surface" in examples[0]:
        arrays["surface"] = np.stack([e["surface"] for e in examples])[:, None]
        masks["surface"] = np.ones((len(examples), 1), bool)
    for stream in (s for s in STREAMS if s in examples[0]):
        arrays[stream], masks[stream] = dense([e[stream] for e in examples], [e[f"{stream}_mask"] for e in examples])
    for source in examples[0]["text"]:
        tokens = [e["text"][source] for e in examples]
        arrays[f"text_{source}"], masks[f"text_{source}"] = dense(tokens, [np.ones(len(t), bool) for t in tokens])
    return arrays, masks


def recipe(corpus: Corpus, clips: Sequence[Clip], ingredients: object) -> str:
    """Returns a hash of all inputs of a packed view: the data's description and `ingredients` (JSON values)."""
    return hashlib.sha256(json.dumps([tfds.VERSION, _described(corpus, clips), ingredients]).encode()).hexdigest()


def safe_name(clip_id: str) -> str:
    """Returns a file name for any clip id: percent-encoded, and hashed if that is too long."""
    name = urllib.parse.quote(clip_id, safe=" ").replace(".", "%2E")
    return name if len(name) <= 200 else "long-" + hashlib.sha256(clip_id.encode()).hexdigest()


def _described(corpus: Corpus, clips: Sequence[Clip]) -> dict[str, object]:
    """Describes the data for the index: all that training needs, but no paths of files."""
    return {
        "dataset": corpus.name,
        "task": corpus.task.kind,
        "classes": list(corpus.task.classes),
        "folds": [{"name": f.name, **{part: list(getattr(f, part)) for part in _PARTS}} for f in corpus.folds],
        "clips": [{name: getattr(clip, name) for name in _INDEXED} for clip in clips],
    }


def _folds(index: Mapping) -> tuple[Fold, ...]:
    return tuple(Fold(f["name"], *(tuple(f[part]) for part in _PARTS)) for f in index["folds"])


def dense(steps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pads sequences (n_i, …) to (clips, longest, …) with at least one step, so that an empty set keeps its rank.

    Images stay uint8 and token ids int32; everything else becomes float32.
    """
    longest = max(1, *(len(s) for s in steps))
    dtype = tfds.dense_dtype(steps[0].dtype)
    out = np.zeros((len(steps), longest, *steps[0].shape[1:]), dtype)
    mask = np.zeros((len(steps), longest), bool)
    for i, (step, valid) in enumerate(zip(steps, masks, strict=True)):
        out[i, : len(step)][valid] = step[valid]
        mask[i, : len(step)] = valid
    return out, mask

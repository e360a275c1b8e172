"""The packed view of a feature store: a TFDS data set in array_record files, made and read without TensorFlow.

In a store on cloud storage it is made on this machine and copied there, and read from a copy in the cache.
"""

import contextlib
import hashlib
import io
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from avjax import assets
from avjax.datasets.about import about
from avjax.datasets.base import Task
from avjax.files import copy_folder, is_local

VERSION = "1.2.0"  # of the packed view's layout
UNFINISHED = "incomplete"  # how TFDS names a folder that it is still writing
# Records that TFDS holds in memory before it sorts them on disk; its own limit is 1 GB.
_HELD = 64 * 2**20


def name(dataset: str) -> str:
    """What the packed view of `dataset` is called among TFDS data sets."""
    return f"avjax_{dataset.replace(':', '_')}"


def folder(root: Path, dataset: str, preset: str) -> Path:
    """The folder of a packed view in the store at `root`."""
    return root / "tfds" / name(dataset) / preset / VERSION


def readable(root: Path, dataset: str, preset: str) -> Path:
    """The folder to read a packed view from: its own, or of a store on cloud storage a copy in the cache."""
    place = folder(root, dataset, preset)
    if is_local(place):
        return place
    info = (place / "dataset_info.json").read_text()
    copy = assets.cache() / "views" / hashlib.sha256(f"{place}{info}".encode()).hexdigest()[:16] / VERSION
    if not copy.is_dir():
        with tempfile.TemporaryDirectory(dir=_made(copy.parent)) as part:
            copy_folder(place, Path(part) / VERSION)
            (Path(part) / VERSION).rename(copy)
    return copy


def _made(place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    return place


def read(root: Path, dataset: str, preset: str) -> Iterator[dict]:
    """The examples of a packed view, as TFDS gives them (strings as bytes), in no particular order."""
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(str(readable(root, dataset, preset))).as_data_source("clips")
    return (source[i] for i in range(len(source)))


def remove(root: Path, dataset: str, preset: str) -> None:
    """Removes a packed view, if there is one."""
    place = folder(root, dataset, preset).parent
    if is_local(place):
        shutil.rmtree(place, ignore_errors=True)
    elif place.exists():
        place.rmtree()


def pack(
    root: Path, dataset: str, preset: str, task: Task, examples: Iterable[Mapping[str, object]], count: int
) -> str:
    """Packs `examples` (`avjax.features.example`), `count` of them, and returns the hash of all their values."""
    digest = hashlib.sha256()
    hashed = _hashed(examples, digest)
    if is_local(root):
        _build(root / "tfds", dataset, preset, task, hashed, count)
    else:
        with tempfile.TemporaryDirectory() as place:
            _build(Path(place) / "tfds", dataset, preset, task, hashed, count)
            copy_folder(folder(Path(place), dataset, preset), folder(root, dataset, preset))
    return digest.hexdigest()


def _hashed(examples: Iterable[Mapping[str, object]], digest) -> Iterator[tuple[str, Mapping[str, object]]]:
    for example in examples:
        _digest(digest, example)
        yield example["clip_id"], example


def _digest(digest, value) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(key.encode())
            _digest(digest, value[key])
    else:
        array = np.asarray(value)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())


def _build(data_dir: Path, dataset: str, preset: str, task: Task, examples, count: int) -> None:
    import tensorflow_datasets as tfds

    examples = iter(examples)
    first = next(examples)
    spec = _feature_spec(tfds, first[1], task.classes)

    class Info(tfds.core.DatasetInfo):
        def initialize_from_bucket(self):
            """Looks for nothing published: TFDS's way of looking leaves a temporary folder behind every time."""

    # TFDS's ready-made ad-hoc builder would need TensorFlow. Registered, this one could pack but once per process.
    class Packed(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(VERSION)
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=preset),)

        def _info(self):
            return Info(builder=self, features=spec, **_described(dataset, task, count))

        def _split_generators(self, dl_manager):
            return {"clips": self._generate_examples()}

        def _generate_examples(self):
            yield first
            yield from examples

    Packed.name = name(dataset)
    tfds.disable_progress_bar()
    builder = Packed(data_dir=str(data_dir), config=preset, file_format="array_record")
    # It announces a download and makes a folder for it, and there is none: one that `Store.locked` sweeps away.
    with contextlib.redirect_stdout(io.StringIO()), _holding_little():
        builder.download_and_prepare(download_dir=str(data_dir / name(dataset) / preset / f"download.{UNFINISHED}"))


@contextlib.contextmanager
def _holding_little() -> Iterator[None]:
    from tensorflow_datasets.core import shuffle

    before, shuffle.MAX_MEM_BUFFER_SIZE = shuffle.MAX_MEM_BUFFER_SIZE, _HELD
    try:
        yield
    finally:
        shuffle.MAX_MEM_BUFFER_SIZE = before


def _described(dataset: str, task: Task, count: int) -> dict[str, str]:
    """What TFDS is told of a view: whose clips these are, what they may be used for, and what to cite."""
    says = f"Features of {count} clips, packed by avjax from its feature store; task: {task.kind}."
    known = about(dataset)
    if not known:
        return {"description": says}
    return {
        "description": f"{known.title}. {says}",
        "homepage": known.homepage,
        "citation": known.citation,
        "license": f"That of the data set they were made of: {known.licence}",
    }


def _feature_spec(tfds, example: Mapping[str, object], classes: Sequence[str]):
    """The TFDS description of an example: arrays have one free axis, the first."""

    def spec(name: str, value):
        if isinstance(value, Mapping):
            return {k: spec(k, v) for k, v in value.items()}
        if name == "label" and isinstance(value, str):
            return tfds.features.ClassLabel(names=list(classes))
        if isinstance(value, str):
            return tfds.features.Text()
        array = np.asarray(value)
        shape = (None, *array.shape[1:]) if array.ndim else ()
        return tfds.features.Tensor(shape=shape, dtype=array.dtype) if array.ndim else array.dtype.type

    return tfds.features.FeaturesDict(spec("", example))

"""The packed view of a feature store: a TFDS data set in array_record files, written and read without TensorFlow.

In a store on cloud storage it is written on this machine and copied there, and read from a copy in the cache.
"""

import dataclasses
import hashlib
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from avjax.datasets.base import Corpus, Task
from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from avjax.utils import paths as assets
from avjax.utils import worker_pool
from avjax.utils.storage import copy_folder, is_local

VERSION = "1.3.0"  # of the packed view's layout
UNFINISHED = "incomplete"  # how TFDS names a folder that it is still writing
_SECONDS = 3600.0  # for a part


def name(dataset: str) -> str:
    """Returns the TFDS name of the packed view of `dataset`."""
    return f"avjax_{dataset.replace(':', '_')}"


def folder(root: Path, dataset: str, preset: str) -> Path:
    """Returns the folder of a packed view in the store at `root`."""
    return root / "tfds" / name(dataset) / preset / VERSION


def readable(root: Path, dataset: str, preset: str) -> Path:
    """Returns the folder to read a packed view from: its own, or for cloud storage a copy in the cache."""
    view = folder(root, dataset, preset)
    if is_local(view):
        return view
    info = (view / "dataset_info.json").read_text()
    copy = assets.cache() / "views" / hashlib.sha256(f"{view}{info}".encode()).hexdigest()[:16] / VERSION
    if not copy.is_dir():
        with tempfile.TemporaryDirectory(dir=_create(copy.parent)) as part:
            copy_folder(view, Path(part) / VERSION)
            (Path(part) / VERSION).rename(copy)
    return copy


def _create(view: Path) -> Path:
    view.mkdir(parents=True, exist_ok=True)
    return view


def read(root: Path, dataset: str, preset: str) -> Iterator[dict]:
    """Reads the examples of a packed view from TFDS (strings as bytes), in no particular order."""
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(str(readable(root, dataset, preset))).as_data_source("clips")
    return (source[i] for i in range(len(source)))


def steps(root: Path, dataset: str, preset: str) -> dict[str, tuple[list[int], str]]:
    """Returns the form of a step of each stream and text of a packed view as read: name → (shape, dtype)."""
    import tensorflow_datasets as tfds

    features = tfds.builder_from_directory(str(readable(root, dataset, preset))).info.features
    arrays = {
        name.removesuffix("_mask"): features[name.removesuffix("_mask")] for name in features if name.endswith("_mask")
    }
    arrays |= {f"text_{source}": features["text"][source] for source in features["text"]}
    return {name: (list(a.shape[1:]), dense_dtype(np.dtype(a.np_dtype)).name) for name, a in arrays.items()}


def dense_dtype(stored: np.dtype) -> np.dtype:
    """Returns the dtype of a stored array in training: uint8 for images, int32 for token ids, else float32."""
    return stored if stored in (np.uint8, np.int32) else np.dtype(np.float32)


def remove(root: Path, dataset: str, preset: str) -> None:
    """Removes a packed view, if it exists."""
    epath.Path(folder(root, dataset, preset).parent).rmtree(missing_ok=True)


# Yields a part of the examples (`avjax.features.clip.example`), in the order of the clips.
Part = Callable[[], Iterable[Mapping[str, object]]]


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A file of records: their number, total bytes and digests, and stream → the number without a step of it."""

    count: int
    size: int
    digests: bytes
    masked: Mapping[str, int]


def pack(
    root: Path,
    corpus: Corpus,
    preset: str,
    parts: Sequence[Part],
    processes: int = 1,
    shown: Callable[[Iterator], Iterable] = iter,
) -> tuple[str, dict[str, int]]:
    """Packs examples of a data set, each part into a file of its own.

    TFDS's own writer holds all records in memory and sorts them, which beyond 1 GB requires TensorFlow; this one holds
    one example per process. If `processes` is above 1, that many pack in parallel, and parts must be picklable; `shown`
    wraps the finished parts in a progress bar.

    Returns:
      the hash of all values, and stream → number of clips without any step of it.
    """
    dataset, task = corpus.name, corpus.task
    with tempfile.TemporaryDirectory() as temporary:
        view = folder(root if is_local(root) else Path(temporary), dataset, preset)
        unfinished = view.with_name(f"{UNFINISHED}.{VERSION}")
        unfinished.mkdir(parents=True)
        shards = _written(unfinished, dataset, parts, task.classes, processes, shown)
        _describe(unfinished, dataset, preset, task, parts, shards)
        unfinished.rename(view)
        if not is_local(root):
            copy_folder(view, folder(root, dataset, preset))
    digest = hashlib.sha256(b"".join(s.digests for s in shards)).hexdigest()
    return digest, {stream: sum(s.masked[stream] for s in shards) for stream in shards[0].masked}


def _written(
    view: Path, dataset: str, parts: Sequence[Part], classes: Sequence[str], processes: int, shown: Callable[..., Any]
) -> list[_Shard]:
    template = _template(view, dataset)
    paths = [str(template.sharded_filepath(shard_index=i, num_shards=len(parts))) for i in range(len(parts))]
    jobs = list(zip(paths, parts, itertools.repeat(tuple(classes)), strict=False))
    if processes == 1:
        done = ((job, _write_shard(job)) for job in jobs)
    else:
        done = worker_pool.each(_write_shard, jobs, count=processes, seconds=_SECONDS, setup=_no_setup)
    shards = {}
    for (path, *_), shard in shown(done):
        if isinstance(shard, worker_pool.Failure):
            raise AvjaxError(f"{path}: cannot be packed: {shard.reason}")
        shards[path] = shard
    return [shards[path] for path in paths]


def _no_setup() -> None:
    """Does nothing: packing needs no set-up."""


def _write_shard(job: tuple[str, Part, tuple[str, ...]]) -> _Shard:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    path, part, classes = job
    spec, size, digests, masked = None, 0, [], Counter()
    writer = ArrayRecordWriter(path, "group_size:1")
    for example in part():
        if spec is None:
            spec = _feature_spec(tfds, example, classes)
            serializer = tfds.core.example_serializer.ExampleSerializer(spec.get_serialized_info())
        record = serializer.serialize_example(spec.encode_example(example))
        writer.write(record)
        size += len(record)
        digests.append(_digest_of(example))
        masked.update({name: int(not np.any(mask)) for name, mask in example.items() if name.endswith("_mask")})
    writer.close()
    streams = {name.removesuffix("_mask"): n for name, n in masked.items()}
    return _Shard(len(digests), size, b"".join(digests), streams)


def _digest_of(example: Mapping[str, object]) -> bytes:
    digest = hashlib.sha256()
    _digest(digest, example)
    return digest.digest()


def _digest(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(key.encode())
            _digest(digest, value[key])
    else:
        array = np.asarray(value)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())


def _template(view: Path, dataset: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.core.ShardedFileTemplate(
        data_dir=view,
        dataset_name=name(dataset),
        split="clips",
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )


def _describe(
    view: Path, dataset: str, preset: str, task: Task, parts: Sequence[Part], shards: Sequence[_Shard]
) -> None:
    """Writes the metadata with which TFDS reads a view."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info

    spec = _feature_spec(tfds, next(iter(parts[0]())), task.classes)
    split = tfds.core.SplitInfo(
        name="clips",
        shard_lengths=[s.count for s in shards],
        num_bytes=sum(s.size for s in shards),
        filename_template=_template(view, dataset),
    )
    identity = dataset_info.DatasetIdentity(
        name=name(dataset),
        version=tfds.core.Version(VERSION),
        data_dir=str(view),
        module_name="avjax",
        config_name=preset,
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=spec, **_described(dataset, task, sum(s.count for s in shards))
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(view)


def _described(dataset: str, task: Task, count: int) -> dict[str, str]:
    """Describes a view for TFDS: the data set, its licence, and the citation."""
    summary = f"Features of {count} clips, packed by avjax from its feature store; task: {task.kind}."
    corpus_metadata = metadata(dataset)
    if not corpus_metadata:
        return {"description": summary}
    return {
        "description": f"{corpus_metadata.title}. {summary}",
        "homepage": corpus_metadata.homepage,
        "citation": corpus_metadata.citation,
        "license": f"That of the data set they were made of: {corpus_metadata.licence}",
    }


def _feature_spec(tfds: Any, example: Mapping[str, object], classes: Sequence[str]) -> Any:
    """Returns the TFDS specification of an example: the first axis of arrays is free."""

    def spec(name: str, value: Any) -> Any:
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

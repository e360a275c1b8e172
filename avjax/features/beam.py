"""Extraction as a Beam pipeline, on this machine, Dataflow, Flink or Spark: the same work in the same code.

Each element of the pipeline is a handful of clips that a machine measures with `avjax.features.extract.measured`; the
results are staged in the feature store, which all machines must reach: a shared folder, or cloud storage. So a killed
pipeline is resumed, and a local extraction continues the work of a pipeline.
"""

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console

from avjax.datasets.base import Clip
from avjax.errors import AvjaxError
from avjax.features import extract as extraction
from avjax.features.extract import Extractor, Job, Options, Runner
from avjax.features.presets import Preset
from avjax.features.provenance import Key
from avjax.features.store import Store
from avjax.utils import storage
from avjax.utils.progress import Stopwatch

_PIECE = 16  # clips: enough to amortise the start of worker processes, few enough to be repeated after a kill
_FAILED = "failed"  # the staged "feature" of a clip that could not be measured


def runner(name: str, flags: Sequence[str], root: Path, media: str = "") -> Runner:
    """Makes a runner of extraction from a Beam runner.

    Args:
      name: DirectRunner, DataflowRunner, FlinkRunner or SparkRunner.
      flags: further options of the pipeline, such as `--project=P`.
      root: the folder in which the data set was indexed.
      media: the folder of the same files for the machines of the pipeline, such as `gs://bucket/mafw`; "" = `root`.

    Raises:
      AvjaxError: Beam is missing.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise AvjaxError(f"--runner={name} needs Apache Beam; install with: pip install 'avjax[beam]'")

    def run(jobs: Sequence[Job], extractor: Extractor, options: Options, console: Console) -> Iterator[tuple[str, str]]:
        for clip, keys, _ in jobs:
            extractor.store.drop(clip.id, _FAILED, _key(keys))
        sent = [(_relocated(clip, root, storage.as_path(media)), *job) for clip, *job in jobs] if media else list(jobs)
        pieces = [sent[at : at + _PIECE] for at in range(0, len(sent), _PIECE)]
        console.print(f"{name}: {len(jobs)} clips in {len(pieces)} pieces")
        if pieces:
            arguments = (str(extractor.store.root), extractor.settings, extractor.made_by)
            limits = Options(options.processes, options.clip_seconds)
            _submit([f"--runner={name}", *flags], pieces, arguments, limits)
        return (_outcome(extractor.store, job) for job in jobs)

    return run


def _relocated(clip: Clip, root: Path, media: Path) -> Clip:
    def moved(path: Path | None) -> Path | None:
        return path and media / path.relative_to(root).as_posix()

    return dataclasses.replace(clip, path=moved(clip.path), audio=moved(clip.audio))


def _key(keys: Mapping[str, Key]) -> Key:
    return keys["video"]  # depends on the files, too: another file gets its own result


def _outcome(store: Store, job: Job) -> tuple[str, str]:
    clip, keys, lacks = job
    if all(store.has(clip.id, feature, keys[feature]) for feature in lacks):
        return clip.id, ""
    if store.has(clip.id, _FAILED, _key(keys)):
        reason = str(store.get(clip.id, _FAILED, _key(keys))["reason"])
        store.drop(clip.id, _FAILED, _key(keys))
        return clip.id, reason
    raise AvjaxError(f"{clip.id}: the pipeline ended and left neither features nor a reason; start it again")


def _submit(
    flags: Sequence[str],
    pieces: Sequence[Sequence[Job]],
    arguments: tuple[str, Preset, Mapping[str, str]],
    options: Options,
) -> None:
    """Runs the pipeline; `arguments` are those of `_SharedExtractor`."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.utils.shared import Shared

    class Measure(beam.DoFn):
        def __init__(self) -> None:
            self._shared = Shared()

        def setup(self) -> None:
            self._extractor = self._shared.acquire(lambda: _SharedExtractor(*arguments))

        def process(self, piece: Any) -> Iterator[Any]:
            _measure(piece, self._extractor.extractor, options)
            yield len(piece)

    try:
        with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
            _ = pipeline | beam.Create(pieces) | beam.Reshuffle() | beam.ParDo(Measure())
    except ValueError as error:
        raise AvjaxError(f"{flags[0]}: {error}") from error


class _SharedExtractor:
    """An `Extractor` for all threads of a machine, in an object with weak references, as Beam requires.

    Raises:
      AvjaxError: its features would differ from `made_by`, for example in precision on another kind of device.
    """

    def __init__(self, root: str, settings: Preset, made_by: Mapping[str, str]) -> None:
        self.extractor = Extractor(settings, Store(storage.as_path(root)), Stopwatch())
        if other := sorted(f for f in made_by if self.extractor.made_by[f] != made_by[f]):
            raise AvjaxError(
                f"a machine of the pipeline would make {', '.join(other)} otherwise than the one that started it; give "
                "all the same version of avjax, the same weights and the same kind of device"
            )


def _measure(piece: Sequence[Job], extractor: Extractor, options: Options) -> None:
    """Measures the clips of a piece and stages the features, or the reason if there are none."""
    keys = {clip.id: _key(keys_of_clip) for clip, keys_of_clip, _ in piece}
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(_fetched(clip, Path(folder) / str(i)), *job) for i, (clip, *job) in enumerate(piece)]
        for clip_id, reason in extraction.measured(jobs, extractor, options):
            if reason:
                extractor.store.put(clip_id, _FAILED, keys[clip_id], {"reason": np.array(reason)})


def _fetched(clip: Clip, folder: Path) -> Clip:
    """Returns the clip with its files copied to this machine."""

    def local(path: Path | None) -> Path | None:
        if not path or storage.is_local(path):
            return path
        folder.mkdir(exist_ok=True)
        target = folder / os.path.basename(path)
        epath.Path(path).copy(target, overwrite=True)
        return target

    return dataclasses.replace(clip, path=local(clip.path), audio=local(clip.audio))

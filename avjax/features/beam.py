"""Extraction as a Beam pipeline, on this machine, Dataflow, Flink or Spark: the same work in the same code.

Every piece of the pipeline is a handful of clips that a machine measures as `avjax.features.extract.measured` does it
alone; what it finds is staged in the feature store, which all machines must reach: a shared folder, or cloud storage.
So a pipeline that was killed goes on where it was, and `local` goes on with what a pipeline has begun.
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

_PIECE = 16  # clips: enough to be worth the start of worker processes, few enough to be done again after a kill
_FAILED = "failed"  # the staged "feature" of a clip that could not be measured


def runner(name: str, flags: Sequence[str], root: Path, media: str = "") -> Runner:
    """The Beam runner `name` (DirectRunner, DataflowRunner, FlinkRunner, SparkRunner) as one of extraction.

    Args:
      flags: further options of the pipeline, such as `--project=P`.
      root: where the data set was indexed; media: where machines find the same files, such as `gs://bucket/mafw`;
        "" = under the same path as here.
    Raises:
      AvjaxError: Beam is missing.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise AvjaxError(f"--runner={name} needs Apache Beam; install with: pip install 'avjax[beam]'")

    def run(jobs: Sequence[Job], extractor: Extractor, options: Options, console: Console) -> Iterator[tuple[str, str]]:
        for clip, keys, _ in jobs:
            extractor.store.drop(clip.id, _FAILED, _key(keys))
        sent = [(_elsewhere(clip, root, storage.as_path(media)), *job) for clip, *job in jobs] if media else list(jobs)
        pieces = [sent[at : at + _PIECE] for at in range(0, len(sent), _PIECE)]
        console.print(f"{name}: {len(jobs)} clips in {len(pieces)} pieces")
        if pieces:
            made_alike = (str(extractor.store.root), extractor.settings, extractor.made_by)
            limits = Options(options.processes, options.clip_seconds)
            _submit([f"--runner={name}", *flags], pieces, made_alike, limits)
        return (_outcome(extractor.store, job) for job in jobs)

    return run


def _elsewhere(clip: Clip, root: Path, media: Path) -> Clip:
    def moved(path: Path | None) -> Path | None:
        return path and media / path.relative_to(root).as_posix()

    return dataclasses.replace(clip, path=moved(clip.path), audio=moved(clip.audio))


def _key(keys: Mapping[str, Key]) -> Key:
    return keys["video"]  # made of the files, too: another file fails for itself


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
    made_alike: tuple[str, Preset, Mapping[str, str]],
    options: Options,
) -> None:
    """Runs the pipeline; `made_alike`: the arguments of `_Held`."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.utils.shared import Shared

    class Measure(beam.DoFn):
        def __init__(self) -> None:
            self._shared = Shared()

        def setup(self) -> None:
            self._held = self._shared.acquire(lambda: _Held(*made_alike))

        def process(self, piece: Any) -> Iterator[Any]:
            _measure(piece, self._held.extractor, options)
            yield len(piece)

    try:
        with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
            _ = pipeline | beam.Create(pieces) | beam.Reshuffle() | beam.ParDo(Measure())
    except ValueError as error:
        raise AvjaxError(f"{flags[0]}: {error}") from error


class _Held:
    """An `Extractor` that the threads of a machine share; Beam shares only what can be referred to weakly.

    Raises:
      AvjaxError: it would make other features than `made_by` says, such as in another precision on another device.
    """

    def __init__(self, root: str, settings: Preset, made_by: Mapping[str, str]) -> None:
        self.extractor = Extractor(settings, Store(storage.as_path(root)), Stopwatch())
        if other := sorted(f for f in made_by if self.extractor.made_by[f] != made_by[f]):
            raise AvjaxError(
                f"a machine of the pipeline would make {', '.join(other)} otherwise than the one that started it; give "
                "all the same version of avjax, the same weights and the same kind of device"
            )


def _measure(piece: Sequence[Job], extractor: Extractor, options: Options) -> None:
    """Measures the clips of a piece and stages what was found, or why nothing was."""
    keys = {clip.id: _key(found) for clip, found, _ in piece}
    with tempfile.TemporaryDirectory() as room:
        jobs = [(_fetched(clip, Path(room) / str(i)), *job) for i, (clip, *job) in enumerate(piece)]
        for clip_id, reason in extraction.measured(jobs, extractor, options):
            if reason:
                extractor.store.put(clip_id, _FAILED, keys[clip_id], {"reason": np.array(reason)})


def _fetched(clip: Clip, room: Path) -> Clip:
    """The clip with its files on this machine."""

    def local(path: Path | None) -> Path | None:
        if not path or storage.is_local(path):
            return path
        room.mkdir(exist_ok=True)
        target = room / os.path.basename(path)
        epath.Path(path).copy(target, overwrite=True)
        return target

    return dataclasses.replace(clip, path=local(clip.path), audio=local(clip.audio))

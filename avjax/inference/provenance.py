"""The provenance of a bundle: data, protocol, features and how they were made, machine, licences."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax

from avjax.encoders.registry import REGISTRY
from avjax.features import presets
from avjax.features.presets import Encoding, Preset
from avjax.inference.run import Run
from avjax.settings import Settings
from avjax.training import data
from avjax.utils.storage import read_json
from avjax.utils.version import VERSION


def of_run(run: Run, settings: Settings, workdir: Path, inputs: Mapping[str, dict]) -> dict[str, object]:
    """Returns the content of `provenance.json`.

    Args:
      run: the run.
      settings: of the run.
      workdir: its directory.
      inputs: as `stablehlo.inputs`.

    Raises:
      AvjaxError: a file of the run directory cannot be read.
    """
    machine, protocol = read_json(workdir / "environment.json"), read_json(workdir / "protocol.json")
    features = machine.pop("features")
    preset = presets.PRESETS.get(settings.preset) if settings.tables is None else None
    streams = described(preset, run.text_source) if preset else _of_tables(settings)
    return {
        "run": run.name,
        "model": settings.model.name,
        "dataset": protocol["dataset"],
        "title": run.dataset,
        "protocol": run.protocol,
        "lanes": [{"fold": fold, "seed": seed} for fold, seed in run.lanes],
        "lanes_of_run": len(protocol["folds"]),
        "random_weights": run.random,
        "cached_clips": len(run.predictor.clip_ids),
        "features": {
            "content": features["content"],
            "made_by": dict(run.made_by),
            "records": _records(settings, protocol["dataset"], run.made_by),
        },
        "preprocessing": {
            "preset": settings.preset,
            "settings": dataclasses.asdict(preset) if preset else settings.tables,
            "streams": {
                stream: {"what": streams.get(stream, ""), "longest": list(shape), "dtype": dtype}
                for stream, (shape, dtype) in run.streams.items()
            },
        },
        "inputs": dict(inputs),
        "pretrained": pretrained(preset) if preset else {},
        "exported_with": {"avjax": VERSION, "jax": jax.__version__},
        "trained_with": machine,
    }


def _records(settings: Settings, dataset: str, made_by: Mapping[str, str]) -> dict[str, dict]:
    """Returns the provenance records of features by key, as far as the feature store still has them."""
    paths = {key: data.store_of(settings, dataset) / "provenance" / f"{key}.json" for key in made_by.values()}
    return {key: read_json(path) for key, path in paths.items() if path.is_file()}


def _of_tables(settings: Settings) -> dict[str, str]:
    return {stream: f"from tables: {', '.join(columns)}" for stream, columns in settings.tables["streams"].items()}


def described(settings: Preset, text_source: str) -> dict[str, str]:
    """Describes each stream of a preset and the times of its steps; `text_source` as in a configuration."""
    text = f"{settings.text.source}, at most {settings.max_tokens} tokens of the text {text_source!r}"
    streams = {"text": f"token ids for {text}" if settings.raw else f"tokens by {text}"}
    if settings.window:
        w = settings.window
        video = f"{w.count} images of the face, {w.side} x {w.side}, evenly from the middle {w.seconds:g} s"
        return streams | {"video": video, "audio": f"{w.mfccs} MFCC of the same seconds at {w.sample_rate} Hz"}
    return streams | {"video": _of_video(settings), "audio": _of_audio(settings), "flow": _of_flow(settings)}


def _of_video(settings: Preset) -> str:
    frames = f"at most {settings.frames} evenly spaced frames"
    if not settings.frames:
        frames = f"every frame of the first {settings.max_seconds:g} s"
    if (every := presets.every(settings)) > 1:
        frames += f", one in {every} of these"
    measured = "face measurements (blendshapes, action units, head pose)"
    if not settings.image:
        return f"{measured} in {frames}"
    encoded = f"{_called(settings.image)} on the {settings.image.sees} in {frames}"
    if settings.raw:
        return f"images for {encoded}"
    return f"{encoded}, beside {measured}" if settings.face else encoded


def _of_audio(settings: Preset) -> str:
    seconds = f"the first {settings.max_seconds:g} s"
    if not settings.speech:
        return f"acoustic measurements at {settings.steps_per_second} steps per second, {seconds}"
    rate = f" at {settings.speech.per_second} steps per second" if settings.speech.per_second else ""
    return f"{'input of ' if settings.raw else ''}{_called(settings.speech)}{rate}, {seconds}"


def _of_flow(settings: Preset) -> str:
    if not settings.flow:
        return ""
    shown = f" encoded by {_called(settings.flow.image)}" if settings.flow.image else ", means over a grid"
    return f"optical flow of the face ({settings.flow.source}){shown}, one step per step of the video"


def _called(encoding: Encoding) -> str:
    return encoding.source if encoding.layer is None else f"{encoding.source}, layer {encoding.layer}"


def pretrained(settings: Preset) -> dict[str, dict[str, str]]:
    """Returns the pretrained weights behind the features of a preset: name → what they are, and their licence."""
    flow = [settings.flow.source] if settings.flow else []
    used = ["face_landmarker", *flow, *(e.source for e in presets.encodings(settings).values()), settings.text.source]
    entries = {name: REGISTRY[name] for name in dict.fromkeys(used) if name in REGISTRY}
    return {name: {"what": entry.what, "licence": entry.licence} for name, entry in entries.items()}

"""Predictions for new clips by a finished run."""

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from avjax.datasets.base import Clip
from avjax.errors import AvjaxError
from avjax.features import clip as clip_features
from avjax.features import extract as extraction
from avjax.features import presets, prompts
from avjax.features import store as stores
from avjax.inference.run import Run
from avjax.training import batches, loop
from avjax.utils.media_files import shown
from avjax.utils.progress import Stopwatch

# Suffixes of the files that are used of a folder; a file that is given by name may have any.
_VIDEO = "3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogv ts vob webm wmv"
_AUDIO = "aac aif aiff flac m4a mp3 oga ogg opus wav wma"
SUFFIXES = tuple(f".{name}" for name in f"{_VIDEO} {_AUDIO}".split())


@dataclasses.dataclass(frozen=True)
class Prediction:
    r"""The prediction for one clip.

    Attributes:
      file: as given; bytes of its name that are not UTF-8 are shown as `\xe9`.
      scores: class → probability, in the order of the run's classes, adding up to 1; label → probability; or target →
        value, by the run's task.
      sentence: the text that the model read, "" for none.
      missing: "video", "audio" or "sentence" → why it is missing.
    """

    file: str
    scores: dict[str, float]
    sentence: str
    missing: dict[str, str]

    @property
    def ranked(self) -> list[tuple[str, float]]:
        """Returns the scores, the largest first."""
        return sorted(self.scores.items(), key=lambda item: -item[1])


def find_clips(arguments: Iterable[str]) -> list[Clip]:
    """Lists the clips of files and folders, each once; a folder means all files in and below it, sorted.

    Of a folder, files with one of `SUFFIXES` are used. A clip's id is its path as given.

    Raises:
      AvjaxError: a folder has no such file.
    """
    paths = [path for argument in arguments for path in _paths(Path(argument))]
    return [Clip(id=shown(str(path)), path=path, label="") for path in dict.fromkeys(paths)]


def predict(
    run: Run,
    clips: Sequence[Clip],
    console: Console,
    *,
    clip_seconds: float = extraction.CLIP_SECONDS,
) -> tuple[list[Prediction], list[tuple[str, str]]]:
    """Measures clips and predicts all that can be used; progress goes to `console`.

    The prediction for a clip does not depend on the others. It is that of extraction and training for the same file,
    with one exception: if the data had a column of speakers, "high" and "low" in a stored sentence are relative to the
    speaker's usual pitch; new clips have no speaker, and fixed bounds apply. They have no transcript either.

    Returns:
      the predictions, and (file, reason) of each clip that cannot be used, both in the order of the clips.

    Raises:
      AvjaxError: as `measure`.
    """
    features, missing, rejected = measure(run, clips, console, clip_seconds=clip_seconds)
    if features is None:
        return [], rejected
    scores = probabilities(run, features)
    sentences = features.sentences[run.text_source] if run.text_source else [""] * len(features.ids)
    predictions = [
        Prediction(clip_id, dict(zip(run.classes, map(float, row), strict=True)), sentence, lacking)
        for clip_id, row, sentence, lacking in zip(features.ids, scores, sentences, missing, strict=True)
    ]
    return predictions, rejected


def measure(
    run: Run, clips: Sequence[Clip], console: Console, *, clip_seconds: float = extraction.CLIP_SECONDS
) -> tuple[stores.Features | None, list[dict[str, str]], list[tuple[str, str]]]:
    """Measures clips like those that the run was trained on.

    Returns:
      features of the usable clips, None if there are none; what each of them lacks (`Prediction.missing`); and (file,
      reason) of the others.

    Raises:
      AvjaxError: as extraction, or the run was trained on features that are measured differently now.
    """
    settings = presets.preset(run.preset, random=run.random)
    trouble = {clip.id: clip.trouble() for clip in clips}
    with tempfile.TemporaryDirectory(prefix="avjax-") as folder:
        store = stores.Store(Path(folder))
        extractor = extraction.Extractor(settings, store, Stopwatch())
        options = extraction.Options(clip_seconds=clip_seconds)
        readable = [clip for clip in clips if not trouble[clip.id]]
        measured, failed = extraction.measure_all(readable, extractor, options, console)
        reasons = {clip_id: reason for clip_id, reason in trouble.items() if reason} | dict(failed)
        rejected = [(clip.id, reasons[clip.id]) for clip in clips if clip.id in reasons]
        if not measured:
            return None, [], rejected
        facts = extraction.read_facts(measured, store)
        sentences = extraction.describe_all(measured, facts)
        measured = extraction.encode_all(measured, sentences, settings, store, console, extractor.clock)
        _check_made_by(run, extraction.made_by(measured[0]))
        examples = list(extraction.examples(measured, sentences, settings, store))
        missing = [_missing(clip, run, sentences[clip.id], facts[clip.id]) for clip, _ in measured]
    features = _features(run, [c for c, _ in measured], examples)
    if run.text_source == prompts.UTTERANCE:
        features = prompts.attach_utterances(features, run.preset, run.random, console)
    return features, missing, rejected


def read_outputs(run: Run, clips: stores.Features) -> Any:
    """Reads what the run's predictor takes of clips (`Predictor.read`): a tree with leaves (lanes, clips, …)."""
    data = batches.resident(clips, run.text_source, "train", run.model.constants)
    read = loop.read_clips(run.model, run.predictor.read)(run.best, run.best_head, run.stats, data)
    return jax.tree.map(lambda v: np.asarray(v, np.float64), read)


def probabilities(run: Run, clips: stores.Features) -> np.ndarray:
    """Predicts clips by the mean over lanes, (clips, classes) float64: probabilities, or values."""
    return run.predictor.predict(read_outputs(run, clips), run.predictor.weights)


def _paths(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
    if not files:
        raise AvjaxError(f"{shown(str(path))}: no media file in this folder; looked for {', '.join(SUFFIXES)}")
    return files


def _features(run: Run, clips: Sequence[Clip], examples: Sequence[Mapping]) -> stores.Features:
    """Returns the features of new clips like those of a feature store, without labels."""
    arrays, masks = stores.stacked(examples)
    return stores.Features(
        dataset=run.dataset,
        classes=run.classes,
        folds=(),
        content="",
        ids=[c.id for c in clips],
        clips=list(clips),
        label=np.zeros(len(clips), np.int32),
        speakers=[""] * len(clips),
        arrays=arrays,
        masks=masks,
        sentences={s: [e["sentence"][s] for e in examples] for s in clip_features.TEXTS},
        counts={},
        made_by={},
        task=run.task,
    )


def _missing(clip: Clip, run: Run, sentences: Mapping[str, str], facts: clip_features.Facts) -> dict[str, str]:
    if run.text_source == prompts.UTTERANCE:
        reason = "" if clip.transcript else "no transcript is given"
    else:
        silent = run.text_source and not sentences[run.text_source]
        reason = "nothing to describe: no face and no voice was measured" if silent else ""
    reasons = {
        "video": facts.why["video"],
        "audio": facts.why["audio"],
        "sentence": reason,
    }
    return {what: reason for what, reason in reasons.items() if reason}


def _check_made_by(run: Run, now: Mapping[str, str]) -> None:
    """Checks that features are made as in training: by the same settings, weights and code."""
    if other := [feature for feature, key in now.items() if run.made_by.get(feature) != key]:
        raise AvjaxError(
            f"run {run.name} was trained on features that are made differently now ({', '.join(other)}: other weights "
            "or another version of avjax); extract and train again"
        )

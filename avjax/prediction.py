"""Answers of a finished run for new clips: what `avjax.predict` runs.

A clip is measured by the very stages of extraction (`avjax.extraction`, in a store that lasts as long as the call) and
answered by the trained lanes (`avjax.loop.answers`), each with its own standardisation statistics; the prediction is
the mean of the lanes' probabilities.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from avjax import cache as caches
from avjax import checkpoint, extraction, features, loop, models, pipeline, presets, prompting, readouts, rundir
from avjax.cache import Cache
from avjax.datasets import store as stores
from avjax.datasets.base import Clip
from avjax.errors import AvjaxError
from avjax.models.base import Model
from avjax.progress import Stopwatch
from avjax.source import shown

# What is taken from a folder; a file that is named itself is tried whatever its name.
_PICTURE = "3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogv ts vob webm wmv"
_SOUND = "aac aif aiff flac m4a mp3 oga ogg opus wav wma"
# Of a bundle: one of them is there even if the other is lost.
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
SUFFIXES = tuple(f".{name}" for name in f"{_PICTURE} {_SOUND}".split())


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, or those of its lanes that are to answer.

    Attributes:
      name: of its directory; dataset, protocol: as every table names them; classes: in the order of the logits.
      preset: how clips are measured; text_source: which sentence the model reads, "" for none.
      task: its kind.
      model: without parameters; best, best_head, stats: of the lanes, with a leading lane axis (`avjax.loop.State`).
      lanes: (fold, seed) of each.
      made_by: how the features were made that it was trained on (`extraction.made_by`).
      random: whether those came from encoders with weights drawn at random.
      caches: of each lane, of a model whose features are read by a cache.
      streams: of each stream that the model reads, the shape that its longest clip in training had, and its dtype.
    """

    name: str
    dataset: str
    protocol: str
    classes: tuple[str, ...]
    preset: str
    text_source: str
    model: Model
    best: Mapping[str, Any]
    best_head: np.ndarray
    stats: pipeline.Statistics
    lanes: tuple[tuple[str, int], ...]
    made_by: Mapping[str, str]
    random: bool = False
    task: str = "single"
    caches: tuple[Cache, ...] = ()
    streams: Mapping[str, tuple[tuple[int, ...], str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer for one clip.

    Attributes:
      file: as given; bytes of its name that are not UTF-8 are shown as `\\xe9`.
      answers: class → probability, in the order of the run's classes, adding up to 1; label → probability of yes; or
        name → value, by the run's task.
      sentence: what the model read, "" for none.
      missing: "picture", "sound" or "sentence" → why the model had to do without.
    """

    file: str
    answers: dict[str, float]
    sentence: str
    missing: dict[str, str]

    @property
    def ranked(self) -> list[tuple[str, float]]:
        """The answers, the largest first."""
        return sorted(self.answers.items(), key=lambda item: -item[1])


def read_run(workdir: Path, fold: str | None = None, seed: int | None = None, *, new_clips: bool = True) -> Run:
    """Reads a finished run; of its lanes those of `fold` and `seed` where given.

    Args:
      new_clips: whether it is to answer for such; then a run that cannot is refused.
    Raises:
      AvjaxError: no finished run there, one of its files is damaged, it has no such fold or seed, or it standardises
        features per speaker, which takes more than a clip.
    """
    config = _config(workdir)
    if new_clips:
        check_measurable(workdir, config)
    if not rundir.is_finished(workdir):
        raise AvjaxError(f"{workdir}: an unfinished run; start its avjax.train command again, which goes on to the end")
    metrics = read_json(workdir / "metrics.json")
    try:
        if new_clips:
            check_statistics(workdir, config)
        names = tuple((lane["fold"], lane["seed"]) for lane in metrics["folds"])
        about = {key: metrics[key] for key in ("dataset", "protocol", "task")}
        classes = tuple(metrics["classes"])
        about |= {"classes": classes, "preset": config.preset, "text_source": config.model.text_source}
        made = read_json(workdir / "environment.json")["features"]
        about |= {"made_by": made["made_by"], "random": made["random"]}
        model = models.build(config.model, len(classes))
    except (KeyError, AttributeError, TypeError) as error:
        raise AvjaxError(f"{workdir}: not of this version of avjax (without {error}); train again") from error
    saved = checkpoint.read(workdir / "checkpoints", "best", "best_head", "stats")
    if "params" not in saved["best"]:
        raise AvjaxError(f"{workdir}: its checkpoints are not of this version of avjax; train again")
    there = {leaf.shape[0] for leaf in jax.tree.leaves(saved)}
    if there != {len(names)}:
        raise AvjaxError(f"{workdir}: metrics.json has {len(names)} lanes, checkpoints/ {there}; train again")
    if model.readers:
        about["caches"] = tuple(readouts.read_caches(workdir, names))
        model = model.replace(constants={"classes": about["caches"][0].text})
    # Runs of before that was kept answer all the same; they cannot be exported.
    about["streams"] = _shapes(model, config.model.text_source, made.get("streams", {}))
    run = Run(shown(workdir.resolve().name), **about, model=model, **saved, lanes=names)
    return of_lanes(run, workdir, fold, seed)


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle of `avjax.export`, whole or not, and no run directory."""
    return any((folder / name).is_file() for name in (MANIFEST, WEIGHTS))


def check_measurable(where: Path, config: ConfigDict) -> None:
    """Raises AvjaxError where a run of `config` reads what cannot be measured in a clip."""
    if "tables" in config:
        raise AvjaxError(f"{where}: trained on features from tables, which avjax cannot measure in a clip")


def check_statistics(where: Path, config: ConfigDict) -> None:
    """Raises AvjaxError where a run of `config` standardises features per speaker, which takes more than a clip."""
    if (way := config.protocol.standardise) not in ("train", "none"):
        raise AvjaxError(
            f"{where}: protocol.standardise is {way!r}; such a run needs the feature statistics of the speaker, "
            "which a new clip does not bring. Train one without speaker_norm or enrol"
        )


def of_lanes(run: Run, where: Path, fold: str | None, seed: int | None) -> Run:
    """The run with those of its lanes alone that are of `fold` and `seed`, as far as these are given.

    Args:
      where: it was read from, for the error.
    Raises:
      AvjaxError: it has no such fold or seed.
    """
    at = _chosen(where, run.lanes, fold, seed)
    arrays = {name: _take(getattr(run, name), at) for name in ("best", "best_head", "stats")}
    kept = {"lanes": tuple(run.lanes[i] for i in at), "caches": tuple(run.caches[i] for i in at if run.caches)}
    return dataclasses.replace(run, **arrays, **kept)


def _shapes(model: Model, text_source: str, made: Mapping) -> dict[str, tuple[tuple[int, ...], str]]:
    """`Run.streams`, of what the run directory says of the features."""
    named = {stream: f"text_{text_source}" if stream == "text" else stream for stream in model.streams}
    return {stream: (tuple(made[name][0]), made[name][1]) for stream, name in named.items() if name in made}


def find_clips(arguments: Iterable[str]) -> list[Clip]:
    """The clips that files and folders name, each once; a folder stands for all files in and below it, sorted.

    Of a folder, files with one of `SUFFIXES` are taken. A clip's id is its path as given.

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
    cache: Cache | None = None,
) -> tuple[list[Prediction], list[tuple[str, str]]]:
    """Measures clips and answers for all that can be used; progress goes to `console`.

    The answer for a clip does not depend on the others. It is that of extraction and training for the same file, with
    one exception: where the data had a column of speakers, "high" and "low" in a stored sentence are judged against the
    speaker's usual pitch, and here, for want of a speaker, against fixed bounds; a transcript is not known here either.

    Args:
      cache: answers in the place of the run's own (`avjax.adaptation`).
    Returns:
      the answers, and (file, reason) of each clip that cannot be used, both in the order of the clips.
    Raises:
      AvjaxError: what `measure` raises.
    """
    found, missing, rejected = measure(run, clips, console, clip_seconds=clip_seconds)
    if found is None:
        return [], rejected
    shares = answers_of(run, found, cache)
    sentences = found.sentences[run.text_source] if run.text_source else [""] * len(found.ids)
    answers = [
        Prediction(clip_id, dict(zip(run.classes, map(float, row), strict=True)), sentence, lacking)
        for clip_id, row, sentence, lacking in zip(found.ids, shares, sentences, missing, strict=True)
    ]
    return answers, rejected


def measure(
    run: Run, clips: Sequence[Clip], console: Console, *, clip_seconds: float = extraction.CLIP_SECONDS
) -> tuple[stores.Features | None, list[dict[str, str]], list[tuple[str, str]]]:
    """The features of clips, made as those were that the run was trained on.

    Returns:
      features of the clips that can be used, None where there is none; what each of them lacks
      (`Prediction.missing`); and (file, reason) of the others.
    Raises:
      AvjaxError: what extraction raises, or the run was trained on features of another kind than are made now.
    """
    settings = presets.preset(run.preset, random=run.random)
    with tempfile.TemporaryDirectory(prefix="avjax-") as folder:
        store = stores.Store(Path(folder))
        clock = Stopwatch()
        measured, rejected = extraction.measure_all(clips, settings, store, console, clock, clip_seconds=clip_seconds)
        if not measured:
            return None, [], rejected
        sentences = extraction.describe_all(measured, store)
        measured = extraction.encode_all(measured, sentences, settings, store, console, clock)
        _check_made_by(run, extraction.made_by(measured[0]))
        examples = list(extraction.examples(measured, sentences, settings, store))
        missing = [_missing(m, run, sentences, store) for m in measured]
    found = _features(run, [c for c, _ in measured], examples)
    if run.text_source == prompting.UTTERANCE:
        found = prompting.attach_utterances(found, run.preset, run.random, console)
    return found, missing, rejected


def represented(run: Run, clips: stores.Features) -> dict[str, np.ndarray]:
    """What a cache reads of clips: modality → (lanes, clips, d)."""
    data = pipeline.resident(clips, run.text_source, "train", run.model.constants)
    return readouts.represent(run.model, run, data)


def answers_of(run: Run, clips: stores.Features, cache: Cache | None = None) -> np.ndarray:
    """The mean over lanes of what the predicting head answers, (clips, classes) float64: probabilities, or values.

    Args:
      cache: of all lanes together (`readouts.joined`), to answer in the place of theirs.
    """
    from scipy.special import expit, softmax

    if run.caches:
        found = represented(run, clips)
        if cache is not None:
            return softmax(caches.predict(cache, readouts.joined(found)) / caches.TEMPERATURE, -1)
        lanes = [{m: v[i] for m, v in found.items()} for i in range(len(run.lanes))]
        scores = [caches.predict(own, lane) for own, lane in zip(run.caches, lanes, strict=True)]
        return softmax(np.stack(scores) / caches.TEMPERATURE, -1).mean(0)
    data = pipeline.resident(clips, run.text_source, "train", run.model.constants)
    logits = loop.answers(run.model)(run.best, run.best_head, run.stats, data)[run.model.answers[0]]
    ways = {"multilabel": expit, "regression": np.asarray}
    return ways.get(run.task, functools.partial(softmax, axis=-1))(np.asarray(logits, np.float64)).mean(0)


def _config(workdir: Path) -> ConfigDict:
    if is_bundle(workdir):
        raise AvjaxError(f"{workdir}: a bundle of avjax.export, not a run of avjax.train; set --workdir to a run")
    if not (workdir / "config.json").is_file():
        raise AvjaxError(f"{workdir}: no run of avjax.train here (no config.json); set --workdir to the one it wrote")
    return ConfigDict(read_json(workdir / "config.json"))


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AvjaxError(f"{path}: cannot be read ({error}); restore a copy, or train again") from error
    if not isinstance(content, dict):
        raise AvjaxError(f"{path}: holds a {type(content).__name__}, not an object; restore a copy, or train again")
    return content


def _chosen(workdir: Path, names: Sequence[tuple[str, int]], fold: str | None, seed: int | None) -> list[int]:
    """The positions of the lanes of `fold` and `seed`."""
    for what, wanted, there in (("fold", fold, [f for f, _ in names]), ("seed", seed, [s for _, s in names])):
        if wanted is not None and wanted not in there:
            known = ", ".join(map(str, dict.fromkeys(there)))
            raise AvjaxError(f"{workdir}: no {what} {wanted!r}; its {what}s are {known}")
    return [i for i, (f, s) in enumerate(names) if fold in (None, f) and seed in (None, s)]


def _take(tree: Any, rows: int | Sequence[int]) -> Any:
    return jax.tree.map(lambda leaf: leaf[np.array(rows)], tree)


def _paths(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
    if not found:
        raise AvjaxError(f"{shown(str(path))}: no media file in this folder; looked for {', '.join(SUFFIXES)}")
    return found


def _features(run: Run, clips: Sequence[Clip], examples: Sequence[Mapping]) -> stores.Features:
    """New clips as a feature store would give them, without labels."""
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
        sentences={s: [e["sentence"][s] for e in examples] for s in features.TEXTS},
        counts={},
        made_by={},
    )


def _missing(measured: extraction.Measured, run: Run, sentences: Mapping, store: stores.Store) -> dict[str, str]:
    clip, keys = measured
    if run.text_source == prompting.UTTERANCE:
        unsaid = "" if clip.transcript else "nobody has told what is said"
    else:
        silent = run.text_source and not sentences[clip.id][run.text_source]
        unsaid = "nothing to say: no face and no voice was measured" if silent else ""
    why = {
        "picture": str(store.get(clip.id, "video", keys["video"], "why")["why"]),
        "sound": str(store.get(clip.id, "audio", keys["audio"], "why")["why"]),
        "sentence": unsaid,
    }
    return {what: reason for what, reason in why.items() if reason}


def _check_made_by(run: Run, now: Mapping[str, str]) -> None:
    """Whether the features are made as those were that the run was trained on: settings, weights, code."""
    if other := [feature for feature, key in now.items() if run.made_by.get(feature) != key]:
        raise AvjaxError(
            f"run {run.name} was trained on features made otherwise than now ({', '.join(other)}: other weights, or "
            "another version of avjax); extract and train again"
        )

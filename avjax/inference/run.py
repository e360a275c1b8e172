"""A finished run, read from its directory."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from avjax import models
from avjax.errors import AvjaxError
from avjax.evaluation import predictor as predictors
from avjax.evaluation.predictor import Predictor
from avjax.models.base import Model
from avjax.settings import Settings
from avjax.training import checkpoint, run_directory, standardise
from avjax.utils.media_files import shown
from avjax.utils.storage import read_json

# Files of a bundle: either identifies it if the other is lost.
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, or those of its lanes that predict.

    Attributes:
      name: that of its directory.
      dataset, protocol: titles, as in all tables.
      classes: in the order of the logits.
      preset: name of the preset of features.
      text_source: the sentence that the model reads, "" for none.
      model: without parameters.
      best, best_head, stats: of the lanes, with a leading lane axis (`loop.State`).
      lanes: (fold, seed) of each.
      predictor: of these lanes.
      made_by: provenance of the features that it was trained on (`extraction.made_by`).
      random: whether these came from encoders with random weights.
      streams: stream that the model reads → shape of its longest clip in training, and dtype.
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
    stats: standardise.Statistics
    lanes: tuple[tuple[str, int], ...]
    made_by: Mapping[str, str]
    random: bool = False
    predictor: Predictor = dataclasses.field(kw_only=True)
    streams: Mapping[str, tuple[tuple[int, ...], str]] = dataclasses.field(default_factory=dict)

    @property
    def task(self) -> str:
        """Returns the kind of task (`avjax.tasks.SCORINGS`)."""
        return self.model.task


def read_run(workdir: Path, fold: str | None = None, seed: int | None = None, *, new_clips: bool = True) -> Run:
    """Reads a finished run, or its lanes of `fold` and `seed`.

    Args:
      workdir: the run directory.
      fold: name of a fold; None = all.
      seed: one of its seeds; None = all.
      new_clips: whether it is to predict new clips; a run that cannot is refused.

    Raises:
      AvjaxError: there is no finished run, one of its files is damaged, it has no such fold or seed, or it standardises
        features per speaker, which requires several clips of one.
    """
    settings = _settings(workdir)
    if new_clips:
        check_measurable(workdir, settings)
    if not run_directory.is_finished(workdir):
        raise AvjaxError(f"{workdir}: an unfinished run; repeat its avjax.train command, which continues it")
    metrics = read_json(workdir / "metrics.json")
    try:
        if new_clips:
            check_statistics(workdir, settings)
        names = tuple((lane["fold"], lane["seed"]) for lane in metrics["folds"])
        entries = {key: metrics[key] for key in ("dataset", "protocol")}
        classes = tuple(metrics["classes"])
        entries |= {"classes": classes, "preset": settings.preset, "text_source": settings.model.text_source}
        made = read_json(workdir / "environment.json")["features"]
        entries |= {"made_by": made["made_by"], "random": made["random"]}
        model = models.build(settings.model, len(classes), metrics["task"])
    except (KeyError, AttributeError, TypeError) as error:
        raise AvjaxError(f"{workdir}: not of this version of avjax (without {error}); train again") from error
    saved = checkpoint.read(workdir / "checkpoints", "best", "best_head", "stats")
    if "params" not in saved["best"]:
        raise AvjaxError(f"{workdir}: its checkpoints are not of this version of avjax; train again")
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(saved)}
    if counts != {len(names)}:
        raise AvjaxError(f"{workdir}: metrics.json has {len(names)} lanes, checkpoints/ {counts}; train again")
    entries["predictor"] = predictors.restored(model, workdir, names)
    if constants := entries["predictor"].constants:
        model = model.replace(constants=constants)
    # Earlier runs lack this entry: they can predict but cannot be exported.
    entries["streams"] = _shapes(model, settings.model.text_source, made.get("streams", {}))
    run = Run(shown(workdir.resolve().name), **entries, model=model, **saved, lanes=names)
    return select_lanes(run, workdir, fold, seed)


def is_bundle(folder: Path) -> bool:
    """Returns whether a folder is a bundle of `avjax.export`, complete or not, and no run directory."""
    return any((folder / name).is_file() for name in (MANIFEST, WEIGHTS))


def check_measurable(where: Path, settings: Settings) -> None:
    """Raises AvjaxError if a run with `settings` reads features that cannot be measured in a clip."""
    if settings.tables is not None:
        raise AvjaxError(f"{where}: trained on features from tables, which avjax cannot measure in a clip")


def check_statistics(where: Path, settings: Settings) -> None:
    """Raises AvjaxError if a run with `settings` standardises features per speaker, which requires several clips."""
    if (way := settings.protocol.standardise) not in ("train", "none"):
        raise AvjaxError(
            f"{where}: protocol.standardise is {way!r}; such a run needs the feature statistics of the speaker, "
            "which a new clip does not have. Train one without speaker_norm or enrol"
        )


def select_lanes(run: Run, where: Path, fold: str | None, seed: int | None) -> Run:
    """Selects the lanes of `fold` and `seed`, as far as these are given; `where` is the run's path, for errors.

    Raises:
      AvjaxError: it has no such fold or seed.
    """
    at = _chosen(where, run.lanes, fold, seed)
    arrays = {name: _take(getattr(run, name), at) for name in ("best", "best_head", "stats")}
    lanes, predictor = tuple(run.lanes[i] for i in at), run.predictor.select_lanes(at)
    return dataclasses.replace(run, **arrays, lanes=lanes, predictor=predictor)


def _shapes(model: Model, text_source: str, made: Mapping) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns `Run.streams` from the features' entry in the run directory."""
    named = {stream: f"text_{text_source}" if stream == "text" else stream for stream in model.streams}
    return {stream: (tuple(made[name][0]), made[name][1]) for stream, name in named.items() if name in made}


def _settings(workdir: Path) -> Settings:
    if is_bundle(workdir):
        raise AvjaxError(f"{workdir}: a bundle of avjax.export, not a run of avjax.train; set --workdir to a run")
    if not (workdir / "config.json").is_file():
        raise AvjaxError(f"{workdir}: no run of avjax.train (it has no config.json); set --workdir to a run directory")
    return run_directory.read_settings(workdir / "config.json")


def _chosen(workdir: Path, names: Sequence[tuple[str, int]], fold: str | None, seed: int | None) -> list[int]:
    """Returns the positions of the lanes of `fold` and `seed`."""
    for what, wanted, names_of in (("fold", fold, [f for f, _ in names]), ("seed", seed, [s for _, s in names])):
        if wanted is not None and wanted not in names_of:
            choices = ", ".join(map(str, dict.fromkeys(names_of)))
            raise AvjaxError(f"{workdir}: no {what} {wanted!r}; its {what}s are {choices}")
    return [i for i, (f, s) in enumerate(names) if fold in (None, f) and seed in (None, s)]


def _take(tree: Any, rows: int | Sequence[int]) -> Any:
    return jax.tree.map(lambda leaf: leaf[np.array(rows)], tree)

"""Turns a trained state into the files of a finished run: predictions for the test clips, scores, plots, the report.

One process does all of it on one of its devices.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from rich.console import RenderableType

from avjax.datasets import registry
from avjax.evaluation import baselines, fewshot, results
from avjax.evaluation.report import page, plots, tables
from avjax.features.store import Features
from avjax.models import finetune
from avjax.models.base import Model
from avjax.settings import Settings
from avjax.training import loop, run_directory
from avjax.training.batches import Resident
from avjax.training.lanes import LanePlan
from avjax.training.streamed_batches import Streamed
from avjax.utils.storage import write_text


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained run, on one process.

    Attributes:
      clips, state: of this process alone (`streamed_batches.on_one_device`, `Placement.read`).
      logits: as `loop.Trainer.predict` returns them.
      rows: of `metrics.jsonl`.
      protocol_text: as `protocol.protocol_text` returns it.
    """

    settings: Settings
    model: Model
    features: Features
    plan: LanePlan
    clips: Resident | Streamed
    state: loop.State
    logits: Mapping[str, jax.Array]
    rows: Sequence[Mapping]
    protocol_text: str


def write(workdir: Path, run: Trained) -> list[RenderableType]:
    """Writes the results of a run: `metrics.json`, `predictions.npz`, plots, and last of all `report.html`.

    Returns:
      the tables of the run.
    """
    model, features, plan = run.model, run.features, run.plan
    logits, lanes, remarks = run.logits, {"best_epoch": run.state.best_epoch.tolist()}, {}
    if model.readers:
        representations = fewshot.represent(model, run.state, run.clips)
        outputs = fewshot.fit(representations, features, plan, run.settings.model.settings)
        fewshot.write(workdir, outputs, representations, features, plan)
        logits, lanes = logits | outputs.logits, lanes | outputs.record
        remarks = fewshot.remarks(model, run.state, plan, run.clips, features, representations)
    # jit sorts names; the predicting head stays first
    ordered = {head: logits[head] for head in model.prediction_heads}
    predictions = results.predictions(features, plan, ordered)
    if len(model.candidates) > 1:
        lanes["head"] = [model.heads[i] for i in run.state.best_head.tolist()]
    yardsticks = baselines.yardsticks(run.clips, plan)
    metrics = results.measure(features, plan, predictions, lanes, run.protocol_text, yardsticks) | remarks

    finetune.write_merged(workdir / "merged", model, run.state.best, plan.names)
    results.write_predictions(workdir / "predictions.npz", predictions)
    write_text(workdir / "metrics.json", json.dumps(metrics, indent=1))
    title = f"{run.settings.name} {run.settings.variants or 'full'}"
    _draw(workdir, run, metrics, predictions, title)
    page.write_report(workdir, sentences=results.examples(features, predictions, run.settings.model.text_source))
    return tables.of_run(metrics, title)


def _draw(workdir: Path, run: Trained, metrics: Mapping, predictions: Mapping, title: str) -> None:
    note = f"{registry.title(run.features.dataset)} · {run.protocol_text}"
    plots.predictions_figure(metrics, predictions, title, workdir)
    if run.model.attention_maps and (seen := loop.attention(run.model, run.state, run.plan, run.clips)):
        maps = results.attention(run.features, seen)
        plots.attention_figure(maps, run.model.attention_maps, title, workdir / "attention.png", note=note)
    plots.curves_figure(run_directory.mean_over_lanes(run.rows), workdir / "curves.png", note=note)

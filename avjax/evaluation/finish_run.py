"""From a trained state to the files of a finished run: answers for the test clips, figures, pictures, the report.

All of it is done by one process on one of its devices.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from rich.console import Console

from avjax.evaluation import baselines, fewshot, results
from avjax.evaluation.report import page, plots, tables
from avjax.features.store import Features
from avjax.models import finetune
from avjax.models.base import Model
from avjax.training import loop, run_directory
from avjax.training.batches import Resident
from avjax.training.lanes import LanePlan
from avjax.training.streamed_batches import Streamed
from avjax.utils.storage import write_text


def write(
    workdir: Path,
    config,
    model: Model,
    features: Features,
    plan: LanePlan,
    clips: Resident | Streamed,
    state: loop.State,
    logits: Mapping[str, jax.Array],
    rows: Sequence[Mapping],
    dataset: str,
    says: str,
    console: Console,
) -> None:
    """Writes what a run leaves: `metrics.json`, `predictions.npz`, pictures, and last of all `report.html`.

    Args:
      clips, state: at hand for this process alone (`streams.here`, `Placement.read`).
      logits: as `loop.Trainer.predict` gives them; rows: of `metrics.jsonl`.
      dataset, says: how data set and protocol are called.
    """
    about, remarks = {"best_epoch": state.best_epoch.tolist()}, {}
    if model.readers:
        found = fewshot.represent(model, state, clips)
        read = fewshot.fit(found, features, plan, config.model.settings)
        fewshot.write(workdir, read, found, features, plan)
        logits, about = logits | read.logits, about | read.about
        remarks = fewshot.remarks(model, state, plan, clips, features, found)
    ordered = {head: logits[head] for head in model.answers}  # jit sorts names; the predicting head stays first
    answers = results.predictions(features, plan, ordered)
    if len(model.candidates) > 1:
        about["head"] = [model.heads[i] for i in state.best_head.tolist()]
    metrics = results.measure(features, plan, answers, about, says, baselines.yardsticks(clips, plan)) | remarks

    finetune.write_merged(workdir / "merged", model, state.best, plan.names)
    results.write_predictions(workdir / "predictions.npz", answers)
    write_text(workdir / "metrics.json", json.dumps(metrics, indent=1))
    title, note = f"{config.name} {config.variants or 'full'}", f"{dataset} · {says}"
    plots.answers_picture(metrics, answers, title, workdir)
    if model.pictured and (seen := loop.attention(model, state, plan, clips)):
        maps = results.attention(features, seen)
        plots.attention_picture(maps, model.pictured, title, workdir / "attention.png", note=note)
    plots.curves_picture(run_directory.mean_over_lanes(rows), workdir / "curves.png", note=note)
    page.write_report(workdir, sentences=results.examples(features, answers, config.model.text_source))
    console.print(*tables.of_run(metrics, title))

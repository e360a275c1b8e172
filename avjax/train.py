"""Trains a protocol: all folds and seeds in one compiled program, and reports.

python -m avjax.train --config configs/etg_folder.py --config.data.features=F --workdir W

The same command on the same --workdir goes on where it was cut off; on a finished one it does nothing.
"""

import functools
import json
import time
from pathlib import Path

from absl import flags

from avjax import cli
from avjax import config as configs

CONFIG = configs.require_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; default runs/<config>-<variants>.")


def main(_: list[str]) -> None:
    train(CONFIG.value, Path(WORKDIR.value) if WORKDIR.value else None)


def train(config, workdir: Path | None = None) -> Path:
    """Runs `config` in `workdir` and returns the run directory.

    Raises:
      AvjaxError: something in the configuration, the features or the run directory does not fit.
    """
    import jax
    import jax.numpy as jnp
    from rich.console import Console

    from avjax import data, datasets, loop, models, pipeline, reference, results, rundir
    from avjax.checkpoint import Checkpoints
    from avjax.datasets.base import natural_folds
    from avjax.files import write_text
    from avjax.report import page, plots, tables

    console = Console(markup=False)
    say = functools.partial(console.print, soft_wrap=True)  # lines stay whole in a log; tables keep to the terminal
    cli.use_compile_cache()

    # ---- Features -------------------------------------------------------------------------------------------------
    features = data.obtain(config, console)
    counts, dataset = features.counts, datasets.title(features.dataset)
    say(f"{config.name} {config.variants or 'full'} on {dataset}: {counts['used']} clips, {len(features.classes)} "
        f"classes; {counts['quarantined']} quarantined, without sound {counts['masked_audio']}, "
        f"without face {counts['masked_video']}")  # fmt: skip
    workdir = workdir or rundir.default(config, features)
    rundir.begin(workdir, config, features)
    if rundir.is_finished(workdir):
        before = results.read(workdir)
        console.print(tables.run_table(before, config.name), tables.reference_table(before))
        say(f"{workdir} is finished; nothing to do (choose another --workdir for a new run)")
        return workdir

    # ---- Protocol -------------------------------------------------------------------------------------------------
    folds, folds_name = natural_folds(features.clips, features.folds, config.protocol.folds, config.protocol.fold_count)
    model = models.build(config.model, len(features.classes))
    plan = pipeline.plan(features, folds, config.train.seeds, config.protocol, model.turns)
    protocol = results.protocol_name(folds_name, plan, config.protocol, features.random)
    say(f"protocol: {protocol}")

    # ---- Model ----------------------------------------------------------------------------------------------------
    resident = pipeline.resident(features, config.model.text_source, config.protocol.standardise)
    trainer = loop.make(model, config)
    state = trainer.init(plan.lanes, resident)
    size = sum(v.size for v in jax.tree.leaves(state.params)) // len(plan.names)
    say(f"{len(plan.names)} lanes of {size:,} parameters on {jax.device_count()} {jax.devices()[0].platform} device(s)")

    # ---- Epochs ---------------------------------------------------------------------------------------------------
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        done, state = checkpoints.restore(state) or (0, state)
        rows = rundir.read_history(workdir, done)
        if done:
            say(f"going on after epoch {done}")
        events = rundir.Events(workdir, rows)
        while done < config.train.epochs and not bool(jnp.all(state.stopped)):
            cli.heed_interrupts()
            begun = time.perf_counter()
            state, sums = trainer.epochs(state, plan.lanes, resident, jnp.int32(done + 1))
            loop.check_finite(sums, plan, features.ids, done + 1, config.train.batch_size)
            new = [{"dataset": dataset} | row for row in loop.epoch_rows(sums, plan.names, done + 1)]
            rows += new
            done += config.train.epochs_per_call
            rundir.write_history(workdir, rows)
            checkpoints.save(done, state)
            events.add(new)
            say(rundir.progress(rows, config.train.epochs, len(plan.names), time.perf_counter() - begun))
        events.close()

    # ---- Test -----------------------------------------------------------------------------------------------------
    logits = jax.device_get(trainer.predict(state, plan.lanes, resident))
    ordered = {head: logits[head] for head in model.heads}  # jit sorts names; the predicting head stays first
    answers = results.predictions(features, plan, ordered)
    yardstick = reference.logistic_regression(resident, plan)
    metrics = results.measure(features, plan, answers, state.best_epoch.tolist(), protocol, yardstick)

    # ---- Report ---------------------------------------------------------------------------------------------------
    results.write_predictions(workdir / "predictions.npz", answers)
    write_text(workdir / "metrics.json", json.dumps(metrics, indent=1))
    title = f"{config.name} {config.variants or 'full'}"
    note = f"{dataset} · {protocol}"
    plots.confusion_picture(metrics["confusion"], metrics["classes"], title, workdir / "confusion.png", note=note)
    plots.curves_picture(rundir.mean_over_lanes(rows), workdir / "curves.png", note=note)
    page.write_report(workdir, sentences=results.examples(features, answers, config.model.text_source))
    console.print(tables.run_table(metrics, title), tables.reference_table(metrics))
    say(f"written to {workdir}: report.html, metrics.json, predictions.npz, confusion.png, checkpoints/")
    return workdir


if __name__ == "__main__":
    cli.run(main)

"""Trains a protocol: all folds and seeds in one compiled program, and reports.

python -m avjax.train --config configs/etg_folder.py --config.data.features=F --workdir W

The same command on the same --workdir goes on where it was cut off; on a finished one it does nothing.
"""

import functools
import json
import shutil
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

    from avjax import (
        data,
        datasets,
        finetuning,
        loop,
        models,
        pipeline,
        protocol,
        readouts,
        reference,
        results,
        rundir,
        streaming,
        streams,
        tasks,
    )
    from avjax.checkpoint import Checkpoints
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
    # Before the directory is claimed: what is refused here is to be mended and started again in the same one.
    folds, folds_name = protocol.folds(features, config.protocol)
    workdir = workdir or rundir.default(config, features)
    rundir.begin(workdir, config, features)
    if rundir.is_finished(workdir):
        before = results.read(workdir)
        console.print(*tables.of_run(before, config.name))
        say(f"{workdir} is finished; nothing to do (choose another --workdir for a new run)")
        return workdir

    # ---- Protocol -------------------------------------------------------------------------------------------------
    model, scoring = models.build(config.model, len(features.classes)), tasks.SCORINGS[features.task]
    plan = pipeline.plan(features, folds, config.train.seeds, config.protocol, model.turns)
    chosen, heads = model.heads[0] if len(model.candidates) > 1 else "", loop.candidates(model)
    says = protocol.line(folds_name, plan, config.protocol, features.random, features.task, chosen)
    if model.readers:
        says += f"; {readouts.described(plan, config.model.settings)}"
    write_text(workdir / "protocol.json", json.dumps(protocol.record(features, plan, config.protocol, says), indent=1))
    say(f"protocol: {says}")

    # ---- Model ----------------------------------------------------------------------------------------------------
    clips = streams.choose(features, config, model.constants)
    loop.check_streams(model, clips.resident(jnp.arange(1)), config.preset)
    streamed = isinstance(clips, streams.Streamed)
    trainer = streaming.make(model, config, workdir, features.task, say) if streamed else loop.make(model, config)
    state = trainer.init(plan.lanes, clips)
    size = sum(v.size for v in jax.tree.leaves(state.params)) // len(plan.names)
    say(f"{len(plan.names)} lanes of {size:,} parameters on {jax.device_count()} {jax.devices()[0].platform} device(s)"
        + (", streamed" if streamed else ""))  # fmt: skip

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
            state, sums = trainer.epochs(state, plan.lanes, clips, jnp.int32(done + 1))
            loop.check_finite(sums, plan, features.ids, done + 1, config.train.batch_size)
            new = [{"dataset": dataset} | row for row in loop.epoch_rows(sums, plan.names, done + 1, scoring, heads)]
            rows += new
            done += sums["live"].shape[1]
            rundir.write_history(workdir, rows)
            checkpoints.save(done, state)
            events.add(new)
            seconds = time.perf_counter() - begun
            say(rundir.progress(rows, config.train.epochs, len(plan.names), seconds, features.task))
        events.close()
    shutil.rmtree(workdir / streaming.FOLDER, ignore_errors=True)

    # ---- Test -----------------------------------------------------------------------------------------------------
    logits = jax.device_get(trainer.predict(state, plan.lanes, clips))
    about, remarks = {"best_epoch": state.best_epoch.tolist()}, {}
    if model.readers:
        found = readouts.represent(model, state, clips)
        read = readouts.of_lanes(found, features, plan, config.model.settings, readouts.origin(found))
        readouts.write(workdir, read, found, features, plan)
        logits, about = logits | read.logits, about | read.about
        remarks = readouts.remarks(model, state, plan, clips, features, found)
    ordered = {head: logits[head] for head in model.answers}  # jit sorts names; the predicting head stays first
    answers = results.predictions(features, plan, ordered)
    if chosen:
        about["head"] = [model.heads[i] for i in state.best_head.tolist()]
    yardsticks = reference.yardsticks(clips, plan)
    metrics = results.measure(features, plan, answers, about, says, yardsticks) | remarks

    # ---- Report ---------------------------------------------------------------------------------------------------
    finetuning.write_merged(workdir / "merged", model, state.best, plan.names)
    results.write_predictions(workdir / "predictions.npz", answers)
    write_text(workdir / "metrics.json", json.dumps(metrics, indent=1))
    title = f"{config.name} {config.variants or 'full'}"
    note = f"{dataset} · {says}"
    plots.answers_picture(metrics, answers, title, workdir)
    if model.pictured and (seen := loop.attention(model, state, plan, clips)):
        plots.attention_picture(
            results.attention(features, seen), model.pictured, title, workdir / "attention.png", note=note
        )
    plots.curves_picture(rundir.mean_over_lanes(rows), workdir / "curves.png", note=note)
    page.write_report(workdir, sentences=results.examples(features, answers, config.model.text_source))
    console.print(*tables.of_run(metrics, title))
    say(f"written to {workdir}: report.html, metrics.json, predictions.npz, checkpoints/ and pictures")
    return workdir


if __name__ == "__main__":
    cli.run(main)

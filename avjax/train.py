"""Trains a protocol: all folds and seeds in one compiled program, and reports.

python -m avjax.train --config configs/etg_folder.py --config.data.root=R --workdir W

The same command on the same --workdir continues where it stopped; on a finished run it does nothing.
"""

import functools
import json
import time
from pathlib import Path

from absl import flags
from etils import epath

from avjax import cli
from avjax import config as configs
from avjax.errors import Stopped
from avjax.settings import Settings
from avjax.utils import storage

CONFIG = configs.require_flag()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run directory, on cloud storage too (gs://); default runs/<config>-<variants>."
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Show parameters, their device placement, memory and FLOPs; train nothing."
)


def main(_: list[str]) -> None:
    """Runs the command."""
    settings = configs.typed(CONFIG.value, Settings)
    train(settings, storage.as_path(WORKDIR.value) if WORKDIR.value else None, dry=DRY_RUN.value)


def train(settings: Settings, workdir: Path | None = None, dry: bool = False) -> Path | None:
    """Trains as `settings` specify and returns the run directory; a `dry` run writes nothing and returns None.

    Raises:
      AvjaxError: the settings, the features or the run directory do not match.
      Stopped: SIGTERM was received; completed epochs are saved.
    """
    import jax
    import numpy as np
    from rich.console import Console

    from avjax import models
    from avjax.datasets import registry
    from avjax.evaluation import finish_run, predictor, results
    from avjax.evaluation.report import tables
    from avjax.training import (
        data,
        dry_run,
        history,
        loop,
        protocol,
        run_directory,
        sharding,
        streamed_batches,
        streamed_loop,
    )
    from avjax.training import lanes as lane_plans
    from avjax.training.checkpoint import REFUSED, Checkpoints, kept_if_refused
    from avjax.utils import multihost
    from avjax.utils.storage import write_text

    # Checked before anything is read or waited for.
    models.check(settings.model)
    data.check(settings)
    multihost.join(settings.processes)
    console = Console(markup=False, quiet=not multihost.is_writer())
    say = functools.partial(console.print, soft_wrap=True)  # lines are not wrapped in a log; tables fit the terminal
    cli.use_compile_cache()

    # ---- Features -------------------------------------------------------------------------------------------------
    workdir = workdir or run_directory.default(settings)
    settings = data.with_store(settings, workdir)
    with multihost.writer_first():
        features = data.obtain(settings, console)
    counts, dataset = features.counts, registry.title(features.dataset)
    say(f"{settings.name} {settings.variants or 'full'} on {dataset}: {counts['used']} clips, {len(features.classes)} "
        f"classes; {counts['quarantined']} quarantined, without audio {counts['masked_audio']}, "
        f"without face {counts['masked_video']}")  # fmt: skip

    # ---- Protocol and model ---------------------------------------------------------------------------------------
    # Done before the directory is claimed, so that a refused run can be fixed and started again in the same directory.
    folds, folds_name = protocol.folds(features, settings.protocol)
    model = models.build(settings.model, len(features.classes), features.task)
    plan = lane_plans.plan(features, folds, settings.train.seeds, settings.protocol, model.turns)
    placement = sharding.placement(settings, len(plan.names))
    protocol_text = protocol.protocol_text(folds_name, plan, settings.protocol, model, features.random)
    protocol_text += predictor.described(model, plan, getattr(settings.model, "settings", {}))
    clips = streamed_batches.choose(features, settings, model.constants, placement)
    streamed = isinstance(clips, streamed_batches.Streamed)
    loop.check_streams(model, clips.resident(np.arange(1)) if streamed else clips, settings.preset)
    if dry:
        dry_run.show(model, settings, placement, plan, clips, console)
        return None

    # ---- Run directory --------------------------------------------------------------------------------------------
    if features.dataset != settings.dataset and workdir == run_directory.default(settings):
        workdir = run_directory.default(settings, features.dataset)
    if run_directory.is_finished(workdir):
        run_directory.begin(workdir, settings, features)
        console.print(*tables.of_run(results.read(workdir), settings.name))
        say(f"{workdir} is finished; nothing to do (choose another --workdir for a new run)")
        return workdir
    with run_directory.held(workdir, multihost.is_writer()):
        with multihost.writer_first():
            run_directory.begin(workdir, settings, features)
        if multihost.is_writer():
            record = protocol.record(features, plan, settings.protocol, protocol_text)
            write_text(workdir / "protocol.json", json.dumps(record, indent=1))
        say(f"protocol: {protocol_text}")

        # ---- State ------------------------------------------------------------------------------------------------
        if streamed:
            trainer = streamed_loop.make(model, settings, workdir, say, placement, cli.stop_requested)
        else:
            trainer = loop.make(model, settings, placement)
        lanes = placement.put_lanes(plan.lanes)
        state = trainer.init(lanes, clips)
        if placement.mesh:
            sharding.check(state, placement.of_state(state))
        size = sum(v.size for v in jax.tree.leaves(state.params)) // len(plan.names)
        say(f"{len(plan.names)} lanes of {size:,} parameters on {sharding.described(placement)}"
            + (", streamed" if streamed else ""))  # fmt: skip

        # ---- Epochs -----------------------------------------------------------------------------------------------
        with cli.keeping_on_sigterm(), Checkpoints(workdir / "checkpoints", say) as checkpoints:
            done, state = checkpoints.restore(state) or (0, state)
            log = run_directory.Log(workdir, done, multihost.is_writer())
            if done:
                say(f"continuing after epoch {done}")
            while done < settings.train.epochs and not placement.read(state.stopped).all():
                cli.heed_interrupts()
                start = time.perf_counter()
                multihost.reached(f"epoch {done + 1}")
                state, sums = trainer.epochs(state, lanes, clips, np.int32(done + 1))
                sums = jax.device_get(sums)
                with kept_if_refused(workdir / REFUSED, done + 1, state):
                    history.check_finite(sums, plan, features.ids, done + 1, settings.train.batch_size)
                rows = history.epoch_rows(sums, plan.names, done + 1, model)
                log.add([{"dataset": dataset} | row for row in rows])
                done += sums["live"].shape[1]
                checkpoints.save(done, state)
                seconds = time.perf_counter() - start
                say(run_directory.progress(log.rows, settings.train.epochs, len(plan.names), seconds, features.task))
                if multihost.agree(cli.stop_requested()):
                    raise Stopped(f"epoch {done}")
            log.close()

        # ---- Test and report --------------------------------------------------------------------------------------
        logits = jax.device_get(trainer.predict(state, lanes, clips))
        cli.heed_interrupts()
        state, clips = placement.read(state), streamed_batches.on_one_device(clips)
        if multihost.is_writer():
            trained = finish_run.Trained(settings, model, features, plan, clips, state, logits, log.rows, protocol_text)
            epath.Path(workdir / streamed_loop.FOLDER).rmtree(missing_ok=True)
            with storage.filled(workdir, last="report.html") as folder:
                console.print(*finish_run.write(folder, trained))
        multihost.end()
        say(f"written to {workdir}: report.html, metrics.json, predictions.npz, checkpoints/ and figures")
        return workdir


if __name__ == "__main__":
    cli.run(main)

"""Adds corrected clips to the cache of an EmoAsst run, and measures how much that helps.

python -m avjax.adapt --workdir W --labels corrections.csv --cache C

Adds the clips of a table `file,label[,id]` to the cache file C, which is created from the run if it does not exist.
`python -m avjax.predict --workdir W --cache C` then predicts with it. Nothing is trained. A clip that is already in the
cache gets its new label. Rows that cannot be used are reported on standard error; the others are added.

python -m avjax.adapt --workdir W --cache C [--remove ID,ID] [--fit]

Lists the entries of C; --remove deletes some of them, --fit chooses alpha and beta again.

python -m avjax.adapt --workdir W --curve 1,2,4

Measures the gain from that many labelled clips per class, for people whom the run has not seen. Writes
W/adaptation.json and W/adaptation.png.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from avjax import cli
from avjax.errors import AvjaxError

if TYPE_CHECKING:
    from avjax.inference.run import Run

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a finished run of avjax.train.", required=True)
CACHE = flags.DEFINE_string("cache", None, "The cache file.")
LABELS = flags.DEFINE_string("labels", None, "A table file,label[,id] of clips to add.")
REMOVE = flags.DEFINE_list("remove", [], "Ids of entries to remove.")
FIT = flags.DEFINE_bool("fit", False, "Choose alpha and beta again, by leaving out one entry at a time.")
CURVE = flags.DEFINE_list("curve", [], "Numbers of labelled clips per class, such as 1,2,4.")
DRAWS = flags.DEFINE_integer("draws", 20, "Draws of labelled clips for each person and lane of the curve.", 1)
CLIP_SECONDS = flags.DEFINE_float("clip_seconds", 120.0, "Seconds within which a clip must be measured.", 0.001)


def main(_: list[str]) -> None:
    """Runs the command."""
    from avjax.inference import run as runs

    if bool(CURVE.value) == bool(CACHE.value):
        raise AvjaxError("give --cache, to fill or list it, or --curve 1,2,4, to see what labelled clips bring")
    if CURVE.value and (LABELS.value or REMOVE.value or FIT.value):
        raise AvjaxError("--labels, --remove and --fit change a cache; give them with --cache, not with --curve")
    cli.use_compile_cache()
    workdir = Path(WORKDIR.value)
    run = runs.read_run(workdir, new_clips=not CURVE.value)
    if CURVE.value:
        _curve(workdir, run)
    else:
        _edit(workdir, run, Path(CACHE.value))


def _edit(workdir: Path, run: "Run", path: Path) -> None:
    from rich.console import Console

    from avjax.evaluation import fewshot_cache as caches
    from avjax.inference import adaptation
    from avjax.inference import tables as prediction_tables

    cache = adaptation.open_cache(path, workdir, run)
    before, rejected = cache, []
    if LABELS.value:
        clips, rejected = adaptation.corrections(Path(LABELS.value), run)
        progress = Console(stderr=True, soft_wrap=True, markup=False)
        cache, unusable = adaptation.add_clips(cache, run, clips, progress, clip_seconds=CLIP_SECONDS.value)
        rejected += unusable
    cache = caches.remove(cache, REMOVE.value) if REMOVE.value else cache
    cache = caches.fit(cache) if FIT.value else cache
    for clip_id, reason in rejected:
        print(f"{clip_id}: {reason}", file=sys.stderr)
    if cache is not before or not path.exists():
        caches.save(cache, path)
    Console(markup=False).print(prediction_tables.cache_table(cache, str(path), adaptation.new_cache(workdir, run)))


def _curve(workdir: Path, run: "Run") -> None:
    from rich.console import Console

    from avjax.evaluation.report import plots
    from avjax.inference import adaptation
    from avjax.inference import tables as prediction_tables
    from avjax.utils.storage import write_text

    try:
        shots = [int(k) for k in CURVE.value]
    except ValueError as error:
        raise AvjaxError(f"--curve is {','.join(CURVE.value)}; expected numbers such as 1,2,4") from error
    points = adaptation.curve(workdir, run, shots, DRAWS.value)
    settings = {"dataset": run.dataset, "protocol": run.protocol, "draws": DRAWS.value}
    rows = [{"shots": p.shots, "mean": p.mean, "std": p.spread, "better": p.better, "uar": p.uar} for p in points]
    write_text(workdir / "adaptation.json", json.dumps(settings | {"points": rows}, indent=1))
    plots.adaptation_figure(rows, run.name, workdir / "adaptation.png", note=f"{run.dataset} · {run.protocol}")
    Console(markup=False).print(prediction_tables.curve_table(points, run, DRAWS.value))
    print(f"written to {workdir}: adaptation.json, adaptation.png")


if __name__ == "__main__":
    cli.run(main)

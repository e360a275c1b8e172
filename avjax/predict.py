"""Predicts the emotion in new clips, with a finished run or a bundle.

python -m avjax.predict --workdir W clip.mp4 [more clips or folders] [--json]

Measures each clip as extraction does and predicts with the mean of all lanes; with --cache, by a cache that
avjax.adapt has filled. Files that cannot be used are reported on standard error; the others continue.
"""

import sys
from pathlib import Path

from absl import flags

from avjax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "A finished run of avjax.train, or a bundle.", required=True)
FOLD = flags.DEFINE_string("fold", None, "Predict with the lanes of this fold only.")
SEED = flags.DEFINE_integer("seed", None, "Predict with the lanes of this seed only.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object on standard output, and nothing else there.")
CACHE = flags.DEFINE_string("cache", None, "Predict with this cache, which avjax.adapt filled.")
CLIP_SECONDS = flags.DEFINE_float("clip_seconds", 120.0, "Seconds that measuring one clip may take.", 0.001)


def main(argv: list[str]) -> None:
    """Runs the command."""
    from rich.console import Console

    from avjax.errors import AvjaxError
    from avjax.inference import adaptation, bundle
    from avjax.inference import predict as prediction
    from avjax.inference import run as runs
    from avjax.inference import tables as prediction_tables

    cli.use_compile_cache()
    if CACHE.value and (FOLD.value is not None or SEED.value is not None):
        raise AvjaxError("--cache is of all lanes together; leave out --fold and --seed")
    workdir = Path(WORKDIR.value)
    read = bundle.read if runs.is_bundle(workdir) else runs.read_run
    run = read(workdir, FOLD.value, SEED.value)
    cache = adaptation.read_cache(Path(CACHE.value), run) if CACHE.value else None
    run = adaptation.with_cache(run, cache) if cache else run
    clips = prediction.find_clips(argv[1:])
    progress = Console(stderr=True, soft_wrap=True, markup=False)
    predictions, rejected = prediction.predict(run, clips, progress, clip_seconds=CLIP_SECONDS.value)
    for file, reason in rejected:
        print(f"{file}: {reason}", file=sys.stderr)
    if not predictions:
        raise AvjaxError(f"none of the {len(clips)} files can be used")
    if JSON.value:
        print(prediction_tables.as_json(run, predictions, rejected, cache))
    else:
        Console(markup=False).print(prediction_tables.as_table(run, predictions, cache))


if __name__ == "__main__":
    cli.run(main, takes="clips or folders of clips")

"""Extracts features and sentences from a data set, once; resumable by clip.

python -m avjax.extract --config configs/extract_folder.py --config.data.root=R --out F

Stopped and started again, it continues, with any --runner. A file that cannot be used is listed in F/quarantine.csv
with the reason and never stops the run. Sentences are in F/sentences.csv: edit them, then run with --only text.
"""

import shlex
from typing import TYPE_CHECKING

from absl import flags

from avjax import cli
from avjax import config as configs
from avjax.settings import ExtractSettings

if TYPE_CHECKING:
    from avjax.features.extract import Runner

CONFIG = configs.require_flag()
OUT = flags.DEFINE_string("out", None, "Feature store; default $AVJAX_CACHE/features/<dataset>.")
ONLY = flags.DEFINE_enum("only", None, ["text"], "Encode the sentences of F/sentences.csv again; opens no media.")
RUNNER = flags.DEFINE_string(
    "runner",
    "local",
    "What does the work: local (worker processes) or a Beam runner: DirectRunner, DataflowRunner, FlinkRunner or "
    "SparkRunner; the same features. The store must be where all machines reach it: --out=gs://bucket/F.",
)
RUNNER_OPTIONS = flags.DEFINE_string("runner_options", "", 'Options of the Beam runner: "--project=P --region=R …".')
MEDIA = flags.DEFINE_string(
    "media", "", "Where the machines of a Beam runner find the files of the data root, such as gs://bucket/mafw."
)


def main(_: list[str]) -> None:
    """Runs the command."""
    from avjax.features import extract as extraction

    cli.use_compile_cache()
    settings = configs.typed(CONFIG.value, ExtractSettings)
    extraction.extract(
        settings.dataset,
        settings.preset,
        root=settings.data.root,
        out=OUT.value or "",
        random=settings.weights.random,
        options=extraction.Options(
            processes=settings.workers,
            clip_seconds=settings.clip_seconds,
            runner=_runner(settings),
            only_text=ONLY.value == "text",
        ),
    )


def _runner(settings: ExtractSettings) -> "Runner":
    """Returns the runner that the flags ask for."""
    from avjax.errors import AvjaxError
    from avjax.features import extract as extraction
    from avjax.utils import paths

    if RUNNER.value == "local":
        if RUNNER_OPTIONS.value or MEDIA.value:
            raise AvjaxError("--runner_options and --media are of a Beam runner; name it with --runner")
        return extraction.local_runner
    from avjax.features import beam

    root = paths.data_root(settings.dataset, settings.data.root)
    return beam.runner(RUNNER.value, shlex.split(RUNNER_OPTIONS.value), root, MEDIA.value)


if __name__ == "__main__":
    cli.run(main)

"""Turns a data set into features and sentences, once; resumable by clip.

python -m avjax.extract --config configs/extract_folder.py --config.data.root=R --out F

Stopped and started again it goes on. A file that cannot be used goes to F/quarantine.csv with a reason and never stops
the run. Sentences are in F/sentences.csv: edit them, then run with --only text.
"""

from absl import flags

from avjax import cli
from avjax import config as configs

CONFIG = configs.require_flag()
OUT = flags.DEFINE_string("out", None, "Feature store; default $AVJAX_CACHE/features/<dataset>.")
ONLY = flags.DEFINE_enum("only", None, ["text"], "Only encode the sentences of F/sentences.csv again; opens no media.")


def main(_: list[str]) -> None:
    from avjax import extraction

    cli.use_compile_cache()
    config = CONFIG.value
    extraction.extract(
        config.dataset,
        config.preset,
        root=config.data.root,
        out=OUT.value or "",
        processes=config.workers,
        clip_seconds=config.clip_seconds,
        only_text=ONLY.value == "text",
        random=config.weights.random,
    )


if __name__ == "__main__":
    cli.run(main)

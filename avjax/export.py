"""Writes a bundle of a finished run: one folder with everything that prediction needs, ready to be shared.

python -m avjax.export --workdir W --out B [--fold F] [--seed S]

B has the prediction as a portable program that JAX runs without avjax, the weights twice (safetensors, Orbax), labels,
provenance, a model card and checksums of all files. `python -m avjax.predict --workdir B clip.mp4` predicts as W does;
in Python: `avjax.load("B").predict(["clip.mp4"])`.
"""

from absl import flags

from avjax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a finished run of avjax.train.", required=True)
OUT = flags.DEFINE_string("out", None, "The folder of the bundle; it must not exist yet.", required=True)
FOLD = flags.DEFINE_string("fold", None, "Only the lanes of this fold.")
SEED = flags.DEFINE_integer("seed", None, "Only the lanes of this seed.")


def main(_: list[str]) -> None:
    """Runs the command."""
    from avjax.inference import bundle
    from avjax.utils import storage

    cli.use_compile_cache()
    out = storage.as_path(OUT.value)
    bundle.write(storage.as_path(WORKDIR.value), out, FOLD.value, SEED.value)
    provenance = storage.read_json(out / "provenance.json")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    lanes = f"{len(provenance['lanes'])} of {provenance['lanes_of_run']} lanes"
    print(f"{out}: {provenance['run']}, {lanes}, {size / 1e6:.1f} MB")
    for name, stream in provenance["inputs"].items():
        print(f"  {name} ({', '.join(map(str, stream['shape']))}) {stream['dtype']}")
    print(f"read {out}/model_card.md before you share it")


if __name__ == "__main__":
    cli.run(main)

"""The smoke run of a further Python, `python -m tests.smoke`: imports, a tiny training, its bundle, and predictions."""

import importlib
import pathlib
import pkgutil
import subprocess
import sys
import tempfile
import types

import numpy as np

import avjax
from avjax.inference import bundle
from avjax.inference import predict as prediction
from tests import exported


def main() -> None:
    """Runs the smoke run."""
    commands = import_all()
    for command in commands:  # in separate processes, as their flags have the same names
        subprocess.run([sys.executable, "-m", command, "--help"], check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        written = exported.bundled(types.SimpleNamespace(getbasetemp=lambda: pathlib.Path(folder)))
        predicted = prediction.probabilities(bundle.read(written), exported.CLIPS)
    assert predicted.shape == (len(exported.CLIPS.ids), 3), predicted.shape
    np.testing.assert_allclose(predicted.sum(-1), 1, rtol=1e-5)
    print(
        f"smoke run on Python {sys.version.split()[0]}: imports, {len(commands)} commands, training, bundle: all well"
    )


def import_all() -> list[str]:
    """Imports all modules but the commands, and returns the commands."""
    commands = []
    for module in pkgutil.walk_packages(avjax.__path__, "avjax."):
        source = pathlib.Path(module.module_finder.path, module.name.rpartition(".")[2] + ".py")
        if source.is_file() and "cli.run(main" in source.read_text():
            commands.append(module.name)
        elif not module.name.startswith("avjax._shipped") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    return commands


if __name__ == "__main__":
    main()

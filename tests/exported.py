"""A small finished run on made-up features, its bundle, and the code of its model card."""

import pathlib
import re

from avjax import config, train
from avjax.inference import bundle
from avjax.training import run_directory
from tests import once, synthetic

CLIPS = synthetic.make(clips=24, speakers=3)


def run(tmp_path_factory) -> pathlib.Path:
    """Trains a run of 3 folds × 2 seeds, once for all tests; its features are in F beside it."""
    with once.folder(tmp_path_factory, "exported") as root:
        if not run_directory.is_finished(root / "W"):
            synthetic.write_store(root / "F", CLIPS)
            (root / "F" / "provenance").mkdir()
            (root / "F" / "provenance" / "v.json").write_text('{"feature": "video", "code": 2}')
            settings = {"model__width": 8, "train__epochs": 1, "train__epochs_per_call": 1, "train__seeds": (1, 2)}
            chosen = config.settings("configs/etg_folder.py", data__features=str(root / "F"), **settings)
            train.train(chosen, root / "W")
    return root / "W"


def bundled(tmp_path_factory) -> pathlib.Path:
    """Makes the bundle of `run`; it must not be changed."""
    workdir = run(tmp_path_factory)
    with once.folder(tmp_path_factory, "exported") as root:
        if not (root / "B").exists():
            bundle.write(workdir, root / "B")
    return root / "B"


def code(folder: pathlib.Path, language: str = "python") -> list[str]:
    """Returns the code blocks of a bundle's model card."""
    card = (folder / "model_card.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)

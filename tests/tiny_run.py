"""A small finished run for tests: synthetic clips and sines, extracted and trained once for all tests."""

import csv
import pathlib

from avjax import config, train
from avjax.features import extract as extraction
from avjax.training import run_directory
from tests import clips, once

CLASSES = ("deep", "high", "middle")


def make(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """Makes (data, store, run directory) of 2 folds × 2 seeds on 9 clips, one without audio, one without video."""
    with once.folder(tmp_path_factory, "tiny_run") as root:
        if not run_directory.is_finished(root / "W"):
            _write_data(root / "R")
            options = extraction.Options(processes=1)
            extraction.extract("folder", "lite", root=str(root / "R"), out=str(root / "F"), options=options)
            settings = config.settings(
                "configs/fusion_folder.py:concat",  # compiles fastest
                data__features=str(root / "F"),
                protocol__fold_count=2,
                model__settings__width=16,
                model__settings__hidden=16,
                train__epochs=2,
                train__epochs_per_call=2,
                train__seeds=(1, 2),
                train__learning_rate=1e-2,
            )
            train.train(settings, root / "W")
    return root / "R", root / "F", root / "W"


def _write_data(data: pathlib.Path) -> None:
    rows = []
    for i in range(9):
        hz, seconds = (120, 300, 200)[i % 3] + 3 * i, 0.4 + 0.05 * i
        name = f"take{i // 5}/{i % 5}." + ("wav" if i == 4 else "mp4")
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        if i == 4:
            clips.write_wav(data / name, seconds=seconds, hz=hz)
        else:
            clips.write_mp4(data / name, seconds=seconds, hz=None if i == 7 else hz)
        rows.append((name, CLASSES[i % 3]))
    with (data / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *rows])

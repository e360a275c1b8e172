"""Figures that peers have published, computed again from their own predictions by avjax's metrics."""

import ast
import csv

import numpy as np
import pytest

from avjax.tasks import metrics
from tests.conftest import REAL

ROOT = REAL / "ravdess_luna5cv/posteriors"
# The classes of the predictions, by the code in RAVDESS' file names: as networks had them, in the order of their names.
BY_NAME = ("05", "02", "07", "06", "03", "01", "04", "08")  # angry calm disgust fearful happy neutral sad surprised
BY_CODE = tuple(f"{code:02d}" for code in range(1, 9))


def columns(path, name):
    """(clip name, eight scores) of a table that has them side by side."""
    with path.open(newline="") as file:
        for row in csv.DictReader(file, delimiter=";"):
            yield row[name], [float(row[f"embs{i}"]) for i in range(8)]


def lists(path):
    """(clip name, eight scores) of a table that has them in one cell."""
    with path.open(newline="") as file:
        for name, scores in csv.reader(file):
            yield name.removesuffix(".csv"), ast.literal_eval(scores)


def confusion(rows, classes):
    rows = list(rows)
    label = np.array([classes.index(name.split("-")[2]) for name, _ in rows])
    return metrics.count(label, np.argmax([scores for _, scores in rows], -1), 8)


AUDIO = [
    (columns(ROOT / f"wav2Vec/posteriors/20211020_094500/fold{i}/posteriors_test.csv", "name"), BY_NAME)
    for i in range(5)
]
FACE = [
    (lists(ROOT / f"AUs_biLSTM_6213/posteriorsv2/RAVDESS_AUs-val--fold_{i}_outof_5-posteriors.csv"), BY_NAME)
    for i in range(1, 6)
]
BOTH = [(columns(ROOT / f"Fusion/posteriors/test_fold{i}.csv", "video_name"), BY_CODE) for i in range(5)]


@pytest.mark.skipif(not ROOT.is_dir(), reason=f"the peers' predictions are not at {ROOT} (set AVJAX_TEST_DATA)")
@pytest.mark.parametrize(
    ("folds", "published"), [(AUDIO, 81.82), (FACE, 62.13), (BOTH, 86.70)], ids=["audio", "face", "both"]
)
def test_luna_jimenez_2022_on_ravdess(folds, published):
    """Luna-Jiménez et al., Applied Sciences 12(1):327: means of the accuracies of five folds."""
    tables = [confusion(rows, classes) for rows, classes in folds]
    assert sum(t.sum() for t in tables) == 1440
    assert round(100 * float(np.mean([metrics.war(t) for t in tables])), 2) == published

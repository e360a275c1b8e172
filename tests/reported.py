"""Made-up runs in the form of `metrics.json`, for tests of reports."""

import io

import numpy as np
from rich.console import Console

CLASSES = ["anger", "joy", "neutral"]
CONFUSION = [[6, 2, 2], [1, 8, 1], [0, 5, 15]]  # WAR 29/40, recalls .6 .8 .75


def fold(name: str, seed: int, war: float, uar: float, **other) -> dict:
    """Returns the record of a fold and seed."""
    sizes = {"n_train": 32, "n_val": 4, "n_test": 8, "speaker_overlap": 0, "best_epoch": 7}
    return {"fold": name, "seed": seed, "war": war, "uar": uar, **sizes, **other}


def summary(folds: list[dict]) -> dict:
    """Returns records with the mean and the standard deviation of their scores."""
    scores = {key: [f[key] for f in folds] for key in ("war", "uar")}
    return {
        "folds": folds,
        "mean": {key: float(np.mean(values)) for key, values in scores.items()},
        "std": {key: float(np.std(values)) for key, values in scores.items()},
    }


def run(wars=(0.7, 0.8, 0.6), seeds=(0, 1), gain=0.0, **other) -> dict:
    """Makes a run over `len(wars)` folds whose seeds are .02 apart around each fold's WAR."""
    folds = [
        fold(str(index + 1), seed, war + gain + 0.02 * (seed - np.mean(seeds)), war + gain - 0.1)
        for index, war in enumerate(wars)
        for seed in seeds
    ]
    reference = [{"fold": str(index + 1), "war": war - 0.05, "uar": war - 0.1} for index, war in enumerate(wars)]
    return {
        "dataset": "demo",
        "protocol": "leave one speaker out",
        "task": "single",
        "classes": CLASSES,
        "counts": {"used": 40, "quarantined": 2, "masked_audio": 1, "masked_video": 3},
        **summary(folds),
        "pooled": {"war": 0.725, "uar": 0.7167},
        "confusion": CONFUSION,
        "heads": {"fusion": {"war": 0.725, "uar": 0.7167, "f1": 0.72}, "audio": {"war": 0.5, "uar": 0.45, "f1": 0.4}},
        "reference": {"audio+video": summary(reference)},
        **other,
    }


def shown(table) -> str:
    """Renders a table as text."""
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def lines_with(text: str, *words: str) -> list[str]:
    """Returns the lines that contain all `words`."""
    return [line for line in text.splitlines() if all(word in line for word in words)]


# -- tables ---------------------------------------------------------------------------------------------------------


def values_run(task: str = "regression", gain: float = 0.0, **other) -> dict:
    """Makes a regression or multi-label run over two folds, whose head was chosen by validation."""
    names = {"regression": ("ccc", "pearson", "rmse"), "multilabel": ("wa", "f1")}[task]

    def scored(*scores: float) -> dict[str, float]:
        return dict(zip(names, scores, strict=False))

    sizes = {"seed": 1, "n_train": 32, "n_val": 4, "n_test": 8, "speaker_overlap": 0, "best_epoch": 7}
    lanes = [(str(i), head, 0.1 * i + gain) for i, head in ((1, "video"), (2, "fusion"))]
    folds = [sizes | {"fold": name, "head": head} | scored(0.5 + up, 0.6 + up, 0.25) for name, head, up in lanes]
    means = {
        "mean": {n: float(np.mean([f[n] for f in folds])) for n in names},
        "std": {n: float(np.std([f[n] for f in folds])) for n in names},
    }
    reference = [{"fold": f["fold"]} | scored(0.4, 0.45, 0.3) for f in folds]
    zero = dict.fromkeys(names, 0.0)
    common = {key: value for key, value in run().items() if key != "confusion"}
    return common | {
        "task": task,
        "classes": ["valence", "arousal"],
        "folds": folds,
        **means,
        "pooled": scored(0.66, 0.77, 0.25),
        "values": {"valence": scored(0.661, 0.772, 0.253), "arousal": scored(0.441, 0.552, 0.354)},
        "heads": {head: scored(0.66, 0.77, 0.25) for head in ("chosen", "video", "fusion")},
        "reference": {"audio": {"mean": scored(0.4, 0.45, 0.3), "std": zero, "folds": reference}},
        **other,
    }

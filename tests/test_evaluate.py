"""The table of several runs: read from run directories, references included, mistakes named."""

import json

import pytest

from avjax import evaluate
from avjax.errors import AvjaxError
from avjax.report import tables


def run(tmp_path, name: str, wars: list[float]):
    folds = [
        {"fold": f"s{i}", "seed": 1, "n_train": 9, "n_val": 0, "n_test": 3, "speaker_overlap": 0, "war": w, "uar": w}
        for i, w in enumerate(wars)
    ]
    mean = {"war": sum(wars) / len(wars), "uar": sum(wars) / len(wars)}
    scores = {"mean": mean, "std": {"war": 0.0, "uar": 0.0}}
    reference = {"audio": scores | {"folds": [{"fold": f"s{i}", "war": 0.5, "uar": 0.5} for i in range(len(wars))]}}
    reference["audio"]["mean"] = {"war": 0.5, "uar": 0.5}
    metrics = {"dataset": "d", "protocol": "p", "task": "single", "classes": ["a", "b"], "folds": folds, **scores}
    folder = tmp_path / name
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(metrics | {"reference": reference}))
    return folder


def test_runs_and_references_stand_in_one_table(tmp_path):
    first = evaluate.read(run(tmp_path, "full", [0.25, 0.75]))
    second = evaluate.read(run(tmp_path, "concat", [0.5, 0.5]))
    text = tables.compare_markdown([first, second, *evaluate.references(*first)])
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert [r.split(" | ")[0].removeprefix("| ") for r in rows] == [
        "full",
        "concat",
        "logistic regression, audio (of full)",
    ]
    assert "+25.0 −25.0" in rows[1]
    assert "+25.0 −25.0" in rows[2]


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(AvjaxError, match=r"nothing: no metrics.json"):
        evaluate.read(tmp_path / "nothing")

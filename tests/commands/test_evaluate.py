"""The table of several runs: read from run directories, with baselines; mistakes are reported."""

import functools
import json
import sys

import pytest
from absl import flags

from avjax import config as configs
from avjax import evaluate
from avjax.errors import AvjaxError
from avjax.evaluation.report import tables
from tests import synthetic


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


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Runs the command in this process, on features in the folder F."""
    return functools.partial(_compare, tmp_path, monkeypatch)


def _compare(tmp_path, monkeypatch, *args: str) -> None:
    flags.FLAGS.unparse_flags()
    for override in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, override)  # of an earlier call
    spec = "--config=configs/fusion_folder.py:audio"
    short = ["--config.train.epochs=5", "--config.train.seeds=(1,2)", f"--config.data.features={tmp_path / 'F'}"]
    argv = ["evaluate", "compare", spec, *short, "--nomarkdown", "--rows=", f"--runs={tmp_path / 'runs'}", *args]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
    evaluate.main(configs.parse_flags(argv))


@pytest.mark.thorough
@pytest.mark.budget(90)
def test_rows_are_trained_and_compared(compare, tmp_path, capsys):
    synthetic.write_store(tmp_path / "F", synthetic.make())
    compare("--markdown", "--rows=concat,weighted_sum,lmf")
    shown = capsys.readouterr().out
    rows = [line.removeprefix("| ").split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    assert rows[0] == ["run", "WAR", "UAR", "95 % CI of WAR", "WAR − first", "p", "seeds together |"]
    assert [r[0] for r in rows[2:5]] == ["concat", "lmf", "logistic regression, length, lead-in, loudness (of concat)"]
    assert "–" in rows[2][3]
    assert "[" in rows[3][4]
    assert 0 <= float(rows[3][5]) <= 1
    assert "±" in rows[3][6]
    assert "not compared: weighted_sum: model.streams is ('audio',); weighted_sum reads 2 to 3 streams" in shown
    saved = json.loads((tmp_path / "runs/lmf/config.json").read_text())
    assert (saved["model"]["name"], saved["variants"], saved["train"]["epochs"]) == ("lmf", "audio,lmf", 5)
    compare("--rows=concat,lmf")
    assert "nothing to do" in capsys.readouterr().out, "finished rows are not trained again"


@pytest.mark.thorough
def test_values_are_compared_without_evidence_over_people(compare, tmp_path, capsys):
    synthetic.write_store(tmp_path / "F", synthetic.values(clips=48, speakers=3))
    compare("--markdown", "--rows=concat,lmf")
    shown = capsys.readouterr().out
    rows = [line.removeprefix("| ").split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    assert rows[0] == ["run", "CCC", "Pearson", "CCC − first", "per fold", "seeds together |"]
    assert [r[0] for r in rows[2:4]] == ["concat", "lmf"]
    assert len(rows[3][4].split()) == 3
    assert "Seeds together: CCC of the mean" in shown
    assert "ridge regression, audio (of concat)" in shown
    assert "bootstrap" not in shown
    saved = json.loads((tmp_path / "runs/concat/metrics.json").read_text())
    assert (saved["task"], saved["classes"]) == ("regression", ["valence", "arousal", "dominance"])


def test_mistakes_of_a_comparison_are_named(compare, tmp_path):
    with pytest.raises(AvjaxError, match="is 'nosuch'; choose one of"):
        compare("--rows=nosuch")
    with pytest.raises(AvjaxError, match=r"got 'W'; expected compare --config FILE"):
        compare("W")
    synthetic.write_store(tmp_path / "F", synthetic.make())
    with pytest.raises(AvjaxError, match="no row could be trained: weighted_sum"):
        compare("--rows=weighted_sum")

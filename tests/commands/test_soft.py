"""Soft labels, end to end: learned, measured, reported and predicted."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from scipy.special import softmax

from avjax import config, evaluate, models, tasks
from avjax.datasets import folder, registry
from avjax.errors import AvjaxError
from avjax.evaluation import significance
from avjax.features import store
from avjax.inference import predict as prediction
from avjax.inference import run as runs
from avjax.inference import tables as prediction_tables
from avjax.models.base import Output
from avjax.models.fusions import m2fnet
from tests import clips, synthetic
from tests.commands.test_regression import concat

NAMES = ("happy", "sad", "angry")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return concat(synthetic.soft(), tmp_path_factory.mktemp("runs") / "soft")


@pytest.fixture(scope="module")
def measured(run):
    with np.load(run / "predictions.npz") as rows:
        return json.loads((run / "metrics.json").read_text()), dict(rows)


@pytest.mark.budget(12)
def test_shares_are_recovered(measured):
    _, rows = measured
    assert rows["label"].dtype == np.float32
    np.testing.assert_allclose(rows["label"].sum(-1), 1, rtol=1e-6)
    predicted = softmax(rows["logits_fusion"].astype(float), -1)
    assert np.abs(predicted - rows["label"]).mean() < 0.1
    assert np.corrcoef(predicted.ravel(), rows["label"].ravel())[0, 1] > 0.9
    # Predicting only the largest class would be far from the soft labels.
    assert np.abs(np.eye(3)[rows["label"].argmax(-1)] - rows["label"]).mean() > 0.15


def test_scores_are_against_the_largest_share(measured):
    metrics, rows = measured
    label, predicted = rows["label"].argmax(-1), rows["logits_fusion"].argmax(-1)
    assert metrics["task"] == "soft"
    assert metrics["pooled"]["war"] == pytest.approx(np.mean(label == predicted))
    assert metrics["mean"]["uar"] > 0.8
    assert np.sum(metrics["confusion"], -1).tolist() == np.bincount(label).tolist()
    assert metrics["reference"]["audio"]["mean"]["uar"] > 0.8
    assert set(metrics["heads"]["fusion"]) == {"war", "uar", "f1"}


def test_report_and_tables_are_those_of_classes(run, capsys):
    assert (run / "confusion.png").stat().st_size > 0
    page = (run / "report.html").read_text()
    assert "best validation UAR" in page
    assert "majority class" in page
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(markdown=True):
        evaluate.main(["evaluate", str(run), str(run)])
    assert "| run | WAR | UAR |" in capsys.readouterr().out


def test_runs_are_compared_by_hits(run, measured):
    metrics, _ = measured
    units = significance.read(run)
    assert units.right.sum() / units.count.sum() == pytest.approx(metrics["pooled"]["war"])


def test_predictions_are_shares(run, measured):
    read, features = runs.read_run(run), synthetic.soft()
    predicted = prediction.probabilities(read, features)
    np.testing.assert_allclose(predicted.sum(-1), 1)
    assert np.mean(predicted.argmax(-1) == features.label.argmax(-1)) > 0.8
    one = prediction.Prediction("a.mp4", dict(zip(NAMES, predicted[0].tolist(), strict=True)), "", {})
    record = json.loads(prediction_tables.as_json(read, [one], []))["clips"][0]
    assert record["predicted"] == one.ranked[0][0]
    assert record["probabilities"] == one.scores


def test_a_store_keeps_shares(tmp_path):
    features = synthetic.soft(24)
    synthetic.write_store(tmp_path, features)
    read = store.load(tmp_path, "lite")
    assert (read.task, read.classes) == ("soft", NAMES)
    np.testing.assert_array_equal(read.label, features.label)
    assert read.label.dtype == np.float32


def test_guided_heads_cost_cross_entropy_with_shares_and_nothing_for_classes():
    label = tasks.encoded([(0.5, 0.5, 0)], NAMES, "soft")
    batch = {"label": label, "weight": np.ones(1, np.float32)}
    output = Output({"fusion": np.zeros((1, 3), np.float32)}, {}, {})
    chosen = config.settings("configs/etg_folder.py").model
    losses = models.build(chosen, 3, "soft").loss(output, batch, np.ones(3) / 3)
    np.testing.assert_allclose(losses["fusion"], 2 * np.log(3), rtol=1e-6)
    with pytest.raises(AvjaxError, match="both are for classes"):
        models.build(config.settings("configs/etg_folder.py", model__imbalance="focal").model, 3, "soft")


def test_what_compares_classes_refuses_shares():
    batch = {"label": tasks.encoded([(0.5, 0.5, 0)], NAMES, "soft"), "weight": np.ones(1, np.float32)}
    with pytest.raises(AvjaxError, match="triplets compare classes; the task is 'soft'"):
        m2fnet.m2fnet_loss(None, batch, "soft")


# ---- Folders ------------------------------------------------------------------------------------------------------


def write_folder(root, header, *rows):
    lines = [header]
    for i, row in enumerate(rows):
        clips.write_wav(root / f"{i}.wav")
        lines.append(f"{i}.wav,{row}")
    (root / "labels.csv").write_text("\n".join(lines))
    return root


def test_votes_of_a_folder_become_shares(tmp_path):
    corpus = registry.index("folder", write_folder(tmp_path, "file,share:a,share:b", "3,1", "0.5,0.5", "0,0", "-1,2"))
    assert (corpus.task.kind, corpus.task.classes) == ("soft", ("a", "b"))
    assert [c.label for c in corpus.clips] == [(0.75, 0.25), (0.5, 0.5)]
    assert dict(corpus.rejected) == {
        "2": "share:a, share:b: 0, 0; expected proportions or votes, one above 0 and none below",
        "3": "share:a, share:b: -1, 2; expected proportions or votes, one above 0 and none below",
    }


def test_a_folder_has_one_kind_of_label(tmp_path):
    with pytest.raises(AvjaxError, match="one kind of label: label, value:<name>, is:<name>, share:<name>"):
        folder.read(write_folder(tmp_path, "file,share:a,is:b", "1,1") / "labels.csv")

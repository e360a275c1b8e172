"""`metrics.json` and `predictions.npz`: their shape, and that every score can be made again from the predictions."""

import dataclasses
import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from avjax import config
from avjax.datasets.base import Fold
from avjax.datasets.folds import natural_folds
from avjax.errors import AvjaxError
from avjax.evaluation import baselines, results
from avjax.training import batches
from avjax.training import lanes as lane_plans
from tests import synthetic

PROTOCOL = config.settings("configs/etg_folder.py").protocol


@pytest.fixture(scope="module")
def measured():
    """Made-up predictions over lanes with unequal test parts: (features, plan, rows, metrics)."""
    features = synthetic.make(clips=30, speakers=3)
    ids = features.ids
    folds = [Fold("a", tuple(ids[10:]), tuple(ids[:10])), Fold("b", tuple(ids[:23]), tuple(ids[23:]))]
    plan = lane_plans.plan(features, folds, (42, 43), PROTOCOL)
    rng = np.random.default_rng(0)
    logits = {h: rng.normal(size=(4, plan.lanes.test.shape[1], 3)).astype(np.float32) for h in ("fusion", "audio")}
    rows = results.predictions(features, plan, logits)
    return (
        features,
        plan,
        rows,
        results.measure(features, plan, rows, {"best_epoch": [3, 4, 5, 6]}, "how", {"audio": {}}),
    )


def test_metrics_have_their_keys(measured):
    features, _, _, metrics = measured
    assert {"dataset", "protocol", "task", "counts", "folds", "mean", "std", "pooled"} <= set(metrics)
    assert metrics["counts"] == features.counts
    assert set(metrics["counts"]) == {"used", "quarantined", "masked_audio", "masked_video"}
    assert (metrics["dataset"], metrics["protocol"], metrics["task"]) == ("synthetic", "how", "single")
    keys = {"fold", "seed", "n_train", "n_val", "n_test", "speaker_overlap", "war", "uar", "best_epoch"}
    assert [set(f) for f in metrics["folds"]] == [keys] * 4
    assert [(f["fold"], f["seed"], f["n_test"], f["best_epoch"]) for f in metrics["folds"]] == [
        ("a", 42, 10, 3), ("a", 43, 10, 4), ("b", 42, 7, 5), ("b", 43, 7, 6),
    ]  # fmt: skip
    assert json.loads(json.dumps(metrics)) == metrics


def test_predictions_are_plain_arrays_of_real_clips(measured, tmp_path):
    features, _, rows, _ = measured
    results.write_predictions(tmp_path / "predictions.npz", rows)
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.npz"]
    with np.load(tmp_path / "predictions.npz", allow_pickle=False) as file:
        read = dict(file)
    assert list(read) == ["clip_id", "speaker", "fold", "seed", "label", "logits_fusion", "logits_audio"]
    assert {len(v) for v in read.values()} == {2 * 10 + 2 * 7}
    assert read["clip_id"].tolist() == features.ids[:10] * 2 + features.ids[23:] * 2
    assert read["speaker"].tolist() == [features.speakers[features.ids.index(i)] for i in read["clip_id"]]
    assert read["fold"].tolist() == ["a"] * 20 + ["b"] * 14
    assert read["seed"].tolist() == [42] * 10 + [43] * 10 + [42] * 7 + [43] * 7
    assert read["label"].tolist() == [int(features.label[features.ids.index(i)]) for i in read["clip_id"]]


def test_scores_can_be_made_again_from_the_predictions(measured):
    _, _, rows, metrics = measured
    predicted = rows["logits_fusion"].argmax(-1)
    for fold in metrics["folds"]:
        chosen = (rows["fold"] == fold["fold"]) & (rows["seed"] == fold["seed"])
        assert fold["war"] == pytest.approx(accuracy_score(rows["label"][chosen], predicted[chosen]), abs=1e-12)
        assert fold["uar"] == pytest.approx(
            balanced_accuracy_score(rows["label"][chosen], predicted[chosen]), abs=1e-12
        )
    for key in ("war", "uar"):
        scores = [f[key] for f in metrics["folds"]]
        assert metrics["mean"][key] == pytest.approx(np.mean(scores))
        assert metrics["std"][key] == pytest.approx(np.std(scores))
    assert metrics["pooled"]["war"] == pytest.approx(accuracy_score(rows["label"], predicted))
    assert metrics["pooled"] | {"f1": metrics["f1"]["weighted"]} == metrics["heads"]["fusion"]
    other = balanced_accuracy_score(rows["label"], rows["logits_audio"].argmax(-1))
    assert metrics["heads"]["audio"]["uar"] == pytest.approx(other)
    assert metrics["f1"]["macro"] == pytest.approx(f1_score(rows["label"], predicted, average="macro"))
    assert np.sum(metrics["confusion"]) == len(rows["label"])


def test_answers_that_are_not_finite_are_refused_with_their_clips(measured):
    features, plan, _, _ = measured
    logits = np.zeros((4, plan.lanes.test.shape[1], 3), np.float32)
    logits[2, 7:] = np.nan  # padding
    results.predictions(features, plan, {"fusion": logits})
    logits[2, 1, 0] = np.inf
    with pytest.raises(AvjaxError, match="the predictions for clip024 are not finite"):
        results.predictions(features, plan, {"fusion": logits})


def test_examples_show_tested_clips_once_with_their_answer(measured):
    features, _, rows, _ = measured
    shown = results.examples(features, rows, "both", count=5)
    assert len({e["clip_id"] for e in shown}) == 5
    for e in shown:
        at = rows["clip_id"].tolist().index(e["clip_id"])
        assert e["label"] == features.classes[rows["label"][at]]
        assert e["predicted"] == features.classes[rows["logits_fusion"][at].argmax()]
        assert e["sentence"] == f"sentence {e['clip_id']}"
    assert results.examples(features, rows, "constant") == []


# ---- Regression and multi-label -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[synthetic.values, synthetic.questions], ids=["regression", "multilabel"])
def other(request):
    """`measured` of another task: two seeds of a fold, whose head validation chose."""
    features = request.param(clips=30, speakers=3)
    ids = features.ids
    plan = lane_plans.plan(features, [Fold("a", tuple(ids[12:]), tuple(ids[:12]))], (42, 43), PROTOCOL)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 2, 12, 3)).astype(np.float32)
    logits = {h: features.label[None, :12] + 0.6 * v - 0.5 for h, v in zip(("chosen", "video"), noise, strict=True)}
    rows = results.predictions(features, plan, logits)
    lanes = {"best_epoch": [3, 4], "head": ["video", "audio"]}
    return features, rows, results.measure(features, plan, rows, lanes, "how", {})


def test_other_tasks_are_measured_by_their_own_scores(other):
    features, rows, metrics = other
    names = {"regression": {"ccc", "pearson", "rmse"}, "multilabel": {"wa", "f1"}}[features.task]
    assert json.loads(json.dumps(metrics)) == metrics
    assert (metrics["task"], metrics["classes"]) == (features.task, list(features.classes))
    assert [f["head"] for f in metrics["folds"]] == ["video", "audio"]
    assert set(metrics["pooled"]) == set(metrics["mean"]) == set(metrics["std"]) == names
    assert {name: set(scores) for name, scores in metrics["values"].items()} == dict.fromkeys(features.classes, names)
    assert metrics["pooled"] == metrics["heads"]["chosen"] != metrics["heads"]["video"]
    for name in names:
        assert metrics["pooled"][name] == pytest.approx(np.mean([v[name] for v in metrics["values"].values()]))
    assert not {"confusion", "f1"} & set(metrics)
    assert rows["label"].dtype == features.label.dtype
    np.testing.assert_array_equal(rows["label"], np.tile(features.label[:12], (2, 1)))
    assert results.examples(features, rows, "both") == []


def test_seeds_of_other_tasks_together_are_the_mean_of_their_answers(other):
    features, rows, metrics = other
    mean = rows["logits_chosen"].astype(np.float64).reshape(2, 12, 3).mean(0)
    (fold,) = metrics["together"]["folds"]
    if features.task == "regression":
        errors = np.sqrt(np.square(mean - features.label[:12]).mean(0))
        assert fold["rmse"] == pytest.approx(errors.mean())
    else:
        columns = zip(features.label[:12].T, mean.T > 0, strict=True)
        assert fold["wa"] == pytest.approx(np.mean([balanced_accuracy_score(y, x) for y, x in columns]))


def test_attention_is_named_after_its_clip():
    features = synthetic.make(clips=6)
    made = results.attention(features, [(3, {"video": np.ones((2, 0))})])
    assert made[0]["name"] == f"clip003 ({features.clips[3].label})"
    assert made[0]["video"].shape == (2, 0)


# ---- The conventional yardstick -----------------------------------------------------------------------------------


def yardstick(features, **changes):
    chosen = dataclasses.replace(PROTOCOL, **changes)
    folds, _ = natural_folds(features.clips, features.folds, chosen.folds, chosen.fold_count)
    plan = lane_plans.plan(features, folds, (42, 43), chosen)
    return baselines.yardsticks(batches.resident(features, "both", chosen.standardise), plan)


@pytest.mark.thorough
def test_length_lead_in_and_loudness_have_a_row_of_their_own():
    features = synthetic.make(clips=48, speakers=4)
    surface = np.random.default_rng(0).normal(size=(48, 1, 3)).astype(np.float32)
    surface[:, 0, 1] += 5 * (features.label == 1)  # one class has long lead-ins
    features.arrays["surface"], features.masks["surface"] = surface, np.ones((48, 1), bool)
    given_away = yardstick(features)["length, lead-in, loudness"]
    assert 0.5 < given_away["mean"]["uar"] < 0.9
    features.arrays["surface"] = np.zeros_like(surface)
    assert yardstick(features)["length, lead-in, loudness"]["mean"]["uar"] == pytest.approx(1 / 3)


def test_the_yardstick_is_scikit_learns_on_the_same_folds():
    features = synthetic.make(clips=30, speakers=3, signal=0.6)
    ours = yardstick(features, validation=0.0)
    assert list(ours) == ["audio", "video", "text", "audio+video", "audio+video+text"]
    assert [f["fold"] for f in ours["audio"]["folds"]] == ["s0", "s1", "s2"]  # once, whatever the seeds
    x, mask = features.arrays["audio"], features.masks["audio"]
    pooled = [np.r_[a[m].mean(0), a[m].std(0)] if m.any() else np.zeros(14) for a, m in zip(x, mask, strict=True)]
    pooled, who = np.array(pooled), np.array(features.speakers)
    scores = []
    for speaker in ("s0", "s1", "s2"):
        train, test = who != speaker, who == speaker
        z = (pooled - pooled[train].mean(0)) / pooled[train].std(0)
        model = LogisticRegression(max_iter=5000, class_weight="balanced").fit(z[train], features.label[train])
        scores.append(balanced_accuracy_score(features.label[test], model.predict(z[test])))
    assert ours["audio"]["mean"]["uar"] == pytest.approx(np.mean(scores), abs=1e-9)


def test_the_yardstick_answers_the_only_class_it_knows():
    features = synthetic.make(clips=12, speakers=0, classes=2)
    one = [i for i, y in zip(features.ids, features.label, strict=True) if y == 1]
    fold = Fold("x", tuple(one[:4]), tuple(features.ids[:1] + one[4:]))
    plan = lane_plans.plan(features, [fold], (1,), PROTOCOL)
    out = baselines.yardsticks(batches.resident(features, "both", "train"), plan)
    tested = [features.label[features.ids.index(i)] for i in fold.test]
    assert out["audio"]["mean"]["war"] == pytest.approx(np.mean(np.array(tested) == 1))


def test_the_yardstick_of_values_is_ridge_regression():
    features = synthetic.values(clips=60, speakers=2)
    ours = yardstick(features, validation=0.0)["audio"]
    x, mask = features.arrays["audio"], features.masks["audio"]
    pooled = [np.r_[a[m].mean(0), a[m].std(0)] if m.any() else np.zeros(14) for a, m in zip(x, mask, strict=True)]
    pooled, who = np.array(pooled), np.array(features.speakers)
    errors = []
    for speaker in ("s0", "s1"):
        train, test = who != speaker, who == speaker
        mean, std = pooled[train].mean(0), pooled[train].std(0)
        model = Ridge(1.0).fit((pooled[train] - mean) / std, features.label[train])
        predicted = model.predict((pooled[test] - mean) / std)
        errors.append(np.sqrt(np.square(predicted - features.label[test]).mean(0)).mean())
    assert ours["mean"]["rmse"] == pytest.approx(np.mean(errors), rel=1e-3)
    assert ours["mean"]["ccc"] > 0.9


def test_the_yardstick_of_labels_is_a_logistic_regression_for_each():
    features = synthetic.questions(clips=60, speakers=2)
    ours = yardstick(features, validation=0.0)["audio"]["mean"]["wa"]
    alone = []
    for column in features.label.T:
        single = dataclasses.replace(features, task="single", classes=("no", "yes"), label=column.astype(np.int32))
        alone.append(yardstick(single, validation=0.0)["audio"]["mean"]["uar"])
    assert ours == pytest.approx(np.mean(alone))


def test_seeds_together_are_the_mean_of_their_probabilities(measured):
    _, _, rows, metrics = measured
    for fold in metrics["together"]["folds"]:
        chosen = rows["fold"] == fold["fold"]
        seeds = [chosen & (rows["seed"] == s) for s in (42, 43)]
        probabilities = [np.exp(v := rows["logits_fusion"][c]) / np.exp(v).sum(-1, keepdims=True) for c in seeds]
        right = np.mean(probabilities, 0).argmax(-1) == rows["label"][seeds[0]]
        assert fold["war"] == pytest.approx(right.mean())
    assert [f["fold"] for f in metrics["together"]["folds"]] == ["a", "b"]

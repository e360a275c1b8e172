"""Regression and multi-label end to end: a planted signal is learned, measured, reported and predicted."""

import csv
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

from avjax import config, evaluate, models, train
from avjax.features import extract as extraction
from avjax.inference import predict as prediction
from avjax.inference import run as runs
from avjax.inference import tables as prediction_tables
from avjax.layers import masked_mean
from avjax.models.base import Model, Output, heads_loss
from avjax.training import data
from tests import clips, synthetic

TRAINING = {
    "train__epochs": 40,
    "train__epochs_per_call": 40,
    "train__patience": 0,
    "train__batch_size": 32,
    "train__learning_rate": 1e-2,
    "train__weight_decay": 0.0,
    "train__seeds": (1,),
    "protocol__fold_count": 2,
}


def sized(**settings) -> dict[str, object]:
    return TRAINING | {f"model__settings__{key}": value for key, value in settings.items()}


CONCAT = {"model__streams": ("audio",)} | sized(width=16, hidden=32, dropout=0.0)
DE_III = {"model__streams": ("audio", "video")} | sized(
    width=16, heads=2, depths__audio=1, depths__video=1, kernel=3, expansion=2, output=16, hidden=16, dropout=0.0
)


class Two(nn.Module):
    """Makes linear heads for video, which has no signal, and for audio; video attends to audio."""

    classes: int = 3

    @nn.compact
    def __call__(self, batch, train: bool = False) -> Output:
        means = {s: masked_mean(batch[s], batch[f"{s}_mask"]) for s in ("video", "audio")}
        both = batch["video_mask"][:, :, None] & batch["audio_mask"][:, None, :]
        return Output({s: nn.Dense(self.classes)(x) for s, x in means.items()}, {}, {"video": both.astype(jnp.float32)})


TWO = Model(
    module=Two(),
    loss=lambda output, batch, prior: heads_loss(output, batch, "regression"),
    task="regression",
    heads=("video", "audio"),
    streams=("video", "audio"),
    candidates=("video", "audio"),
    attention_maps=(("video", "video", "audio"),),
)


def trained(features, workdir, spec: str, settings: dict):
    """Trains on available features; returns the run directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "obtain", lambda config, console: features)
        return train.train(config.settings(spec, **settings), workdir)


def concat(features, workdir):
    return trained(features, workdir, "configs/fusion_folder.py:concat", CONCAT)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def linear(run_folder):
    return concat(synthetic.values(), run_folder / "linear")


@pytest.fixture(scope="module")
def permuted(run_folder):
    return concat(synthetic.values(permuted=True), run_folder / "permuted")


@pytest.fixture(scope="module")
def de_iii(run_folder):
    return trained(synthetic.values(), run_folder / "de_iii", "configs/deiii_msp_improv.py", DE_III)


@pytest.fixture(scope="module")
def headed(run_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.REGISTRY, "two", lambda config, classes, task: TWO)
        settings = CONCAT | {"model__name": "two"}
        yield trained(synthetic.values(), run_folder / "headed", "configs/fusion_folder.py:concat", settings)


@pytest.fixture(scope="module")
def asked(run_folder):
    return concat(synthetic.questions(), run_folder / "asked")


def measured(workdir) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(workdir / "predictions.npz") as rows:
        return json.loads((workdir / "metrics.json").read_text()), dict(rows)


def agreement(y: np.ndarray, x: np.ndarray) -> float:
    """Computes the CCC in float64, from its definition (Lin 1989)."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return 2 * np.mean((x - x.mean()) * (y - y.mean())) / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


# ---- Values -------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("run", ["linear", pytest.param("de_iii", marks=pytest.mark.thorough)])
def test_a_planted_relation_is_recovered(run, request):
    metrics, _ = measured(request.getfixturevalue(run))
    assert metrics["mean"]["ccc"] > 0.9
    assert set(metrics["values"]) == {"valence", "arousal", "dominance"}
    for scores in metrics["values"].values():
        assert set(scores) == {"ccc", "pearson", "rmse"}
        assert scores["ccc"] > 0.85


@pytest.mark.budget(15)
def test_permuted_labels_teach_nothing(permuted):
    metrics, _ = measured(permuted)
    assert abs(metrics["pooled"]["ccc"]) < 0.2
    assert all(abs(r["mean"]["ccc"]) < 0.25 for r in metrics["reference"].values())


def test_ccc_is_that_of_the_whole_set_and_can_be_made_again(linear):
    metrics, rows = measured(linear)
    assert rows["label"].dtype == np.float32
    assert rows["label"].shape == rows["logits_fusion"].shape == (480, 3)
    for i, scores in enumerate(metrics["values"].values()):
        y, x = rows["label"][:, i], rows["logits_fusion"][:, i]
        assert scores["ccc"] == pytest.approx(agreement(y, x), abs=1e-9)
        assert scores["rmse"] == pytest.approx(np.sqrt(np.mean(np.square(np.float64(y) - x))), abs=1e-7)
        assert scores["pearson"] == pytest.approx(np.corrcoef(y, x)[0, 1], abs=1e-6)
    assert metrics["pooled"]["ccc"] == pytest.approx(np.mean([s["ccc"] for s in metrics["values"].values()]))
    for fold in metrics["folds"]:
        chosen = rows["fold"] == fold["fold"]
        each = [agreement(rows["label"][chosen, i], rows["logits_fusion"][chosen, i]) for i in range(3)]
        assert fold["ccc"] == pytest.approx(np.mean(each), abs=1e-9)


def test_the_yardstick_is_ridge_regression_and_reads_where_the_relation_is(linear):
    metrics, _ = measured(linear)
    assert metrics["reference"]["audio"]["mean"]["ccc"] > 0.9
    assert abs(metrics["reference"]["video"]["mean"]["ccc"]) < 0.3
    page = (linear / "report.html").read_text()
    assert "ridge regression on pooled features" in page
    assert "best validation CCC" in page
    assert (linear / "scatter.png").stat().st_size > 0
    assert not (linear / "confusion.png").exists()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("run", "heads"),
    [("headed", ["video", "audio"]), pytest.param("de_iii", ["video", "audio", "fusion"], marks=pytest.mark.thorough)],
)
def test_validation_chooses_the_head_of_each_fold(run, heads, request):
    workdir = request.getfixturevalue(run)
    metrics, rows = measured(workdir)
    assert "head: best validation CCC" in metrics["protocol"]
    assert list(metrics["heads"]) == ["chosen", *heads]
    for fold in metrics["folds"]:
        chosen = rows["fold"] == fold["fold"]
        np.testing.assert_array_equal(rows["logits_chosen"][chosen], rows[f"logits_{fold['head']}"][chosen])
        assert f"({fold['head']})" in (workdir / "report.html").read_text()
        assert run != "headed" or fold["head"] == "audio"
    assert metrics["pooled"] == metrics["heads"]["chosen"]
    assert metrics["mean"]["ccc"] > 0.9
    assert "Attention between the modalities" in (workdir / "report.html").read_text()


@pytest.mark.parametrize(
    "run", ["linear", *(pytest.param(r, marks=pytest.mark.thorough) for r in ("headed", "de_iii"))]
)
def test_prediction_repeats_what_training_stored(run, request):
    workdir = request.getfixturevalue(run)
    _, rows = measured(workdir)
    features = synthetic.values()
    for fold in dict.fromkeys(rows["fold"].tolist()):
        predicted = prediction.probabilities(runs.read_run(workdir, fold), features)
        chosen = rows["fold"] == fold
        at = [features.ids.index(i) for i in rows["clip_id"][chosen]]
        key = "logits_chosen" if "logits_chosen" in rows else "logits_fusion"
        np.testing.assert_allclose(predicted[at], rows[key][chosen], atol=1e-5)
    lanes = [prediction.probabilities(runs.read_run(workdir, fold), features) for fold in set(rows["fold"].tolist())]
    np.testing.assert_allclose(prediction.probabilities(runs.read_run(workdir), features), np.mean(lanes, 0), atol=1e-6)


def test_runs_are_compared_by_ccc(linear, permuted, capsys):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(markdown=True):
        evaluate.main(["evaluate", str(linear), str(permuted)])
    rows = [line.removeprefix("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:2] == "| "]
    assert rows[0] == ["run", "CCC", "Pearson", "CCC − first", "per fold |"]
    assert [r[0] for r in rows[2:5]] == ["linear", "permuted", "ridge regression, audio (of linear)"]
    assert rows[3][3].startswith("−")


# ---- Multi-label ----------------------------------------------------------------------------------------------------


def test_labels_are_learned_and_measured(asked):
    metrics, rows = measured(asked)
    assert rows["label"].dtype == bool
    assert metrics["task"] == "multilabel"
    assert list(metrics["values"]) == ["happy", "sad", "angry"]
    assert metrics["mean"]["wa"] > 0.85
    for i, scores in enumerate(metrics["values"].values()):
        truth, predicted = rows["label"][:, i], rows["logits_fusion"][:, i] > 0
        recalls = [(predicted[truth == side] == side).mean() for side in (False, True)]
        assert scores["wa"] == pytest.approx(np.mean(recalls))
    assert metrics["reference"]["audio"]["mean"]["wa"] > 0.85
    assert (asked / "labels.png").stat().st_size > 0
    page = (asked / "report.html").read_text()
    assert "logistic regression on pooled features" in page
    assert "weighted accuracy" in page


def test_labels_are_predicted_as_probabilities_that_need_not_add_up(asked):
    features = synthetic.questions()
    chances = prediction.probabilities(runs.read_run(asked), features)
    assert chances.shape == (480, 3)
    assert ((chances > 0) & (chances < 1)).all()
    assert np.ptp(chances.sum(-1)) > 0.5
    assert ((chances > 0.5) == features.label).mean() > 0.85


# ---- From media files ---------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.weights
@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_from_media_to_predictions(task, tmp_path):
    mark, figure = {"regression": ("value:", "scatter.png"), "multilabel": ("is:", "labels.png")}[task]
    root, rows = tmp_path / "R", []
    for i in range(8):
        clips.write_mp4(root / f"{i}.mp4", seconds=0.4 + 0.05 * i, hz=120 + 60 * i)
        numbers = (i % 2, i // 4) if task == "multilabel" else (i / 8, 1 - i / 8)
        rows.append((f"{i}.mp4", *numbers))
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", f"{mark}high", f"{mark}late"), *rows])
    options = extraction.Options(processes=2)
    extraction.extract("folder", "lite", root=str(root), out=str(tmp_path / "F"), options=options)
    settings = CONCAT | {"train__epochs": 3, "train__epochs_per_call": 3, "data__features": str(tmp_path / "F")}
    workdir = train.train(config.settings("configs/fusion_folder.py:concat", **settings), tmp_path / "W")
    metrics, stored = measured(workdir)
    assert (metrics["task"], metrics["classes"]) == (task, ["high", "late"])
    assert dict(zip(stored["clip_id"].tolist(), stored["label"].tolist(), strict=True)) == {
        name.removesuffix(".mp4"): pytest.approx(list(numbers)) for name, *numbers in rows
    }
    assert (workdir / figure).stat().st_size > 0
    run = runs.read_run(workdir)
    new_clips = prediction.find_clips([str(root / "5.mp4")])
    predicted, rejected = prediction.predict(run, new_clips, Console(quiet=True))
    assert rejected == []
    assert list(predicted[0].scores) == ["high", "late"]
    record = json.loads(prediction_tables.as_json(run, predicted, rejected))["clips"][0]
    assert ("values" in record) == (task == "regression")

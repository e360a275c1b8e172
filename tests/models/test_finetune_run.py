"""A run that trains its encoders: clips, their raw inputs, training, merged weights, predictions for new clips."""

import csv

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from rich.console import Console

from avjax import models, train
from avjax.demo import corpus
from avjax.encoders import formats
from avjax.features import extract as extraction
from avjax.features import store
from avjax.inference import predict as prediction
from avjax.inference import run as runs
from avjax.models.end_to_end import PRETRAINED
from tests import clips, tiny_raw

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(clips, feature store, run directory) of two folds: six clips with a face, one without audio, one without."""
    root = tmp_path_factory.mktemp("raw")
    data, kept = root / "R", root / "F"
    plans = corpus.plans()[:6]
    for plan in plans:
        corpus.write_clip(data, plan)
    names = [str(corpus.clip_path(data, plan).relative_to(data)) for plan in plans]
    clips.write_mp4(data / "mute.mp4", hz=None)
    clips.write_mp4(data / "faceless.mp4")
    rows = [(name, ("angry", "happy")[i % 2]) for i, name in enumerate([*names, "mute.mp4", "faceless.mp4"])]
    with (data / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *rows])
    with pytest.MonkeyPatch.context() as patch:
        tiny_raw.register(patch)
        options = extraction.Options(processes=2)
        extraction.extract("folder", "tiny_raw", root=str(data), out=str(kept), random=True, options=options)
        made = tiny_raw.settings(
            "lora",
            data__features=str(kept),
            protocol__folds="stratified",
            protocol__fold_count=2,
            train__epochs=2,
            train__epochs_per_call=1,
            train__learning_rate=1e-2,
        )
        yield data, kept, train.train(made, root / "W")


def test_merged_weights_are_written_and_hold_the_changes(run):
    _, _, workdir = run
    files = {path.name for path in (workdir / "merged").iterdir()}
    assert files == {f"{fold}-1-{s}.safetensors" for fold in _folds(workdir) for s in ("video", "audio", "text")}
    model = models.build(tiny_raw.settings("lora").model, 2)
    before = model.constants[PRETRAINED]["video"]
    after = unflatten_dict(formats.read(workdir / "merged" / f"{_folds(workdir)[0]}-1-video.safetensors"), sep="/")
    kernel = lambda tree: tree["block_0"]["attention"]["query"]["kernel"]  # noqa: E731
    assert np.abs(kernel(after) - kernel(before)).max() > 1e-6
    np.testing.assert_array_equal(after["patches"]["kernel"], before["patches"]["kernel"])
    assert jax.tree.structure(after) == jax.tree.structure(before)


def _folds(workdir):
    return [fold for fold, _ in runs.read_run(workdir).lanes]


def test_prediction_answers_as_training_did(run):
    """One lane's logits for its test clips, as written by training, out of its checkpoint."""
    _, kept, workdir = run
    one = runs.read_run(workdir, fold=_folds(workdir)[0])
    features = store.load(kept, "tiny_raw")
    predicted = prediction.probabilities(one, features)
    with np.load(workdir / "predictions.npz") as written:
        saved = {key: written[key] for key in written.files}
    rows = [i for i, fold in enumerate(saved["fold"]) if fold == one.lanes[0][0]]
    assert rows
    for i in rows:
        logits = np.float64(saved["logits_fusion"][i])
        expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        np.testing.assert_allclose(predicted[features.ids.index(saved["clip_id"][i])], expected, atol=1e-4)


def test_new_clips_are_measured_and_answered(run):
    data, _, workdir = run
    records = prediction.find_clips([str(data / "mute.mp4"), str(data / "faceless.mp4")])
    predictions, rejected = prediction.predict(runs.read_run(workdir), records, Console(quiet=True))
    assert not rejected
    assert [sorted(p.scores) for p in predictions] == [["angry", "happy"]] * 2
    assert all(sum(p.scores.values()) == pytest.approx(1) for p in predictions)
    assert "sound" in predictions[0].missing
    assert "picture" in predictions[1].missing

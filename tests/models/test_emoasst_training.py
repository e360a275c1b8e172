"""EmoAsst in training: branches that share nothing, labels that stay where they belong, and settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from avjax import config as configs
from avjax import models
from avjax.errors import AvjaxError
from avjax.evaluation import fewshot
from avjax.features.store import Features
from avjax.models import emoasst
from avjax.models.base import Output
from avjax.training import batches, streamed_batches
from tests import prompted
from tests.prompted import Run, equal

FEATURES = prompted.make(signal=1.0)
TRAIN, VAL, TEST = slice(0, 26), slice(26, 36), slice(36, 48)  # of the first lane; the second has a part of TRAIN alone


@pytest.fixture(scope="module")
def trained_run() -> Run:
    return Run(FEATURES).train()


def changed(**arrays) -> Features:
    return dataclasses.replace(FEATURES, arrays=FEATURES.arrays | arrays)


def spoilt(where: slice) -> np.ndarray:
    """The prompts with NaN for some clips."""
    prompts = FEATURES.arrays["prompts"].copy()
    prompts[where] = np.nan
    return prompts


# ---- Branches ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["video", "audio"])
def test_both_branches_together_learn_as_each_alone(trained_run, stream):
    rates = () if stream == "video" else trained_run.config.train.rates
    alone = Run(FEATURES, model__streams=("text", stream), train__rates=rates).train()
    ours, theirs = (flatten_dict(run.state.params, sep="/") for run in (trained_run, alone))
    assert {path.split("/")[0] for path in theirs} >= {"video": {"vfm", "query"}, "audio": {"aa"}}[stream]
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, atol=2e-6, err_msg=path)
    term = trained_run.sums["train_terms"][stream]
    np.testing.assert_allclose(term, alone.sums["train_terms"][stream], atol=1e-4)


@pytest.mark.slow
def test_the_sound_learns_at_a_tenth_of_the_rate():
    """The first step of Adam is as long as the rate."""
    still = {"train__epochs": 1, "train__epochs_per_call": 1, "train__batch_size": 32, "train__weight_decay": 0.0}
    initial = Run(FEATURES, **still)
    first = jax.tree.map(np.asarray, initial.state.params)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b)[0].max()), initial.train().state.params, first)
    vectors = {path: step for path, step in flatten_dict(moved, sep="/").items() if path.endswith("kernel")}
    for path, step in vectors.items():
        if "frame/attention/query" in path or "frame/attention/key" in path or "decoder" in path:
            continue
        of_speech = path.split("/")[0] in ("aa", "project_audio", "express_audio")
        assert step == pytest.approx(1e-4 if of_speech else 1e-3, rel=0.02), path


@pytest.mark.slow
def test_it_learns_and_is_not_traced_again():
    run = Run(FEATURES, train__epochs=30, train__epochs_per_call=15, train__learning_rate=1e-2).train()
    first = jax.tree.map(lambda v: v[:, 0].sum(-1), run.sums["train_terms"])
    run.train()
    last = jax.tree.map(lambda v: v[:, -1].sum(-1), run.sums["train_terms"])
    assert all((last[m] < 0.8 * first[m]).all() for m in ("video", "audio"))
    assert run.trainer.epochs._cache_size() == 1
    labelled, unlabelled = (run.represented(with_label=labelled)["video"] for labelled in (True, False))
    scores = fewshot.query_mismatch(run.plan, FEATURES, labelled, unlabelled)
    assert scores["with_label"] > 0.8 > scores["without_label"] + 0.1 > 0.4


# ---- Labels --------------------------------------------------------------------------------------------------------


@pytest.mark.budget(20)  # compiles what the others share
def test_prompts_of_clips_that_do_not_train_are_never_read(trained_run):
    other = Run(changed(prompts=spoilt(slice(26, 48)))).train()
    equal(other.state, trained_run.state)
    equal(other.sums, trained_run.sums)
    equal(other.represented(), trained_run.represented())
    equal(
        other.trainer.predict(other.state, other.plan.lanes, other.data),
        trained_run.trainer.predict(trained_run.state, trained_run.plan.lanes, trained_run.data),
    )


def test_prompts_of_training_clips_are_read_in_training(trained_run):
    other = Run(changed(prompts=FEATURES.arrays["prompts"][::-1].copy())).train()
    assert np.abs(other.state.params["query"] - trained_run.state.params["query"]).max() > 1e-5


@pytest.mark.slow
def test_features_are_made_without_prompts_and_labels(trained_run):
    blind = dataclasses.replace(changed(prompts=spoilt(slice(0, 48))), label=np.zeros(48, np.int32))
    data = streamed_batches.choose(blind, trained_run.config, trained_run.model.constants)
    equal(trained_run.represented(data), trained_run.represented())
    del data.streams["prompts"], data.streams["prompts_mask"], data.streams["label"]
    equal(trained_run.represented(data), trained_run.represented())
    labelled, plain = trained_run.represented(with_label=True), trained_run.represented()
    assert np.abs(labelled["video"] - plain["video"]).max() > 1e-3
    equal(labelled["audio"], plain["audio"])


@pytest.mark.slow
def test_features_are_those_of_each_lanes_best_parameters(trained_run):
    vectors = trained_run.represented()
    index = jnp.array([47, 3, 5, 30])
    for lane in range(2):
        best, stats = jax.tree.map(lambda v: v[lane], (trained_run.state.best, trained_run.state.stats))  # noqa: B023
        batch = batches.gather(trained_run.data, stats, index, jnp.ones(4))
        output = trained_run.model.module.apply(best, batch)
        for m, x in vectors.items():
            np.testing.assert_allclose(x[lane, np.array(index)], output.features[m], atol=1e-5)
    assert np.abs(vectors["video"][0] - vectors["video"][1]).max() > 1e-3
    assert not vectors["audio"][:, 3].any()
    assert not vectors["video"][:, 5].any()


@pytest.mark.slow
def test_streamed_clips_have_the_same_features(trained_run):
    config = prompted.settings(data__mode="streamed")
    data = streamed_batches.choose(FEATURES, config, trained_run.model.constants)
    assert isinstance(data, streamed_batches.Streamed)
    for m, x in trained_run.represented(data).items():
        np.testing.assert_allclose(x, trained_run.represented()[m], atol=1e-6)


def test_texts_of_another_width_than_the_prompts_are_told():
    wide = dataclasses.replace(FEATURES, constants={"classes": np.eye(3, 9, dtype=np.float32)})
    with pytest.raises(AvjaxError, match=r"texts of width 12, the prompts are of 9: set prompts.preset"):
        Run(wide)


# ---- Settings ------------------------------------------------------------------------------------------------------


def built(variants: str = "", **changes):
    """The model of a configuration; `changes` of `model`, and of `model.settings`."""
    chosen = configs.settings("configs/emoasst_meld.py" + (f":{variants}" if variants else "")).model
    own = {key: value for key, value in changes.items() if not hasattr(chosen, key)}
    top = {key: value for key, value in changes.items() if hasattr(chosen, key)}
    return models.build(dataclasses.replace(chosen, **({"settings": {**chosen.settings, **own}} | top)), 7)


@pytest.mark.parametrize(
    ("variant", "heads", "first"),
    [
        ("", ("both", "video", "audio"), "both_cache"),
        ("tuned", ("both", "video", "audio"), "both_tuned"),
        ("zero", ("both", "video", "audio"), "both_zero"),
        ("video", ("video",), "video_cache"),
        ("audio", ("audio",), "audio_cache"),
        ("utterance", ("both", "video", "audio"), "both_cache"),
    ],
)
def test_a_model_names_its_heads_and_readers(variant, heads, first):
    model = built(variant)
    assert model.heads == tuple(f"{m}_zero" for m in heads)
    assert model.prediction_heads[0] == first
    assert sorted(model.prediction_heads) == sorted(f"{m}_{r}" for m in heads for r in emoasst.READERS)
    assert model.module.prompt == (variant != "utterance")
    assert model.streams == {"video": ("text", "video"), "audio": ("text", "audio")}.get(
        variant, ("text", "audio", "video")
    )


def test_rows_of_the_tables_differ_where_they_say():
    assert built("label_free_query").module == built().module.clone(label_in_query=False)
    assert built("utterance").module == built().module.clone(prompt=False)
    assert built("small").module == built().module.clone(width=128, heads=4, inner=256)
    paper = built().module
    assert (paper.width, paper.heads, paper.inner, paper.queries) == (512, 8, 2048, 1)


def test_the_loss_of_the_pictures_is_a_setting():
    rng, one = np.random.default_rng(0), {"label": jnp.array([0, 1, 1, 0]), "weight": jnp.ones(4)}
    one |= {f"{m}_mask": jnp.ones((4, 1), bool) for m in ("video", "audio")}
    features = {m: jnp.asarray(rng.normal(size=(4, 5)), jnp.float32) for m in ("text", "video", "audio")}
    output = Output({}, features, {})
    plain, other = (built(v).loss(output, one, None) for v in ("", "visual_supcon"))
    equal(plain, emoasst.contrast("clip")(output, one, None))
    equal(other, emoasst.contrast("supcon")(output, one, None))
    assert np.abs(plain["video"] - other["video"]).max() > 0.1
    equal(plain["audio"], other["audio"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 2}, "model.settings key is 'depth'; choose one of width, heads"),
        ({"visual_loss": "triplet"}, "visual_loss is 'triplet'; choose one of clip, supcon"),
        ({"shots": 0}, "shots is 0; expected at least 1"),
        ({"reader": "probe"}, "reader is 'probe'; choose one of cache, tuned, zero"),
        ({"streams": ("text",)}, "reads video, audio or both"),
        ({"streams": ("text", "flow", "video")}, "reads video, audio or both"),
        ({"streams": ("video",), "prompt": False}, "add text to model.streams"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(AvjaxError, match=message):
        built(**changes)

"""The compiled protocol: lanes alone and together, selection, early stopping, resuming, and values that blow up.

A small model with dropout stands in for a real one where only the loop is looked at.
"""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import config, models
from avjax.datasets.base import Fold
from avjax.errors import AvjaxError
from avjax.evaluation import results
from avjax.layers import masked_mean
from avjax.models.base import Model, Output
from avjax.settings import Settings
from avjax.tasks import losses
from avjax.training import batches, history, loop
from avjax.training import lanes as lane_plans
from avjax.training.checkpoint import Checkpoints
from tests import synthetic

FEATURES = synthetic.make(signal=0.5)
IDS = FEATURES.ids
# Unequal training parts, so that the second lane is padded; the same clips are tested in both.
FOLDS = (
    Fold("long", tuple(IDS[:26]), tuple(IDS[36:]), tuple(IDS[26:36])),
    Fold("short", tuple(IDS[:9]), tuple(IDS[36:]), tuple(IDS[26:33])),
)
TRAIN, VAL, TEST = slice(0, 26), slice(26, 36), slice(36, 48)


class Small(nn.Module):
    """Reads the audio and the text of a clip."""

    classes: int = 3

    @nn.compact
    def __call__(self, batch, train: bool = False) -> Output:
        vectors = [masked_mean(batch[s], batch[f"{s}_mask"]) for s in ("audio", "text")]
        x = nn.Dropout(0.3, deterministic=not train)(jnp.concatenate(vectors, -1))
        return Output({"fusion": nn.Dense(self.classes)(nn.relu(nn.Dense(8)(x)))}, {}, {})


def small_loss(output, batch, prior):
    return {"fusion": losses.cross_entropy(output.logits["fusion"], batch["label"])}


SMALL = Model(module=Small(), loss=small_loss, heads=("fusion",), streams=("audio", "text"))


def settings(**more):
    chosen = {"train__epochs": 8, "train__epochs_per_call": 4, "train__batch_size": 8, "train__learning_rate": 0.02}
    return config.settings("configs/etg_folder.py", **(chosen | {"train__patience": 0} | more))


@functools.cache
def trainer_of(model: Model, chosen: str) -> loop.Trainer:
    """Compiled once for all runs of equal settings; the data are arguments."""
    return loop.make(model, Settings.of(json.loads(chosen)))


class Run:
    """A protocol that is trained call by call."""

    def __init__(self, features=FEATURES, folds=FOLDS, seeds=(1, 2), model=SMALL, **more):
        self.config, self.features, self.model = settings(**more), features, model
        self.plan = lane_plans.plan(features, folds, seeds, self.config.protocol, model.turns)
        self.data = batches.resident(features, "both", self.config.protocol.standardise)
        self.trainer = trainer_of(model, json.dumps(self.config.to_dict()))
        self.state = self.trainer.init(self.plan.lanes, self.data)
        self.done, self.rows, self.sums = 0, [], None

    def call(self, times: int = 1) -> "Run":
        for _ in range(times):
            first = self.done + 1
            self.state, self.sums = self.trainer.epochs(self.state, self.plan.lanes, self.data, jnp.int32(first))
            self.rows += history.epoch_rows(self.sums, self.plan.names, first, self.model)
            self.done += self.config.train.epochs_per_call
        return self

    def check(self) -> None:
        first = self.done + 1 - self.config.train.epochs_per_call
        history.check_finite(self.sums, self.plan, self.features.ids, first, self.config.train.batch_size)

    def predictions(self) -> np.ndarray:
        return np.asarray(self.trainer.predict(self.state, self.plan.lanes, self.data)["fusion"])


def poisoned(where: slice, value: float, labels: bool = False):
    made = synthetic.make(signal=0.5)
    for name, array in made.arrays.items():
        array[where][made.masks[name][where]] = value
    if labels:
        made.label[where] = (made.label[where] + 1) % 3
    return made


def equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def full() -> Run:
    return Run().call(2)


# ---- Lanes --------------------------------------------------------------------------------------------------------


@pytest.mark.budget(12)
@pytest.mark.parametrize("lane", [1, 2])
def test_a_lane_gives_the_same_numbers_as_the_run_alone(full, lane):
    (fold, seed), fold_at = full.plan.names[lane], lane // 2
    alone = Run(folds=FOLDS[fold_at : fold_at + 1], seeds=(seed,)).call(2)
    assert alone.plan.names == [(fold, seed)]
    ours = jax.tree.map(lambda v: v[lane], full.state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], atol=2e-5), ours, alone.state)
    np.testing.assert_allclose(full.predictions()[lane], alone.predictions()[0], atol=2e-5)
    mine = [r for r in full.rows if (r["fold"], r["seed"]) == (fold, seed)]
    assert len(mine) == len(alone.rows) == 8
    for row, other in zip(mine, alone.rows, strict=True):
        assert row.keys() == other.keys()
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=2e-5)
        assert row["val_uar"] == pytest.approx(other["val_uar"], abs=1e-6)


def test_batches_of_padding_alone_make_no_step(full):
    # Batches of 8: 26 clips make 4 steps an epoch, 9 clips 2, though they are padded to 4.
    assert full.state.step.tolist() == [8 * 4, 8 * 4, 8 * 2, 8 * 2]


def test_seeds_differ_and_the_planted_signal_is_learnt(full):
    kernels = np.asarray(full.state.params["Dense_0"]["kernel"])
    assert np.abs(kernels[0] - kernels[1]).max() > 0.05
    assert full.rows[-4]["train_loss"] < 0.7 * full.rows[0]["train_loss"]


def test_nothing_is_traced_again():
    traces = []

    def loss(*args):
        traces.append(args)
        return small_loss(*args)

    run = Run(model=SMALL.replace(loss=loss)).call()
    before = len(traces)
    run.call(3)
    assert len(traces) == before > 0
    assert run.trainer.epochs._cache_size() == 1


# ---- Selection ----------------------------------------------------------------------------------------------------


def test_the_best_epoch_is_the_one_with_the_best_validation_uar_then_loss(full):
    for lane, name in enumerate(full.plan.names):
        rows = [r for r in full.rows if (r["fold"], r["seed"]) == name]
        best = max(rows, key=lambda r: (r["val_uar"], -r["val_loss"]))
        assert int(full.state.best_epoch[lane]) == best["epoch"]
        assert float(full.state.best_score[lane]) == pytest.approx(best["val_uar"])
    assert set(full.state.best_epoch.tolist()) != {8}


def test_predictions_are_by_the_best_parameters(full):
    lane = int(jnp.argmin(full.state.best_epoch))  # not the last epoch
    state = jax.tree.map(lambda v: v[lane], full.state)
    batch = batches.gather(full.data, state.stats, jnp.arange(36, 48), jnp.ones(12))
    expected = SMALL.module.apply(state.best, batch).logits["fusion"]
    np.testing.assert_allclose(full.predictions()[lane], expected, atol=1e-5)


def test_the_last_epoch_is_taken_where_asked_for():
    run = Run(protocol__select="last", train__epochs=6).call(2)
    assert set(run.state.best_epoch.tolist()) == {6}  # though a call goes on to epoch 8
    assert max(r["epoch"] for r in run.rows) == 6
    assert bool(run.state.stopped.all())
    equal(run.state.best, {"params": run.state.params})


@pytest.mark.parametrize("value", [1e30, np.nan])
def test_test_clips_play_no_part(full, value):
    spoilt = Run(poisoned(TEST, value, labels=True)).call(2)
    equal(spoilt.state, full.state)
    assert spoilt.rows == full.rows


def test_validation_clips_do_not_train(full):
    spoilt = Run(poisoned(VAL, 3.0, labels=True)).call(2)
    equal(spoilt.state.params, full.state.params)
    equal(spoilt.state.stats, full.state.stats)
    assert [r["val_loss"] for r in spoilt.rows] != [r["val_loss"] for r in full.rows]


# ---- Early stopping -----------------------------------------------------------------------------------------------


def test_a_lane_stops_after_patience_epochs_without_a_better_score():
    still = Run(train__learning_rate=1e-30, train__patience=2).call()
    assert set(still.state.best_epoch.tolist()) == {1}
    assert [r["epoch"] for r in still.rows] == [1] * 4 + [2] * 4 + [3] * 4
    assert bool(still.state.stopped.all())


def test_a_stopped_lane_keeps_its_state_while_the_others_go_on():
    run = Run().call()
    run.state = run.state.replace(stopped=jnp.array([False, True, False, True]))
    before = jax.device_get(run.state)
    run.call()
    for lane in (1, 3):
        equal(*(jax.tree.map(lambda v, at=lane: v[at], s) for s in (before, run.state)))
    for lane in (0, 2):
        assert int(run.state.step[lane]) == 2 * int(before.step[lane])
    assert {r["seed"] for r in run.rows if r["epoch"] > 4} == {1}


# ---- Resuming -----------------------------------------------------------------------------------------------------


def test_restored_run_goes_on_bit_for_bit(full, tmp_path):
    run = Run().call()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(run.state) is None
        checkpoints.save(4, run.state)
        run.call()  # the saved arrays are donated
    fresh = Run()
    with Checkpoints(tmp_path) as checkpoints:
        fresh.done, fresh.state = checkpoints.restore(fresh.state)
    assert fresh.done == 4
    fresh.call()
    equal(fresh.state, full.state)
    equal(run.state, full.state)
    before = fresh.trainer.epochs._cache_size()
    fresh.call()
    assert fresh.trainer.epochs._cache_size() == before


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for epoch in (1, 2, 3):
            checkpoints.save(epoch, {"x": jnp.full(2, epoch)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    with Checkpoints(tmp_path) as checkpoints:
        epoch, state = checkpoints.restore({"x": jnp.zeros(2, jnp.int32)})
    assert epoch == 3
    assert state["x"].tolist() == [3, 3]


# ---- Values that blow up ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["text_both", "audio"])
def test_a_loss_that_is_not_finite_names_its_clips(stream):
    features = synthetic.make()
    features.arrays[stream][4, 0, 0] = np.inf
    run = Run(features).call()
    with pytest.raises(
        AvjaxError, match=r"loss 'fusion' is not finite at fold \w+, seed \d, epoch 1, step \d; "
    ) as caught:
        run.check()
    named = str(caught.value).partition("clips: ")[2].partition(".")[0].split(", ")
    assert "clip004" in named
    assert len(named) <= 8
    step = int(str(caught.value).partition("step ")[2][0])
    at = run.plan.names.index(("long", 1)) if "fold long, seed 1" in str(caught.value) else None
    terms = np.asarray(run.sums["train_terms"]["fusion"])
    assert np.isfinite(terms[:, 0, :step]).all()
    assert at is None or not np.isfinite(terms[at, 0, step])


def test_a_validation_loss_that_is_not_finite_names_its_clips():
    run = Run(poisoned(slice(30, 31), np.nan)).call()
    with pytest.raises(
        AvjaxError, match="the validation loss is not finite at fold long, seed 1, epoch 1; clips: clip026"
    ):
        run.check()


def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is():
    def loss(output, batch, prior):
        logits = output.logits["fusion"]
        # The root's slope is infinite at 0.
        return {"fusion": losses.cross_entropy(logits, batch["label"]) + jnp.sqrt(jnp.sum(0 * logits, -1))}

    run = Run(model=SMALL.replace(loss=loss)).call()
    with pytest.raises(AvjaxError, match="the gradient is not finite at fold long, seed 1, epoch 1, step 0"):
        run.check()


def test_finite_runs_pass(full):
    assert full.check() is None


# ---- Small and uneven sets ----------------------------------------------------------------------------------------


def test_one_class_to_train_on_nothing_to_validate_on_and_one_clip_to_test_on():
    one = [i for i, y in zip(IDS, FEATURES.label, strict=True) if y == 1]
    run = Run(folds=[Fold("one", tuple(one), tuple(IDS[:1]))], protocol__validation=0.0).call(2)
    run.check()
    assert run.predictions().shape == (2, 1, 3)
    assert set(run.predictions().argmax(-1).ravel().tolist()) == {1}
    assert set(run.state.best_epoch.tolist()) == {8}  # the last one
    assert not any("val_uar" in r for r in run.rows)


def recalls(imbalance: str, folds, features) -> np.ndarray:
    """Recall per class over the test clips."""
    loss = models.build(settings(model__imbalance=imbalance).model, 2).loss
    run = Run(features, folds, (1,), SMALL.replace(module=Small(2), loss=loss), protocol__select="last").call(2)
    run.check()
    label = features.label[np.asarray(run.plan.lanes.test[0])]
    predicted = np.argmax(run.predictions()[0], -1)
    return np.array([(predicted[label == c] == c).mean() for c in range(2)])


@pytest.mark.thorough
def test_options_against_imbalance_raise_the_recall_of_a_rare_class():
    features = synthetic.make(clips=160, classes=2, signal=0.35)
    by_class = [[i for i, y in zip(features.ids, features.label, strict=True) if y == c] for c in range(2)]
    train = (*by_class[0][:50], *by_class[1][:6])
    fold = Fold("rare", train, tuple(set(features.ids) - set(train)), (by_class[1][6],))
    plain = recalls("none", [fold], features)
    for option in ("class_weights", "logit_adjustment"):
        helped = recalls(option, [fold], features)
        assert helped[1] > plain[1] + 0.1, option
        assert helped.mean() > plain.mean(), option


# ---- Conversations, and variables that are no parameters ----------------------------------------------------------


class Talk(nn.Module):
    """Reads a turn's audio and the mean of its conversation's."""

    classes: int = 3

    @nn.compact
    def __call__(self, batch, train: bool = False) -> Output:
        turns = masked_mean(batch["audio"], batch["audio_mask"])
        all_turns = masked_mean(turns, batch["turn_mask"])[:, None]
        joined = jnp.concatenate([turns, jnp.broadcast_to(all_turns, turns.shape)], -1)
        return Output({"fusion": nn.Dense(self.classes)(joined)}, {}, {})


TALK = Model(module=Talk(), loss=small_loss, heads=("fusion",), streams=("audio",), turns=True)


def with_dialogues(dialogue):
    clips = [dataclasses.replace(c, dialogue=dialogue(i), turn=i) for i, c in enumerate(FEATURES.clips)]
    return dataclasses.replace(FEATURES, clips=clips)


def run_talk(features) -> tuple[Run, dict[str, np.ndarray]]:
    run = Run(features, model=TALK).call(2)
    run.check()
    rows = results.predictions(features, run.plan, {"fusion": run.predictions()})
    return run, rows


@pytest.mark.budget(8)
def test_conversations_are_trained_and_every_test_clip_is_answered_once():
    run, rows = run_talk(with_dialogues(lambda i: f"d{i // 5}"))
    assert run.rows[-1]["train_loss"] < run.rows[0]["train_loss"]
    assert sorted(rows["clip_id"]) == sorted(IDS[TEST] * 4)
    apart = run_talk(with_dialogues(lambda i: None))[1]
    order, other = (np.lexsort((r["seed"], r["fold"], r["clip_id"])) for r in (rows, apart))
    assert np.abs(rows["logits_fusion"][order] - apart["logits_fusion"][other]).max() > 1e-3, "context is read"


def test_a_model_of_conversations_answers_a_clip_alone():
    run, rows = run_talk(with_dialogues(lambda i: None))
    read = loop.read_clips(TALK, lambda output, _: output.logits["fusion"])
    logits = np.asarray(read(run.state.best, run.state.best_head, run.state.stats, run.data))
    first = (rows["fold"] == "long") & (rows["seed"] == 1)
    np.testing.assert_allclose(logits[0][TEST], rows["logits_fusion"][first], atol=1e-5)


class Normed(Small):
    """With a batch norm, whose statistics training moves."""

    @nn.compact
    def __call__(self, batch, train: bool = False) -> Output:
        x = masked_mean(batch["audio"], batch["audio_mask"])
        x = nn.BatchNorm(momentum=0.5)(x, use_running_average=not self.is_mutable_collection("batch_stats"))
        return Output({"fusion": nn.Dense(self.classes)(x)}, {}, {})


def test_running_statistics_move_in_training_and_answer_afterwards():
    run = Run(model=Model(module=Normed(), loss=small_loss, heads=("fusion",), streams=("audio",)))
    before = jax.tree.map(np.asarray, run.state.running)
    run.call(2)
    after = run.state.best["batch_stats"]["BatchNorm_0"]["mean"]
    assert np.abs(after - before["batch_stats"]["BatchNorm_0"]["mean"]).max() > 0.01
    assert run.rows[-1]["train_loss"] < run.rows[0]["train_loss"]

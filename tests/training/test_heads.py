"""Heads among which validation selects, and attention for plots."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.datasets.base import Fold
from avjax.evaluation import predictor
from avjax.layers import masked_mean
from avjax.models.base import Model, Output, heads_loss
from avjax.training import batches, history, loop
from avjax.training.checkpoint import Checkpoints
from tests import synthetic
from tests.training.test_loop import SMALL, Run, equal, settings


class Heads(nn.Module):
    """A head for audio and one for video; attention is NaN where a step is padding."""

    classes: int = 3

    @nn.compact
    def __call__(self, batch, train: bool = False) -> Output:
        logits = {s: nn.Dense(self.classes)(masked_mean(batch[s], batch[f"{s}_mask"])) for s in ("audio", "video")}
        real = batch["video_mask"][:, :, None] & batch["audio_mask"][:, None, :]
        position = jnp.arange(real.shape[1])[:, None] + 100 * jnp.arange(real.shape[2])[None]
        return Output(logits, {}, {"video": jnp.where(real, position[None], jnp.nan)})


def of_heads(output, batch, prior):
    return heads_loss(output, batch, "single")


HEADS = Model(
    module=Heads(),
    loss=of_heads,
    heads=("audio", "video"),
    streams=("audio", "video"),
    candidates=("audio", "video"),
    attention_maps=(("video", "video", "audio"),),
)
PARTS = {"train": slice(0, 36), "deaf": slice(36, 48), "blind": slice(48, 60), "test": slice(60, 72)}


def halves():
    """Clips with uninformative video in one part, and uninformative audio in another."""
    made = synthetic.make(clips=72, signal=2.0)
    for part, stream in (("deaf", "audio"), ("blind", "video")):
        made.arrays[stream][PARTS[part]] = made.arrays[stream][PARTS["train"]][:12]
        made.masks[stream][PARTS[part]] = made.masks[stream][PARTS["train"]][:12]
    return made


def run_heads(features=None) -> Run:
    features = features or halves()
    ids = {part: tuple(features.ids[where]) for part, where in PARTS.items()}
    return Run(features, [Fold(part, ids["train"], ids["test"], ids[part]) for part in ("deaf", "blind")], model=HEADS)


@pytest.fixture(scope="module")
def headed() -> Run:
    return run_heads().call(2)


@pytest.mark.budget(8)
def test_validation_chooses_the_head_of_each_lane(headed):
    assert headed.plan.names == [("deaf", 1), ("deaf", 2), ("blind", 1), ("blind", 2)]
    assert [HEADS.heads[i] for i in headed.state.best_head.tolist()] == ["video", "video", "audio", "audio"]
    assert HEADS.prediction_heads == ("chosen", "audio", "video")
    logits = jax.device_get(headed.trainer.predict(headed.state, headed.plan.lanes, headed.data))
    assert set(logits) == set(HEADS.prediction_heads)
    for lane, head in enumerate(["video", "video", "audio", "audio"]):
        np.testing.assert_array_equal(logits["chosen"][lane], logits[head][lane])
    state, read = headed.state, loop.read_clips(HEADS, predictor.Heads(HEADS).read)
    every = read(state.best, state.best_head, state.stats, headed.data)
    np.testing.assert_allclose(every[:, PARTS["test"]], logits["chosen"], atol=1e-5)


def test_attention_of_a_shortened_stream_is_that_of_its_steps_with_weight():
    weights = np.array([[0.0, 0, 0], [0.5, 0.5, 0], [0.3, 0.7, 0]])
    real = loop._of_real_steps(weights, [np.array([True, False, True]), np.ones(6, bool)])
    np.testing.assert_array_equal(real, [[0, 0], [0.3, 0.7]])


def test_rows_show_the_head_that_would_be_chosen(headed):
    among = loop.candidates(HEADS)
    both = history.epoch_rows(headed.sums, headed.plan.names, 5, HEADS)
    each = [HEADS.replace(candidates=(HEADS.heads[head],)) for head in among]
    alone = [history.epoch_rows(headed.sums, headed.plan.names, 5, model) for model in each]
    for row, *each in zip(both, *alone, strict=True):
        assert row["val_uar"] == max(r["val_uar"] for r in each)
    assert {row["fold"]: row["val_uar"] for row in both}["deaf"] > {r["fold"]: r["val_uar"] for r in alone[0]}["deaf"]


def test_the_chosen_head_is_kept_where_a_run_is_cut(headed, tmp_path):
    run = run_heads().call()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, run.state)
    fresh = run_heads()
    with Checkpoints(tmp_path) as checkpoints:
        fresh.done, fresh.state = checkpoints.restore(fresh.state)
    assert fresh.state.best_head.tolist() == run.state.best_head.tolist()
    equal(fresh.call().state, headed.state)


def test_test_clips_play_no_part_in_the_choice_of_a_head(headed):
    features = halves()
    for stream in ("audio", "video"):
        features.arrays[stream][PARTS["test"]] = np.nan
    features.label[PARTS["test"]] = 0
    equal(run_heads(features).call(2).state, headed.state)


def confusions(*right: int) -> jax.Array:
    """A table of 12 clips for each head, so many of them right."""
    return jnp.stack([jnp.diag(jnp.full(3, n / 3)) + jnp.roll(jnp.eye(3), 1, 1) * (12 - n) / 3 for n in right])


def selected(state: loop.State, epoch: int, tables: jax.Array, loss: float = 1.0, **more) -> loop.State:
    val = {"val_tables": tables, "val_loss": jnp.float32(12 * loss), "val_size": jnp.sum(tables[0])}
    return loop.select(loop.recipe_of(HEADS, settings(**more)), state, val, jnp.int32(epoch))


def test_epoch_and_head_are_chosen_together():
    state = jax.tree.map(lambda v: v[0], run_heads().state)
    scores = [(3, 6), (9, 6), (9, 9), (3, 12), (12, 12)]  # of each head, epoch by epoch
    chosen = []
    for epoch, right in enumerate(scores, 1):
        state = selected(state, epoch, confusions(*right))
        chosen.append((int(state.best_epoch), int(state.best_head)))
    assert chosen == [(1, 1), (2, 0), (2, 0), (4, 1), (4, 1)]
    assert int(selected(state, 6, confusions(3, 12), loss=0.5).best_epoch) == 6, "ties go to the smaller loss"


def test_without_a_choice_the_first_head_predicts():
    state = jax.tree.map(lambda v: v[0], run_heads().state)
    for made in (
        selected(state, 2, confusions(3, 6), protocol__select="last"),
        selected(state, 2, 0 * confusions(3, 6)),
    ):
        assert (int(made.best_epoch), int(made.best_head)) == (2, 0)
    assert loop.with_chosen(SMALL, {"fusion": 0}, 0) == {"fusion": 0}
    assert SMALL.prediction_heads == ("fusion",)


def test_attention_is_shown_of_real_steps_alone():
    features = halves()
    run = run_heads(features)
    lanes = run.plan.lanes.replace(test=run.plan.lanes.test.at[:, 1].set(3).at[:, 2].set(5))  # no audio; no video
    by_clip = loop.attention(HEADS, run.state, run.plan.replace(lanes=lanes), run.data)
    assert [clip for clip, _ in by_clip] == [60, 3, 5]
    for clip, maps in by_clip:
        t, s = (int(features.masks[stream][clip].sum()) for stream in ("video", "audio"))
        assert maps.keys() == {"video"}
        np.testing.assert_array_equal(maps["video"], np.arange(t)[:, None] + 100 * np.arange(s)[None])
    assert len(loop.attention(HEADS, run.state, run.plan, run.data, count=2)) == 2


# ---- Values -------------------------------------------------------------------------------------------------------


def concordance(label: np.ndarray, prediction: np.ndarray) -> float:
    """The mean CCC of columns, in float64 (Lin 1989)."""
    x, y = prediction.astype(np.float64), label.astype(np.float64)
    shared = 2 * np.mean((x - x.mean(0)) * (y - y.mean(0)), 0)
    return float(np.mean(shared / (x.var(0) + y.var(0) + (x.mean(0) - y.mean(0)) ** 2)))


@pytest.mark.thorough
def test_values_are_validated_as_one_set_however_many_batches_it_takes():
    features = synthetic.values(clips=150)
    ids = features.ids
    fold = Fold("x", tuple(ids[:60]), tuple(ids[:2]), tuple(ids[60:]))  # 90 clips: two batches
    model = SMALL.replace(loss=of_heads, task="regression")
    run = Run(features, [fold], (1,), model, train__epochs=4).call()
    run.check()
    state = jax.tree.map(lambda v: v[0], run.state)
    batch = batches.gather(run.data, state.stats, jnp.arange(60, 150), jnp.ones(90))
    prediction = model.module.apply({"params": state.params}, batch).logits["fusion"]
    expected = concordance(features.label[60:], np.asarray(prediction))
    assert run.rows[-1].keys() >= {"val_ccc", "val_pearson", "val_rmse"}
    assert run.rows[-1]["val_ccc"] == pytest.approx(expected, abs=1e-4)
    assert run.rows[-1]["val_loss"] == pytest.approx(1 - expected, abs=1e-4)
    assert int(run.state.best_epoch[0]) == max(run.rows, key=lambda r: r["val_ccc"])["epoch"]

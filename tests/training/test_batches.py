"""Lanes, statistics and batches: what a lane may see, and that padding changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import config
from avjax.datasets.base import Fold
from avjax.datasets.folds import natural_folds
from avjax.errors import AvjaxError
from avjax.training import batches, standardise
from avjax.training import lanes as lane_plans
from tests import synthetic


def protocol(**changes):
    return dataclasses.replace(config.settings("configs/etg_folder.py").protocol, **changes)


def planned(features, seeds=(1,), **changes) -> lane_plans.LanePlan:
    chosen = protocol(**changes)
    folds, _ = natural_folds(features.clips, features.folds, chosen.folds, chosen.fold_count)
    return lane_plans.plan(features, folds, seeds, chosen)


def part(plan: lane_plans.LanePlan, lane: int, name: str) -> set[int]:
    index, weight = np.asarray(getattr(plan.lanes, name)), np.asarray(getattr(plan.lanes, f"{name}_weight"))
    return set(index[lane][weight[lane] > 0].tolist())


# ---- Standardisation ----------------------------------------------------------------------------------------------


def worked_out(x, mask, clips) -> tuple[np.ndarray, np.ndarray]:
    """Mean and floored standard deviation in float64 over all valid steps of `clips`."""
    steps = np.concatenate([np.float64(x[i][mask[i]]) for i in clips])
    return steps.mean(0), np.maximum(steps.std(0), standardise.STD_FLOOR)


def test_statistics_are_those_of_float64_even_far_from_zero():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 5, 3)).astype(np.float32)
    x[..., 1] += 3000
    x[..., 2] = 0.5  # a dimension that never moves
    mask = rng.random((6, 5)) < 0.7
    group, counted = np.array([0, 1, 0, 1, 1, 2]), np.array([1, 1, 1, 0, 1, 0], np.float32)
    x[3], x[5, 0], x[0][~mask[0]] = np.float32(3e38), np.nan, np.inf  # not counted, not counted, masked
    mean, std = standardise.statistics(x, mask, group, jnp.asarray(counted), 3)
    for g, clips in enumerate([(0, 2), (1, 4)]):
        expected = worked_out(x, mask, clips)
        np.testing.assert_allclose(mean[g], expected[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(std[g], expected[1], rtol=1e-3)
    np.testing.assert_array_equal(mean[2], 0)  # a group without a counted clip is left as it is
    np.testing.assert_array_equal(std[2], 1)


def test_a_broken_clip_does_not_spoil_the_statistics_of_the_others():
    x, mask = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32), np.ones((4, 3), bool)
    x[1, 2, 0] = np.inf
    mean, std = standardise.statistics(x, mask, np.zeros(4, np.int32), jnp.ones(4), 1)
    mask[1, 2] = False
    expected = worked_out(x, mask, range(4))
    np.testing.assert_allclose(mean[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(std[0], expected[1], rtol=1e-5)


def test_statistics_come_from_training_clips_only():
    features = synthetic.make()
    plan = planned(features)
    data = batches.resident(features, "both", "train")
    train = part(plan, 0, "train")
    clean = batches.lane_statistics(data, plan.lanes.counted[0])
    assert clean.keys() == {"video", "audio"}
    for stream in clean:
        mean, std = worked_out(features.arrays[stream], features.masks[stream], sorted(train))
        np.testing.assert_allclose(clean[stream][0][0], mean, atol=1e-5)
        np.testing.assert_allclose(clean[stream][1][0], std, atol=1e-5)
    for clip in set(range(len(features.ids))) - train:
        for stream in clean:
            features.arrays[stream][clip] = 1e30
    poisoned = batches.lane_statistics(batches.resident(features, "both", "train"), plan.lanes.counted[0])
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)


@pytest.mark.parametrize("how", ["speaker", "enrol"])
def test_speakers_are_standardised_by_their_own_clips(how):
    features = synthetic.make(speakers=3)
    plan = planned(features, seeds=(1, 2), standardise=how, enrol_clips=4)
    data = batches.resident(features, "both", how)
    tested = set.union(*(part(plan, i, "test") for i in range(6)))
    enrolled = set(range(48)) - tested
    assert len(enrolled) == (3 * 4 if how == "enrol" else 0)
    for lane in range(6):
        stats = batches.lane_statistics(data, plan.lanes.counted[lane])
        for i in (0, 1, 2):  # one clip of each speaker
            own = [j for j in range(48) if features.speakers[j] == features.speakers[i]]
            used = [j for j in own if j in enrolled] if how == "enrol" else own
            mean, std = worked_out(features.arrays["audio"], features.masks["audio"], used)
            batch = batches.gather(data, stats, jnp.array([i]), jnp.ones(1))
            valid = features.masks["audio"][i]
            expected = (features.arrays["audio"][i][valid] - mean) / std
            np.testing.assert_allclose(batch["audio"][0][valid], expected, atol=1e-4)
            np.testing.assert_array_equal(batch["audio"][0][~valid], 0)


def test_enrolment_clips_do_not_depend_on_labels_and_are_named():
    features = synthetic.make(speakers=3)
    plan = planned(features, standardise="enrol", enrol_clips=4)
    assert "4 enrolment clips per speaker not scored" in plan.notes
    other = dataclasses.replace(features, label=np.zeros_like(features.label))
    np.testing.assert_array_equal(
        plan.lanes.counted, planned(other, seeds=(9,), standardise="enrol", enrol_clips=4).lanes.counted
    )


def test_text_enters_as_it_is_and_the_chosen_source_only():
    features = synthetic.make()
    features.arrays["text_audio"] = features.arrays["text_audio"] + 1
    data = batches.resident(features, "audio", "train")
    batch = batches.gather(data, batches.lane_statistics(data, jnp.ones(48)), jnp.array([2, 7]), jnp.ones(2))
    np.testing.assert_array_equal(batch["text"], features.arrays["text_audio"][[2, 7]])
    assert set(batch) == {"label", "weight", *synthetic.SIZES, *(f"{s}_mask" for s in synthetic.SIZES)}


# ---- Lanes --------------------------------------------------------------------------------------------------------


def test_lanes_divide_the_clips_and_hold_out_whole_speakers():
    features = synthetic.make()
    plan = planned(features, seeds=(1, 2))
    assert plan.names == [(f"s{s}", seed) for s in range(4) for seed in (1, 2)]
    assert plan.notes == ["whole training speakers held out"]
    for lane, (fold, _) in enumerate(plan.names):
        train, val, test = (part(plan, lane, p) for p in ("train", "val", "test"))
        assert train | val | test == set(range(48))
        assert len(train) + len(val) + len(test) == 48
        assert {features.speakers[i] for i in test} == {fold}
        assert not {features.speakers[i] for i in val} & {features.speakers[i] for i in train}
        assert plan.counts[lane] == {"n_train": 24, "n_val": 12, "n_test": 12, "speaker_overlap": 0}
        prior = np.bincount(features.label[sorted(train)], minlength=3) / 24
        np.testing.assert_allclose(plan.lanes.prior[lane], prior, rtol=1e-6)


def test_overlap_is_counted_where_speakers_are_shared_and_unknown_without_them():
    counts = planned(synthetic.make(), folds="stratified", fold_count=2).counts
    assert {c["speaker_overlap"] for c in counts} == {4}
    features = synthetic.make(speakers=0)
    plan = planned(features)
    assert {c["speaker_overlap"] for c in plan.counts} == {None}
    assert plan.notes == ["stratified part of the training clips held out"]


def test_an_official_validation_part_is_taken_and_unused_clips_are_left_out():
    features = synthetic.make()
    ids = features.ids
    fold = Fold("f", (*ids[:20], "quarantined"), tuple(ids[30:]), (*ids[20:30], "also gone"))
    plan = lane_plans.plan(features, [fold], (1,), protocol())
    assert part(plan, 0, "train") == set(range(20))
    assert part(plan, 0, "val") == set(range(20, 30))
    assert plan.notes == ["official validation part"]


def test_unequal_lanes_are_padded_with_their_own_training_clips():
    features = synthetic.make()
    ids = features.ids
    folds = [Fold("a", tuple(ids[5:8]), tuple(ids[:1])), Fold("b", tuple(ids[8:30]), tuple(ids[30:]))]
    plan = lane_plans.plan(features, folds, (1,), protocol(validation=0.0))
    assert plan.notes == ["no validation part"]
    assert [c["n_train"] for c in plan.counts] == [3, 22]
    for name in ("train", "val", "test"):
        index, weight = (np.asarray(getattr(plan.lanes, n))[0] for n in (name, f"{name}_weight"))
        assert set(index[weight == 0].tolist()) <= {5}
    assert part(plan, 0, "test") == {0}
    assert part(plan, 0, "val") == set()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: batches.resident(f, "face", "train"), "text_source is 'face'; the feature store has both, audio"),
        (lambda f: batches.resident(f, "both", "speaker"), "needs a speaker for every clip; use 'train'"),
        (lambda f: lane_plans.plan(f, [Fold("x", ("gone",), ("clip001",))], (1,), protocol()), "fold x: 0 clips to"),
        (lambda f: lane_plans.plan(f, [Fold("x", ("clip001",), ())], (1,), protocol()), "fold x: 1 clips to"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, message):
    with pytest.raises(AvjaxError, match=message):
        call(synthetic.make(speakers=0))


# ---- Order --------------------------------------------------------------------------------------------------------


def test_shuffled_does_not_depend_on_padding():
    key, index = jax.random.key(3), jnp.arange(10) + 5
    short = batches.shuffled(key, index, jnp.ones(10), 4)
    padded = batches.shuffled(key, jnp.pad(index, (0, 9)), jnp.pad(jnp.ones(10), (0, 9)), 4)
    for ours, theirs in zip(short, padded, strict=True):
        assert ours.shape == (3, 4)
        assert theirs.shape == (5, 4)
    order, weight = (np.asarray(v) for v in short)
    np.testing.assert_array_equal(weight.ravel(), [1] * 10 + [0] * 2)
    np.testing.assert_array_equal(padded[1].ravel(), [1] * 10 + [0] * 10)
    np.testing.assert_array_equal(order.ravel()[:10], padded[0].ravel()[:10])
    assert sorted(order.ravel()[:10].tolist()) == list(range(5, 15))
    assert order.ravel()[:10].tolist() != list(range(5, 15))


def test_epochs_differ_and_are_even():
    """Over many epochs every clip is first about equally often."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(600))
    first = jax.vmap(lambda k: batches.shuffled(k, jnp.arange(6), jnp.ones(6), 6)[0][0, 0])(keys)
    share = np.bincount(first, minlength=6)
    assert share.min() > 60
    assert share.max() < 140


def test_batches_keep_the_order_and_fill_up_with_weight_zero():
    index, weight = batches.batches(jnp.array([4, 2, 9]), jnp.ones(3), 2)
    np.testing.assert_array_equal(index, [[4, 2], [9, 9]])
    np.testing.assert_array_equal(weight, [[1, 1], [1, 0]])


# ---- Conversations ------------------------------------------------------------------------------------------------


def talking(features):
    """Ten clips as two conversations, of which the first is in reverse order, and two clips alone."""
    turns = [("d0", 3 - i) if i < 4 else ("d1", i) if i < 8 else (None, None) for i in range(10)]
    clips = [dataclasses.replace(c, dialogue=d, turn=t) for c, (d, t) in zip(features.clips, turns, strict=True)]
    return dataclasses.replace(features, clips=clips)


def test_conversations_are_rows_in_the_order_of_their_turns():
    features = talking(synthetic.make(10))
    rows = lane_plans.conversations(features)
    assert rows.tolist() == [[3, 2, 1, 0], [4, 5, 6, 7], [8, 10, 10, 10], [9, 10, 10, 10]]


def test_turns_of_other_parts_are_seen_and_do_not_count():
    features = talking(synthetic.make(10))
    ids = features.ids
    fold = Fold("f", tuple(ids[:3] + ids[8:9]), tuple(ids[4:8] + ids[9:]), (ids[3],))
    plan = lane_plans.plan(features, [fold], (1,), protocol(), turns=True)
    assert plan.lanes.train.tolist() == [[[3, 2, 1, 0], [8, 10, 10, 10]]]
    assert plan.lanes.train_weight.tolist() == [[[0, 1, 1, 1], [1, 0, 0, 0]]]
    assert plan.lanes.val_weight.tolist() == [[[1, 0, 0, 0]]]
    assert plan.lanes.test.tolist() == [[[4, 5, 6, 7], [9, 10, 10, 10]]]
    assert "without their labels" in plan.notes[-1]
    alone = lane_plans.plan(synthetic.make(10), [fold], (1,), protocol(), turns=True)
    assert not [note for note in alone.notes if "turns" in note], "clips of no conversation see no others"
    data = batches.resident(features, "both", "train")
    batch = batches.gather(data, {}, plan.lanes.train[0], plan.lanes.train_weight[0])
    assert batch["turn_mask"].tolist() == [[True] * 4, [True, False, False, False]]
    assert not batch["audio_mask"][1, 1:].any()
    np.testing.assert_array_equal(batch["audio"][0, 1], features.arrays["audio"][2])
    np.testing.assert_array_equal(batch["label"][0], features.label[[3, 2, 1, 0]])


def test_padding_rows_have_nothing_real():
    data = batches.resident(synthetic.make(6), "both", "train")
    batch = batches.gather(data, {}, jnp.array([1, 2]), jnp.array([1.0, 0.0]))
    assert batch["audio_mask"].any(-1).tolist() == [True, False]

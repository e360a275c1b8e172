"""Intervals and paired tests: hand-made predictions with known results."""

import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.evaluation import significance


def rows(right, speakers=None, seeds: int = 1) -> dict[str, np.ndarray]:
    """Predictions of two classes: one row per clip and seed, `right (clips,)` or (clips, seeds) of them correct."""
    right = np.broadcast_to(np.asarray(right)[..., None] if np.ndim(right) == 1 else right, (len(right), seeds))
    clips = len(right)
    label = np.arange(clips) % 2
    chosen = np.where(right, label[:, None], 1 - label[:, None]).T.reshape(-1)
    return {
        "clip_id": np.tile([f"c{i:03d}" for i in range(clips)], seeds),
        "speaker": np.tile(speakers if speakers is not None else [""] * clips, seeds),
        "label": np.tile(label, seeds),
        "logits_fusion": np.eye(2)[chosen],
        "logits_audio": np.zeros((clips * seeds, 2)),
    }


def test_units_are_speakers_where_known_and_seeds_are_averaged():
    speakers = np.array(["a", "b", "b", "a"])
    units = significance.units(rows(np.array([[1, 0], [1, 1], [0, 0], [1, 1]], bool), speakers, seeds=2))
    assert (units.kind, units.names) == ("speaker", ("a", "b"))
    np.testing.assert_allclose(units.right, [1.5, 1.0])
    np.testing.assert_allclose(units.count, [2, 2])
    assert significance.units(rows([True, False])).kind == "clip"
    assert significance.units(rows([True, False], np.array(["a", "a"]))).kind == "clip", "one speaker is no sample"


def test_interval_of_clips_is_that_of_the_binomial():
    right = np.arange(400) % 4 > 0
    low, high = significance.evidence(significance.units(rows(right)), None).interval
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)


def test_speakers_who_differ_widen_the_interval():
    right, speakers = np.repeat([1, 1, 0, 1, 0, 1, 1, 1], 50) > 0, np.repeat(list("abcdefgh"), 50)
    by_speaker, by_clip = (significance.evidence(significance.units(rows(right, s)), None) for s in (speakers, None))
    width = lambda e: e.interval[1] - e.interval[0]  # noqa: E731
    assert width(by_speaker) > 4 * width(by_clip)


def test_a_paired_difference_has_the_p_of_all_exchanges():
    """Six speakers, each better by one clip: 2 of 2^6 signs are as extreme."""
    speakers = np.repeat(list("abcdef"), 4)
    first = np.tile([1, 1, 0, 0], 6) > 0
    ours = np.tile([1, 1, 1, 0], 6) > 0
    evidence = significance.evidence(*(significance.units(rows(r, speakers)) for r in (ours, first)))
    assert evidence.p == pytest.approx(2 / 64)
    assert evidence.difference == pytest.approx((0.25, 0.25, 0.25))
    same = significance.evidence(*(significance.units(rows(first, speakers)) for _ in range(2)))
    assert same.p == 1
    assert same.difference == (0, 0, 0)


def test_other_clips_cannot_be_compared():
    with pytest.raises(AvjaxError, match="tested on different clips"):
        significance.evidence(significance.units(rows([True] * 4)), significance.units(rows([True] * 5)))


def test_runs_without_speakers_are_of_an_earlier_version(tmp_path):
    with pytest.raises(AvjaxError, match=r"no predictions\.npz"):
        significance.read(tmp_path)
    old = rows([True, False])
    del old["speaker"]
    np.savez(tmp_path / "predictions.npz", **old)
    with pytest.raises(AvjaxError, match="earlier version"):
        significance.read(tmp_path)

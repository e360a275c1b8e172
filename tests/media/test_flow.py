"""Optical flow: of known shifts, which frames have one, and how it is drawn."""

import colorsys

import numpy as np
import pytest

from avjax.datasets.base import Clip
from avjax.media import flow


def texture(seed=0, side=96):
    cv2 = pytest.importorskip("cv2", reason="needs avjax[media]")
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)


def shifted(image, x, y):
    return np.roll(image, (y, x), (0, 1))


@pytest.mark.parametrize(("x", "y"), [(3, 0), (0, 3), (-2, 4), (0, 0)])
def test_dis_sees_a_known_shift(x, y):
    still = texture()
    made = flow.dis(still[None], shifted(still, x, y)[None])
    assert made.shape == (1, 96, 96, 2)
    assert made.dtype == np.float32
    inside = made[0, 12:-12, 12:-12].reshape(-1, 2)
    np.testing.assert_allclose(np.median(inside, 0), (x, y), atol=0.1)
    assert np.abs(inside - (x, y)).mean() < 0.3


def test_a_pairs_flow_does_not_depend_on_the_others():
    first = np.stack([texture(0), texture(1), texture(2)])
    second = np.stack([shifted(p, 2, -1) for p in first])
    together = flow.dis(first, second)
    for k in (2, 0, 1):
        np.testing.assert_array_equal(together[k], flow.dis(first[k : k + 1], second[k : k + 1])[0])
    assert flow.dis(first[:0], second[:0]).shape == (0, 96, 96, 2)


def test_flows_end_at_each_stride_th_frame_that_shows_the_face_and_has_one_a_window_before():
    present = np.ones(12, bool)
    assert flow.ends(present, 1, 1).tolist() == list(range(1, 12))
    assert flow.ends(present, 5, 1).tolist() == list(range(5, 12))
    assert flow.ends(present, 3, 3).tolist() == [3, 6, 9]
    assert flow.ends(present, 1, 5).tolist() == [5, 10]
    assert flow.ends(present[:3], 7, 7).tolist() == []
    present[6] = False
    assert flow.ends(present, 3, 3).tolist() == [3, 9]
    assert flow.held(np.array([3, 9]), 12).tolist() == 3 * [-1] + 6 * [0] + 3 * [1]
    assert flow.held(np.zeros(0, int), 2).tolist() == [-1, -1]


def test_spread_is_the_standard_deviation_of_the_magnitude_over_all_parts():
    flows = np.random.default_rng(0).normal(3, 2, (7, 5, 6, 2))
    want = np.hypot(flows[..., 0], flows[..., 1]).std()
    assert flow.spread([flows]) == pytest.approx(want, rel=1e-6)
    assert flow.spread([flows[:2], flows[2:]]) == pytest.approx(want, rel=1e-6)
    assert flow.spread([]) == 0
    assert flow.spread([np.full((2, 3, 3, 2), 5.0, np.float16)]) == pytest.approx(0, abs=1e-2)


def hue(colour):
    return colorsys.rgb_to_hsv(*(colour / 255))[0]


def test_direction_is_hue_and_magnitude_is_saturation():
    right, left, down, up = np.array([(1, 0), (-1, 0), (0, 1), (0, -1)], np.float32)
    row = flow.draw(np.stack([right, left, down, up, 0 * up, right / 4, 9 * right])[None] * 8, 2.0)[0]
    assert row.dtype == np.uint8
    assert row[0].tolist() == [255, 0, 0]
    assert hue(row[1]) == pytest.approx(0.54, abs=0.03)  # cyan to blue
    assert hue(row[2]) == pytest.approx(0.15, abs=0.03)  # yellow
    assert hue(row[3]) == pytest.approx(0.73, abs=0.03)  # violet
    assert row[4].tolist() == [255, 255, 255]
    assert row[5].tolist() == [255, 191, 191]
    assert row[6].tolist() == [255, 0, 0], "beyond the clip all is one colour"


def test_colours_go_around_without_a_jump():
    angle = np.linspace(0, 2 * np.pi, 721)
    row = flow.draw(np.stack([np.cos(angle), np.sin(angle)], -1)[None] * 99, 1.0)[0].astype(int)
    assert np.abs(np.diff(row, axis=0)).max() <= 9
    np.testing.assert_array_equal(row[0], row[-1])


def test_the_same_motion_has_the_same_colour_in_every_frame_and_clips_of_another_size_look_alike():
    flows = np.random.default_rng(0).normal(size=(3, 8, 8, 2))
    together = flow.draw(flows, 1.5)
    np.testing.assert_array_equal(together[1], flow.draw(flows[1], 1.5))
    assert np.abs(together.astype(int) - flow.draw(3 * flows, 4.5)).max() <= 1  # the epsilon is a thousandth of a pixel
    assert (flow.draw(0 * flows, 0.0) == 255).all()


def test_a_grid_has_the_means_of_its_cells():
    flows = np.zeros((2, 5, 6, 2), np.float32)
    flows[0, :2, :3] = (3, 4)  # the upper left cell of two by two: rows 0 and 1, columns 0 to 2
    flows[0, 2:, 3:] = (0, -1)
    flows[1, 4, 5] = (2, 0)  # one pixel of nine
    made = flow.grid(flows, 10.0, cells=2)
    assert (made.shape, made.dtype) == ((2, 12), np.float32)
    most = 40.0  # four standard deviations
    first, second = made.reshape(2, 2, 2, 3) * most
    np.testing.assert_allclose(first, [[[3, 4, 5], [0, 0, 0]], [[0, 0, 0], [0, -1, 1]]], atol=1e-3)
    np.testing.assert_allclose(second[1, 1], (2 / 9, 0, 2 / 9), atol=1e-4)


@pytest.mark.parametrize(("sides", "cells"), [((7, 7), 7), ((48, 50), 7), ((368, 368), 7), ((5, 9), 3)])
def test_a_grid_is_that_of_plain_means_and_stays_within_one(sides, cells):
    flows = np.random.default_rng(0).normal(0, 3, (3, *sides, 2)).astype(np.float16)
    made = flow.grid(flows, 1.0, cells)
    assert made.shape == (3, 3 * cells**2)
    assert np.abs(made).max() <= 1
    vectors = flows.astype(np.float64) / 4.004
    strength = np.linalg.norm(vectors, axis=-1, keepdims=True)
    clipped = np.concatenate([vectors / np.maximum(strength, 1), np.minimum(strength, 1)], -1)
    rows, columns = (np.linspace(0, side, cells + 1).astype(int) for side in sides)
    want = [
        clipped[:, rows[i] : rows[i + 1], columns[j] : columns[j + 1]].mean((1, 2))
        for i in range(cells)
        for j in range(cells)
    ]
    np.testing.assert_allclose(made, np.concatenate(want, -1), atol=2e-5)
    np.testing.assert_array_equal(made[1:2], flow.grid(flows[1:2], 1.0, cells))


def test_a_grid_of_strong_flow_has_its_direction_and_that_of_none_is_zero():
    far = np.zeros((1, 8, 8, 2), np.float32) + np.array((300, -400), np.float32)
    np.testing.assert_allclose(flow.grid(far, 1.0, 2).reshape(4, 3), [[0.6, -0.8, 1]] * 4, atol=1e-6)
    assert not flow.grid(0 * far, 0.0).any()
    some = np.random.default_rng(0).normal(size=(2, 8, 8, 2))
    np.testing.assert_allclose(flow.grid(some, 1.5, 2), flow.grid(3 * some, 4.5, 2), atol=1e-3)
    assert flow.grid(some[:0], 1.0).shape == (0, 147)


def test_the_mouth_of_a_real_speaker_moves_more_than_the_forehead(java_sed, tmp_path):
    from avjax.features import clip as clip_features
    from avjax.features import presets
    from avjax.media.faces import FaceTracker
    from avjax.utils.progress import Stopwatch

    settings = presets.preset("deiii_dis")
    clip = Clip("c", java_sed / "mp4" / "01-02-03_01.mp4", "happy")
    with FaceTracker(clip_features.landmarker()) as tracker:
        instruments = clip_features.Instruments(settings, tracker, Stopwatch(), tmp_path)
        _, raw = clip_features.measure(clip, instruments, wanted=("flow",))
    flows = np.concatenate(list(raw.flows.blocks(64))).astype(np.float32)
    # The head's own motion is alike above and below; what is left is the face's.
    flows -= np.median(flows[:, 60:165, 75:150], (1, 2), keepdims=True)
    moved = np.hypot(flows[..., 0], flows[..., 1]).mean(0)
    assert moved[135:170, 85:140].mean() > 1.5 * moved[50:85, 85:140].mean()

"""Flips and rotations of clips, against SciPy's rotation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from avjax.errors import AvjaxError
from avjax.training import augment

NOISE = np.random.default_rng(0).integers(0, 256, (3, 2, 20, 26, 3)).astype(np.uint8)
KEY = jax.random.key(3)
compiled = functools.cache(lambda **kwargs: jax.jit(functools.partial(augment.augment, **kwargs)))


def changed(frames: np.ndarray, key: jax.Array = KEY, **kwargs) -> np.ndarray:
    return np.asarray(compiled(**kwargs)(frames, key))


def draws(clips: int, degrees: float = 10.0, flip: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Angle and flip of each of so many clips under KEY."""
    one = lambda row: augment._draw(jax.random.fold_in(KEY, row), degrees, flip)  # noqa: E731
    return jax.tree.map(np.asarray, jax.vmap(one)(jnp.arange(clips)))


def test_without_angle_and_flip_nothing_changes():
    np.testing.assert_array_equal(changed(NOISE, degrees=0.0, flip=0.0), NOISE)


def test_a_flip_is_exact():
    np.testing.assert_array_equal(changed(NOISE, degrees=0.0, flip=1.0), NOISE[:, :, :, ::-1])


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("degrees", [10.0, 90.0])
def test_a_rotation_is_scipys_counter_clockwise_on_black(degrees, flip):
    got = changed(NOISE, degrees=degrees, flip=flip).astype(np.float64)
    mirrored = (NOISE[:, :, :, ::-1] if flip else NOISE).astype(np.float64)
    angles, _ = draws(len(NOISE), degrees)
    assert np.abs(angles).max() > degrees / 4
    for i, t in np.ndindex(NOISE.shape[:2]):
        turned = scipy.ndimage.rotate(mirrored[i, t], angles[i], reshape=False, order=1, mode="grid-constant")
        np.testing.assert_allclose(got[i, t], turned, atol=0.51, err_msg="rounded, and at the borders too")


def test_frames_of_a_clip_share_what_it_gets_and_clips_do_not():
    still = np.tile(NOISE[:1, :1], (4, 3, 1, 1, 1))
    got = changed(still)
    np.testing.assert_array_equal(got, np.tile(got[:, :1], (1, 3, 1, 1, 1)))
    assert all((got[i] != got[j]).mean() > 0.2 for i in range(4) for j in range(i))


def test_a_clip_gets_the_same_in_a_larger_batch_and_another_under_another_key():
    alone = changed(NOISE[:1])
    np.testing.assert_array_equal(changed(NOISE)[:1], alone)
    assert (changed(NOISE[:1], jax.random.key(4)) != alone).mean() > 0.2


@pytest.mark.thorough
def test_draws_are_uniform_and_fair():
    angles, flips = draws(4000)
    counts, _ = np.histogram(angles, np.linspace(-10, 10, 5))
    assert counts.sum() == 4000
    assert np.abs(counts / 4000 - 0.25).max() < 0.03
    assert abs(flips.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(angles, flips)[0, 1]) < 0.05
    assert not draws(100, flip=0.0)[1].any()
    assert draws(100, flip=1.0)[1].all()


@pytest.mark.thorough
def test_compiled_or_not_alone_or_among_lanes_the_answer_is_the_same():
    """To one grey level where a value lies half-way between two."""
    want = changed(NOISE).astype(int)
    keys = jnp.stack([jax.random.key(4), KEY])
    lanes = jax.jit(jax.vmap(augment.augment, (None, 0)))(NOISE, keys)
    for got in (augment.augment(NOISE, KEY), lanes[1]):
        assert got.dtype == jnp.uint8
        apart = np.abs(np.asarray(got).astype(int) - want)
        assert apart.max() <= 1
        assert apart.mean() < 1e-3


def test_nothing_is_compiled_again_for_other_clips_and_keys():
    traces = []

    @jax.jit
    def run(frames, key):
        traces.append(1)
        return augment.augment(frames, key)

    for seed in range(3):
        run(NOISE, jax.random.key(seed))
    assert len(traces) == 1


@pytest.mark.parametrize("frames", [NOISE[0], NOISE / np.float32(255)])
def test_what_are_no_clips_of_bytes_is_refused(frames):
    with pytest.raises(AvjaxError, match=r"frames to augment are .*; expected uint8 images \(clip, frame"):
        augment.augment(frames, KEY)

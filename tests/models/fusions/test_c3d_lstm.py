"""C3D with an LSTM: what a frame sees, and that frames and features alike are read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.models.fusions.c3d_lstm import C3dLstm, Stages
from tests.models.fusions.made import drawn

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 9, 4)).astype(np.float32)
MASK = np.ones((2, 9), bool)
IMAGES = RNG.integers(0, 256, (2, 3, 12, 10, 3)).astype(np.uint8)


def test_a_stage_on_pictures_by_hand():
    """A kernel of ones over frames of ones, 3 x 3 pixels, two frames: a pixel counts what is around it."""
    stages, ones = Stages((1,)), np.ones((1, 2, 3, 3, 1), np.float32)
    both, first = np.array([[True, True]]), np.array([[True, False]])
    variables = jax.eval_shape(stages.init, jax.random.key(0), ones, both)
    variables = jax.tree.map(lambda v: np.full(v.shape, float(len(v.shape) > 1), np.float32), variables)
    # In a frame a pixel has 4 (corner), 6 (edge) or 9 (middle) neighbours; 2 x 2 pixels at a time: 9, 6, 6, 4.
    mean = (9 + 6 + 6 + 4) / 4
    np.testing.assert_allclose(stages.apply(variables, ones, both), np.full((1, 2, 1), 2 * mean))
    np.testing.assert_allclose(stages.apply(variables, ones, first)[0, 0], [mean])


def test_five_stages_keep_time_and_see_five_frames_to_either_side():
    stages = Stages((4,) * 5)
    x, mask = RNG.normal(size=(1, 14, 3)).astype(np.float32), np.ones((1, 14), bool)
    variables = drawn(stages, x, mask)
    sensed = jax.jit(jax.jacrev(lambda x: jnp.sum(stages.apply(variables, x, mask), (0, 2))))(x)  # t 1 t d
    seen = np.abs(np.asarray(sensed)).max((1, 3)) > 0
    apart = np.abs(np.subtract.outer(np.arange(14), np.arange(14)))
    assert seen.shape == (14, 14)
    assert not seen[apart > 5].any()
    assert seen[apart == 5].any()


def c3d_batch(video: np.ndarray) -> dict[str, np.ndarray]:
    seen = np.array([[True, True, False], [True, False, True]])
    return {"video": video, "video_mask": seen, "audio": X, "audio_mask": MASK}


@functools.cache
def c3d():
    module = C3dLstm(3, widths=(4, 4, 4, 4, 4), hidden=6)
    return module, drawn(module, c3d_batch(IMAGES)), jax.jit(module.apply)


def test_c3d_reads_small_pictures_and_nothing_of_masked_ones():
    _, variables, apply = c3d()
    kernel = variables["params"]["stages"]["stage_0"]["kernel"]
    assert kernel.shape == (3, 3, 3, 3, 4)
    want = apply(variables, c3d_batch(IMAGES))
    assert {k: v.shape for k, v in want.features.items()} == {"fusion": (2, 12), "audio": (2, 6), "video": (2, 6)}
    hidden = IMAGES.copy()
    hidden[0, 2], hidden[1, 1] = 255, 7
    np.testing.assert_array_equal(apply(variables, c3d_batch(hidden)).logits["fusion"], want.logits["fusion"])
    hidden[1, 2] = 7
    changed = apply(variables, c3d_batch(hidden)).features
    assert float(jnp.abs(changed["video"][1] - want.features["video"][1]).max()) > 1e-5
    np.testing.assert_array_equal(changed["audio"], want.features["audio"])


def test_c3d_convolves_feature_sequences_over_time_alone():
    module = c3d()[0]
    one = c3d_batch(X[:, :3])
    variables = drawn(module, one)
    assert variables["params"]["stages"]["stage_0"]["kernel"].shape == (3, 4, 4)
    prediction = jax.jit(module.apply)(variables, one).logits["fusion"]
    assert prediction.shape == (2, 3)
    assert np.isfinite(prediction).all()


def test_c3d_refuses_what_is_neither_pictures_nor_features():
    with pytest.raises(AvjaxError, match=r"\(2, 3, 12, 10\).*frames \(clip, frame, row, column, 3\)"):
        c3d()[0].init(jax.random.key(0), c3d_batch(IMAGES[..., 0]))


def test_dropout_of_c3d_acts_in_training():
    module, variables, _ = c3d()
    train = jax.jit(functools.partial(module.apply, train=True))
    one, other = (
        train(variables, c3d_batch(IMAGES), rngs={"dropout": jax.random.key(i, impl="rbg")}).logits["fusion"]
        for i in (1, 2)
    )
    assert float(jnp.abs(one - other).max()) > 1e-4

"""CFN-SR and C3D with an LSTM: what is local, what one stream tells another, pictures and features alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.models.fusions.c3d_lstm import C3dLstm, Stages
from avjax.models.fusions.cfn_sr import CfnSr, CrossModalBlock, ResidualBlock

CFN = {"width": 8, "heads": 2, "layers": 1, "blocks": 1, "kernel": 3}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 9, 4)).astype(np.float32)
MASK = np.ones((2, 9), bool)
PICTURES = RNG.integers(0, 256, (2, 3, 12, 10, 3)).astype(np.uint8)


def drawn(module, *args):
    """Params that are all random, biases and scales too; matrices and kernels by their fan-in."""
    rng = np.random.default_rng(5)
    fan_in = lambda v: np.prod(v.shape[:-1]) if len(v.shape) > 1 else 4  # noqa: E731
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return jax.tree.map(lambda v: np.float32(rng.normal(size=v.shape) / np.sqrt(fan_in(v))), shapes)


def test_a_residual_block_sees_its_neighbours_and_zeros_where_steps_are_masked():
    block = ResidualBlock(6, 3)
    variables, apply = drawn(block, X, MASK), jax.jit(block.apply)
    assert "shortcut" in variables["params"]
    assert "shortcut" not in drawn(ResidualBlock(4, 3), X, MASK)["params"]
    there = jnp.abs(
        apply(variables, X, MASK) - apply(variables, X + np.eye(9, dtype=np.float32)[4][None, :, None], MASK)
    )
    assert list(np.flatnonzero(np.asarray(there).max((0, 2)) > 1e-6)) == [2, 3, 4, 5, 6], "two convolutions over 3"
    cut = apply(variables, X[:, :5], MASK[:, :5])
    masked = apply(variables, X, MASK & (np.arange(9) < 5)[None])
    np.testing.assert_allclose(masked[:, :5], cut, atol=1e-5)


def test_a_cross_modal_block_by_loops():
    block, said = CrossModalBlock(), RNG.normal(size=(2, 4)).astype(np.float32)
    mask = MASK.copy()
    mask[0, [0, 5]] = False
    variables = drawn(block, X, mask, said)
    p = jax.tree.map(np.float64, variables["params"])
    got, weights = jax.jit(block.apply)(variables, X, mask, said)
    for b in range(2):
        heard = said[b] @ p["said"]["kernel"]
        scores = [
            np.tanh(x @ p["steps"]["kernel"] + p["steps"]["bias"] + heard) @ p["score"]["kernel"] for x in X[b, mask[b]]
        ]
        shares = np.exp(scores).ravel() / np.exp(scores).sum()
        np.testing.assert_allclose(weights[b, mask[b]], shares, atol=1e-5)
        np.testing.assert_allclose(got[b, mask[b]], X[b, mask[b]] * (1 + mask[b].sum() * shares)[:, None], atol=1e-4)


def test_even_weights_double_every_step_however_long_the_clip():
    block, said = CrossModalBlock(), np.zeros((2, 4), np.float32)
    mask = np.arange(9)[None] < np.array([[9], [3]])
    nothing = jax.tree.map(np.zeros_like, drawn(block, X, mask, said))
    got, _ = jax.jit(block.apply)(nothing, X, mask, said)
    np.testing.assert_allclose(got[mask], 2 * X[mask], atol=1e-5)


def cfn_batch() -> dict[str, np.ndarray]:
    return {"audio": X, "audio_mask": MASK, "video": X[:, :4] ** 2, "video_mask": MASK[:, :4]}


def test_cfn_sr_lets_the_first_stream_alone_and_reweighs_the_other():
    module = CfnSr(3, **CFN)
    variables, apply = drawn(module, cfn_batch()), jax.jit(module.apply)
    want = apply(variables, cfn_batch())
    np.testing.assert_allclose(want.attention["video"].sum(-1), 1, atol=1e-5)
    assert set(want.attention) == {"video"}
    louder = apply(variables, cfn_batch() | {"audio": 3 * X[::-1]})
    assert float(jnp.abs(louder.features["video"] - want.features["video"]).max()) > 1e-4
    brighter = apply(variables, cfn_batch() | {"video": X[:, 4:8]})
    np.testing.assert_array_equal(brighter.features["audio"], want.features["audio"])


@pytest.mark.parametrize("rate", ["dropout", "embedding_dropout", "out_dropout"])
def test_each_dropout_of_cfn_sr_acts_in_training(rate):
    others = {"dropout": 0.0, "embedding_dropout": 0.0, "out_dropout": 0.0}
    module = CfnSr(3, **CFN, **others | {rate: 0.5})
    variables = drawn(module, cfn_batch())
    train = jax.jit(functools.partial(module.apply, train=True))
    one, other = (
        train(variables, cfn_batch(), rngs={"dropout": jax.random.key(i, impl="rbg")}).logits["fusion"] for i in (1, 2)
    )
    assert float(jnp.abs(one - other).max()) > 1e-4


def test_a_stage_on_pictures_by_hand():
    """A kernel of ones over pictures of ones, 3 x 3 pixels, two frames: a pixel counts what is around it."""
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
    return module, drawn(module, c3d_batch(PICTURES)), jax.jit(module.apply)


def test_c3d_reads_small_pictures_and_nothing_of_masked_ones():
    _, variables, apply = c3d()
    kernel = variables["params"]["stages"]["stage_0"]["kernel"]
    assert kernel.shape == (3, 3, 3, 3, 4)
    want = apply(variables, c3d_batch(PICTURES))
    assert {k: v.shape for k, v in want.features.items()} == {"fusion": (2, 12), "audio": (2, 6), "video": (2, 6)}
    hidden = PICTURES.copy()
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
    answer = jax.jit(module.apply)(variables, one).logits["fusion"]
    assert answer.shape == (2, 3)
    assert np.isfinite(answer).all()


def test_c3d_refuses_what_is_neither_pictures_nor_features():
    with pytest.raises(AvjaxError, match=r"\(2, 3, 12, 10\).*pictures \(clip, frame, row, column, 3\)"):
        c3d()[0].init(jax.random.key(0), c3d_batch(PICTURES[..., 0]))


def test_dropout_of_c3d_acts_in_training():
    module, variables, _ = c3d()
    train = jax.jit(functools.partial(module.apply, train=True))
    one, other = (
        train(variables, c3d_batch(PICTURES), rngs={"dropout": jax.random.key(i, impl="rbg")}).logits["fusion"]
        for i in (1, 2)
    )
    assert float(jnp.abs(one - other).max()) > 1e-4

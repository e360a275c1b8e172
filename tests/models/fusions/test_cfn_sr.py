"""CFN-SR: what is local, and what one stream tells another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.models.fusions.cfn_sr import CfnSr, CrossModalBlock, ResidualBlock
from tests.models.fusions.made import drawn

CFN = {"width": 8, "heads": 2, "layers": 1, "blocks": 1, "kernel": 3}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 9, 4)).astype(np.float32)
MASK = np.ones((2, 9), bool)


def test_a_residual_block_sees_its_neighbours_and_zeros_where_steps_are_masked():
    block = ResidualBlock(6, 3)
    variables, apply = drawn(block, X, MASK), jax.jit(block.apply)
    assert "shortcut" in variables["params"]
    assert "shortcut" not in drawn(ResidualBlock(4, 3), X, MASK)["params"]
    reached = jnp.abs(
        apply(variables, X, MASK) - apply(variables, X + np.eye(9, dtype=np.float32)[4][None, :, None], MASK)
    )
    assert list(np.flatnonzero(np.asarray(reached).max((0, 2)) > 1e-6)) == [2, 3, 4, 5, 6], "two convolutions over 3"
    cut = apply(variables, X[:, :5], MASK[:, :5])
    masked = apply(variables, X, MASK & (np.arange(9) < 5)[None])
    np.testing.assert_allclose(masked[:, :5], cut, atol=1e-5)


def test_a_cross_modal_block_by_loops():
    block, content = CrossModalBlock(), RNG.normal(size=(2, 4)).astype(np.float32)
    mask = MASK.copy()
    mask[0, [0, 5]] = False
    variables = drawn(block, X, mask, content)
    p = jax.tree.map(np.float64, variables["params"])
    got, weights = jax.jit(block.apply)(variables, X, mask, content)
    for b in range(2):
        heard = content[b] @ p["said"]["kernel"]
        scores = [
            np.tanh(x @ p["steps"]["kernel"] + p["steps"]["bias"] + heard) @ p["score"]["kernel"] for x in X[b, mask[b]]
        ]
        weights_of_steps = np.exp(scores).ravel() / np.exp(scores).sum()
        np.testing.assert_allclose(weights[b, mask[b]], weights_of_steps, atol=1e-5)
        np.testing.assert_allclose(
            got[b, mask[b]], X[b, mask[b]] * (1 + mask[b].sum() * weights_of_steps)[:, None], atol=1e-4
        )


def test_even_weights_double_every_step_however_long_the_clip():
    block, content = CrossModalBlock(), np.zeros((2, 4), np.float32)
    mask = np.arange(9)[None] < np.array([[9], [3]])
    nothing = jax.tree.map(np.zeros_like, drawn(block, X, mask, content))
    got, _ = jax.jit(block.apply)(nothing, X, mask, content)
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


@pytest.mark.parametrize(
    "rate", [*(pytest.param(r, marks=pytest.mark.thorough) for r in ("dropout", "embedding_dropout")), "out_dropout"]
)
def test_each_dropout_of_cfn_sr_acts_in_training(rate):
    others = {"dropout": 0.0, "embedding_dropout": 0.0, "out_dropout": 0.0}
    module = CfnSr(3, **CFN, **others | {rate: 0.5})
    variables = drawn(module, cfn_batch())
    train = jax.jit(functools.partial(module.apply, train=True))
    one, other = (
        train(variables, cfn_batch(), rngs={"dropout": jax.random.key(i, impl="rbg")}).logits["fusion"] for i in (1, 2)
    )
    assert float(jnp.abs(one - other).max()) > 1e-4

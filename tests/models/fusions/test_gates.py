"""MAG, MMTM and MSAF: their equations by plain loops, what they do without a stream, and MSAF against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.models.fusions import mag, mmtm, msaf
from avjax.models.fusions.registry import FUSIONS
from tests.references import agreement

TEXT, AUDIO, VIDEO = (
    np.random.default_rng(i).normal(size=(2, 3, w)).astype(np.float32) for i, w in enumerate((4, 2, 5))
)
STEPS = {"audio": AUDIO, "video": VIDEO}
MASKS = {s: np.ones((2, 3), bool) for s in STEPS}
NO_SOUND = MASKS | {"audio": np.array([[False] * 3, [True] * 3])}


def dense(x, layer):
    return x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])


def randomised(variables, key: int = 5):
    """Params that are all random, biases and scales too."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return tree.unflatten([jax.random.normal(k, v.shape) for k, v in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize("shift", [0.1, 50.0])
def test_mag_shifts_each_token_by_a_bounded_step(shift):
    """Rahman et al. 2020, Eqs. 1–5; a large β leaves the whole shift."""
    block = mag.MagBlock(shift, 0.0)
    variables = randomised(jax.eval_shape(block.init, jax.random.key(0), TEXT, STEPS, MASKS))
    params = variables["params"]
    want = np.zeros(TEXT.shape)
    for b, t in np.ndindex(2, 3):
        z, moved = np.float64(TEXT[b, t]), np.zeros(4)
        for stream, x in STEPS.items():
            gate = np.maximum(dense(np.concatenate([x[b, t], z]), params[f"gate_{stream}"]), 0)
            moved += gate * dense(x[b, t], params[f"shift_{stream}"])
        z = z + min(shift * np.linalg.norm(z) / (np.linalg.norm(moved) + 1e-6), 1) * moved
        z = (z - z.mean()) / np.sqrt(z.var() + 1e-5)
        want[b, t] = z * params["norm"]["scale"] + params["norm"]["bias"]
    np.testing.assert_allclose(jax.jit(block.apply)(variables, TEXT, STEPS, MASKS), want, atol=1e-4)


def test_mag_leaves_text_alone_that_has_no_company():
    block = mag.MagBlock(1.0, 0.0)
    variables = randomised(jax.eval_shape(block.init, jax.random.key(0), TEXT, STEPS, MASKS))
    variables["params"]["norm"] = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    nothing = {s: np.zeros((2, 3), bool) for s in STEPS}
    grad = jax.jit(jax.grad(lambda v, t: block.apply(v, t, STEPS, nothing)[0, 0, 0], (0, 1)))(variables, TEXT)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))
    got = jax.jit(block.apply)(variables, TEXT, STEPS, nothing)
    want = (TEXT - TEXT.mean(-1, keepdims=True)) / np.sqrt(TEXT.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_mmtm_excites_channels_by_all_averages():
    block = mmtm.MmtmBlock(reduction=3)
    variables = randomised(jax.eval_shape(block.init, jax.random.key(0), STEPS, MASKS))
    params = variables["params"]
    assert params["squeeze"]["kernel"].shape == (7, 2)  # seven channels over three
    averages = np.concatenate([AUDIO.mean(1) * [[0], [1]], VIDEO.mean(1)], 1)  # the first clip has no sound
    joint = np.maximum(dense(averages, params["squeeze"]), 0)
    got = jax.jit(block.apply)(variables, STEPS, NO_SOUND)
    for stream, x in STEPS.items():
        gate = 2 / (1 + np.exp(-dense(joint, params[f"excite_{stream}"])))
        np.testing.assert_allclose(got[stream], x * gate[:, None], atol=1e-5)


def test_msaf_shares_sum_to_one_over_the_blocks_of_what_is_there():
    """Two channels of sound in one block of 3, five of picture in two, the last of them filled up."""
    block = msaf.MsafBlock(3)
    ones = {s: np.ones_like(x) for s, x in STEPS.items()}
    variables = randomised(jax.eval_shape(block.init, jax.random.key(0), ones, MASKS))
    for masks, sound in ((MASKS, True), (NO_SOUND, False)):
        share = {s: np.asarray(x)[0, 0] for s, x in jax.jit(block.apply)(variables, ones, masks).items()}
        picture = share["video"][:2] + share["video"][3:]
        np.testing.assert_allclose(picture + share["audio"], 1, atol=1e-6)
        assert share["audio"].any() == sound


def test_msaf_drops_whole_blocks():
    block = msaf.MsafBlock(2, dropout=0.5)
    x = {"video": np.ones((8, 3, 8), np.float32)}
    masks = {"video": np.ones((8, 3), bool)}
    variables = randomised(jax.eval_shape(block.init, jax.random.key(0), x, masks))
    apply = jax.jit(lambda v: block.apply(v, x, masks, True, rngs={"dropout": jax.random.key(1)})["video"])
    kept = (np.asarray(apply(variables)) != 0).reshape(8, 3, 4, 2)
    assert (kept == kept[:, :1, :, :1]).all()
    assert 0 < kept.mean() < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("mmtm", marks=pytest.mark.slow), "msaf"])
def test_towers_hear_each_other_through_the_gate_alone(name):
    """A tower of one layer has no gate: then the picture leaves the sound's part of the joined vector as it is."""
    module = FUSIONS[name].module(3, streams=("audio", "video"), width=8, heads=2)
    one = {**STEPS, **{f"{s}_mask": m for s, m in MASKS.items()}}
    for layers, hears in ((1, False), (2, True)):
        tower = module.clone(layers=layers)
        variables = randomised(jax.eval_shape(tower.init, jax.random.key(0), one))
        apply = jax.jit(lambda v, b, tower=tower: tower.apply(v, b).features["fusion"][:, :8])
        moved = np.abs(apply(variables, one) - apply(variables, one | {"video": VIDEO * 3 + 1})).max()
        assert (moved > 1e-4) == hears


def test_answers_are_those_of_the_released_block():
    agreement.assert_answers("msaf")

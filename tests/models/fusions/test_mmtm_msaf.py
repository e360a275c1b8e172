"""MMTM and MSAF: their equations by plain loops, what they do without a stream, and MSAF against PyTorch."""

import jax
import numpy as np
import pytest

from avjax.models.fusions import mmtm, msaf
from avjax.models.fusions.registry import FUSIONS
from tests.models.fusions.made import dense, randomised
from tests.references import agreement

TEXT, AUDIO, VIDEO = (
    np.random.default_rng(i).normal(size=(2, 3, w)).astype(np.float32) for i, w in enumerate((4, 2, 5))
)


STEPS = {"audio": AUDIO, "video": VIDEO}
MASKS = {s: np.ones((2, 3), bool) for s in STEPS}
NO_SOUND = MASKS | {"audio": np.array([[False] * 3, [True] * 3])}


def test_mmtm_excites_channels_by_all_averages():
    block = mmtm.MmtmBlock(reduction=3)
    variables = randomised(block, STEPS, MASKS)
    params = variables["params"]
    assert params["squeeze"]["kernel"].shape == (7, 2)  # seven channels over three
    averages = np.concatenate([AUDIO.mean(1) * [[0], [1]], VIDEO.mean(1)], 1)  # the first clip has no audio
    joint = np.maximum(dense(averages, params["squeeze"]), 0)
    got = jax.jit(block.apply)(variables, STEPS, NO_SOUND)
    for stream, x in STEPS.items():
        gate = 2 / (1 + np.exp(-dense(joint, params[f"excite_{stream}"])))
        np.testing.assert_allclose(got[stream], x * gate[:, None], atol=1e-5)


def test_msaf_shares_sum_to_one_over_the_blocks_of_what_is_there():
    """Two audio channels in one block of 3, five video channels in two, the last one padded."""
    block = msaf.MsafBlock(3)
    ones = {s: np.ones_like(x) for s, x in STEPS.items()}
    variables = randomised(block, ones, MASKS)
    for masks, has_audio in ((MASKS, True), (NO_SOUND, False)):
        share = {s: np.asarray(x)[0, 0] for s, x in jax.jit(block.apply)(variables, ones, masks).items()}
        video_shares = share["video"][:2] + share["video"][3:]
        np.testing.assert_allclose(video_shares + share["audio"], 1, atol=1e-6)
        assert share["audio"].any() == has_audio


def test_msaf_drops_whole_blocks():
    block = msaf.MsafBlock(2, dropout=0.5)
    x = {"video": np.ones((8, 3, 8), np.float32)}
    masks = {"video": np.ones((8, 3), bool)}
    variables = randomised(block, x, masks)
    apply = jax.jit(lambda v: block.apply(v, x, masks, True, rngs={"dropout": jax.random.key(1)})["video"])
    kept = (np.asarray(apply(variables)) != 0).reshape(8, 3, 4, 2)
    assert (kept == kept[:, :1, :, :1]).all()
    assert 0 < kept.mean() < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("mmtm", marks=pytest.mark.slow), "msaf"])
def test_towers_hear_each_other_through_the_gate_alone(name):
    """A tower of one layer has no gate: then video does not change the audio part of the joined vector."""
    module = FUSIONS[name].module(3, streams=("audio", "video"), width=8, heads=2)
    one = {**STEPS, **{f"{s}_mask": m for s, m in MASKS.items()}}
    for layers, hears in ((1, False), (2, True)):
        tower = module.clone(layers=layers)
        variables = randomised(tower, one)
        apply = jax.jit(lambda v, b, tower=tower: tower.apply(v, b).features["fusion"][:, :8])
        moved = np.abs(apply(variables, one) - apply(variables, one | {"video": VIDEO * 3 + 1})).max()
        assert (moved > 1e-4) == hears


def test_answers_are_those_of_the_released_block():
    agreement.assert_answers("msaf")

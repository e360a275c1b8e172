"""T-MEP, MMA-DFER and the three branches: who hears whom, and what a missing stream leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.models.fusions.mma_dfer import Bottleneck
from avjax.models.fusions.registry import FUSIONS

SMALL = {
    "tmep": {"streams": ("audio", "video"), "width": 8, "heads": 2, "layers": 1, "joint_layers": 1},
    "mma_dfer": {"width": 8, "heads": 2, "inner": 8, "layers": 1, "bottleneck": 4},
    "three_branch": {"width": 8, "heads": 2, "layers": 1},
}
SHAPES = {"audio": (6, 4), "video": (3, 5)}


def batch() -> dict[str, np.ndarray]:
    out = {s: np.random.default_rng(i).normal(size=(2, *SHAPES[s])).astype(np.float32) for i, s in enumerate(SHAPES)}
    return out | {f"{s}_mask": np.ones((2, n), bool) for s, (n, _) in SHAPES.items()}


def randomised(shapes):
    """Params that are all random, biases, scales and gates too."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda v: 0.5 * rng.normal(size=v.shape).astype(np.float32), shapes)


@functools.cache
def compiled(name: str):
    module = FUSIONS[name].module(classes=3, **SMALL[name])
    return randomised(jax.eval_shape(module.init, jax.random.key(0), batch())), jax.jit(module.apply)


def moved(name: str, change: dict[str, np.ndarray], variables=None) -> dict[str, bool]:
    """Which features, and whether the logits, change with the batch."""
    given, apply = compiled(name)
    before, after = (apply(variables or given, b) for b in (batch(), batch() | change))
    far = lambda a, b: float(jnp.abs(a - b).max()) > 1e-5  # noqa: E731
    features = {k: far(v, after.features[k]) for k, v in before.features.items()}
    return features | {"logits": far(before.logits["fusion"], after.logits["fusion"])}


OTHER_SOUND = {"audio": batch()["audio"][::-1] + 1}
SILENCE = {"audio_mask": np.zeros((2, 6), bool)}
BLIND = {"video_mask": np.zeros((2, 3), bool)}


def closed(variables):
    """The same variables with the gates as they start, at 0."""
    is_gate = lambda path: path[-1].key.startswith("gate_")  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda p, v: np.zeros_like(v) if is_gate(p) else v, variables)


def test_mma_dfer_keeps_streams_apart_until_a_gate_opens():
    variables, _ = compiled("mma_dfer")
    assert moved("mma_dfer", OTHER_SOUND, closed(variables)) == {
        "audio": True, "video": False, "fusion": True, "logits": True,
    }  # fmt: skip
    assert moved("mma_dfer", OTHER_SOUND)["video"]


def test_gates_start_closed_and_learn_before_what_is_behind_them():
    block, one = Bottleneck(4), batch()
    arguments = {s: one[s] for s in SHAPES}, {s: one[f"{s}_mask"] for s in SHAPES}
    started = jax.jit(block.init)(jax.random.key(0, impl="rbg"), *arguments)
    assert not any(started["params"][f"gate_{s}"].any() for s in SHAPES)
    total = lambda v: jnp.sum(jnp.sin(block.apply(v, *arguments)["video"]))  # noqa: E731
    grad = jax.jit(jax.grad(total))(closed(randomised(started)))["params"]
    assert abs(float(grad["gate_video"][0])) > 1e-3
    assert not grad["up_video"]["kernel"].any()


def test_mma_dfer_hears_the_sound_of_a_clip_without_pictures():
    variables, apply = compiled("mma_dfer")
    one, other = (apply(variables, batch() | BLIND | b).logits["fusion"] for b in ({}, OTHER_SOUND))
    assert float(jnp.abs(one - other).max()) > 1e-4


def test_a_bottleneck_adds_the_averages_of_the_others_by_hand():
    block, one = Bottleneck(4), batch()
    steps = {s: one[s] for s in SHAPES}
    masks = {s: one[f"{s}_mask"].copy() for s in SHAPES}
    masks["video"][0, 1] = masks["audio"][1] = False
    variables = randomised(jax.eval_shape(block.init, jax.random.key(0), steps, masks))
    params = jax.tree.map(np.float64, variables["params"])
    got = jax.jit(block.apply)(variables, steps, masks)

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    def narrow(stream, x):
        z, norm = dense(np.float64(x), params[f"down_{stream}"]), params[f"norm_{stream}"]
        return (z - z.mean()) / np.sqrt(z.var() + 1e-5) * norm["scale"] + norm["bias"]

    for stream, other in (("audio", "video"), ("video", "audio")):
        for b, t in np.ndindex(got[stream].shape[:2]):
            heard = [narrow(other, x) for x, real in zip(steps[other][b], masks[other][b], strict=True) if real]
            met = narrow(stream, steps[stream][b, t]) + (np.mean(heard, 0) if heard else 0)
            back = np.float64(jax.nn.gelu(dense(met, params[f"up_{stream}"]), approximate=False))
            want = steps[stream][b, t] + np.tanh(params[f"gate_{stream}"]) * back
            np.testing.assert_allclose(got[stream][b, t], want, atol=1e-5)


def test_the_sound_reaches_two_of_three_branches():
    assert moved("three_branch", OTHER_SOUND) == {
        "audio": True, "video": False, "cross": True, "fusion": True, "logits": True,
    }  # fmt: skip


@pytest.mark.parametrize(("change", "missing"), [(SILENCE, "audio"), (BLIND, "video")])
def test_the_branch_that_needs_both_is_zero_without_one(change, missing):
    variables, apply = compiled("three_branch")
    features = apply(variables, batch() | change).features
    assert not features["cross"].any()
    assert {s: bool(features[s].any()) for s in SHAPES} == {s: s != missing for s in SHAPES}
    np.testing.assert_allclose(
        features["fusion"], jnp.concatenate([features[s] for s in ("audio", "video", "cross")], -1)
    )


def test_tmep_counts_streams_alike_however_long_and_leaves_out_what_is_missing():
    variables, apply = compiled("tmep")
    features = apply(variables, batch()).features
    np.testing.assert_allclose(features["fusion"], (features["audio"] + features["video"]) / 2, atol=1e-6)
    alone = apply(variables, batch() | SILENCE).features
    np.testing.assert_allclose(alone["fusion"], alone["video"], atol=1e-6)


@pytest.mark.parametrize("kept", ["video_asks", "together"])
def test_tmeps_streams_hear_each_other_across_and_together(kept):
    """With the output map of either kind of attention zero, the other one still passes audio."""
    variables, _ = compiled("tmep")
    joint = variables["params"]["joint_0"]
    deaf = {
        k: v if k == kept else v | {"attention": jax.tree.map(np.zeros_like, v["attention"])} for k, v in joint.items()
    }
    changed = {"params": variables["params"] | {"joint_0": deaf}}
    assert moved("tmep", OTHER_SOUND, changed)["video"]
    silent = {k: v | {"attention": jax.tree.map(np.zeros_like, v["attention"])} for k, v in joint.items()}
    assert not moved("tmep", OTHER_SOUND, {"params": variables["params"] | {"joint_0": silent}})["video"]


@pytest.mark.parametrize("name", ["tmep", pytest.param("three_branch", marks=pytest.mark.thorough)])
def test_dropout_acts_in_training(name):
    module = FUSIONS[name].module(classes=3, **SMALL[name])
    train = jax.jit(functools.partial(module.apply, train=True))
    predict = lambda key: train(compiled(name)[0], batch(), rngs={"dropout": jax.random.key(key, impl="rbg")})  # noqa: E731
    one, other = (predict(key).logits["fusion"] for key in (1, 2))
    assert float(jnp.abs(one - other).max()) > 1e-3

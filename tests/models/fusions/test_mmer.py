"""MMER and the released AVT-CA: gradients against PyTorch, missing streams, short clips, modality dropout."""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.models.fusions.avtca_released import AvtCaReleased
from avjax.models.fusions.mmer import LEAST, CrossGate, MmerIa, MmerIt
from avjax.models.fusions.registry import FUSIONS

PARITY = pathlib.Path(os.environ.get("AVJAX_PARITY_DIR", pathlib.Path(__file__).parents[2] / "parity"))
LIGHT = [
    name if name == "mmer_ia" else pytest.param(name, marks=pytest.mark.slow)
    for name in ("mmer_ia", "mmer_it", "mmer_lt", "avtca_released")
]
WIDTHS = {"audio": (16, 7), "video": (5, 9)}


def batch(clips: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    out = {}
    for s, (steps, width) in WIDTHS.items():
        out[s] = rng.normal(size=(clips, steps, width)).astype(np.float32)
        out[f"{s}_mask"] = np.arange(steps)[None] < steps - np.arange(clips)[:, None]
    return out


def without(one: dict[str, np.ndarray], *streams: str) -> dict[str, np.ndarray]:
    return one | {f"{s}_mask": np.zeros_like(one[f"{s}_mask"]) for s in streams}


@functools.cache
def compiled(name: str):
    module = FUSIONS[name].module(classes=3)
    return jax.jit(module.init)(jax.random.key(0), batch()), jax.jit(module.apply)


def test_parameter_count_of_the_released_avt_ca():
    """2,004,462 with the classifiers 128 → 8 of either branch, which nothing reads and we leave out."""
    one = {"audio": jnp.zeros((1, 156, 10)), "video": jnp.zeros((1, 2, 224, 224, 3), jnp.uint8)}
    one |= {f"{s}_mask": jnp.ones(x.shape[:2], bool) for s, x in one.items()}
    shapes = jax.eval_shape(AvtCaReleased(classes=8, frames=True).init, jax.random.key(0), one)
    count = {k: sum(v.size for v in jax.tree.leaves(tree)) for k, tree in shapes.items()}
    assert count == {"params": 2_004_462 - 2 * (128 * 8 + 8), "batch_stats": 20_032}


def made(rng: np.random.Generator, shape: list[int], kind: str) -> np.ndarray:
    """A reference tensor as training would leave it: matrices by their fan-in, factors and variances near 1."""
    x = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])) if kind == "matrix" else 0.1 * rng.normal(size=shape)
    return (np.exp(x) if kind in ("scale", "variance") else x).astype(np.float32)


@pytest.mark.slow
def test_gradients_of_the_released_avt_ca_are_those_of_pytorch():
    torch = pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    from tests.references import avtca_repo_it as ours

    if not (PARITY / "avtca_repo_it.json").is_file():
        pytest.skip(f"no parity files at {PARITY} (set AVJAX_PARITY_DIR)")
    meta = json.loads((PARITY / "avtca_repo_it.json").read_text())
    hyper, rng = meta["hyper"] | {"seq_length": 2}, np.random.default_rng(0)
    state = {name: made(rng, shape, kind) for name, shape, kind in meta["params"]}
    images = rng.integers(0, 256, (4, 3, 32, 32)).astype(np.uint8)
    inputs = {"audio": rng.normal(size=(2, 10, 20)).astype(np.float32), "video_uint8": images}
    direction = rng.normal(size=(2, hyper["num_classes"])).astype(np.float32)

    tensors = {k: torch.tensor(v, requires_grad="running" not in k) for k, v in state.items()}
    logits = ours.reference(tensors, {k: torch.tensor(v) for k, v in inputs.items()}, hyper)["logits"]
    (logits * torch.tensor(direction)).sum().backward()
    logits = logits.detach().numpy()
    theirs = ours.convert(
        {k: np.zeros(v.shape) if v.grad is None else v.grad.numpy() for k, v in tensors.items()}, hyper
    )
    module, fixed = ours.module(hyper), {"batch_stats": ours.statistics(state, hyper)}

    def total(params):
        computed = ours.answers(module.apply({"params": params, **fixed}, ours.batch(inputs, hyper)))["logits"]
        return jnp.sum(computed * direction), computed

    grads, computed = jax.jit(jax.grad(total, has_aux=True))(ours.convert(state, hyper))
    np.testing.assert_allclose(computed, logits, atol=1e-4 * logits.std())
    assert {k for k, v in tensors.items() if v.requires_grad and v.grad is None} == set(ours.IGNORED)
    for path, want in jax.tree_util.tree_leaves_with_path(theirs):
        got = functools.reduce(lambda tree, key: tree[key.key], path, grads)
        assert float(jnp.abs(got - want).max()) <= 1e-3 * np.abs(want).max() + 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("missing", ["audio", "video"])
def test_a_stream_alone_passes_where_they_would_meet(name, missing):
    variables, apply = compiled(name)
    one = without(batch(), missing)
    output = apply(variables, one)
    half = slice(0, 128) if missing == "audio" else slice(128, 256)
    assert not output.features["fusion"][:, half].any()
    assert output.features["fusion"].any()
    others = jax.tree.map(lambda v: v + 1.0, {k: variables["params"][k] for k in ("first_asks", "second_asks")})
    changed = apply({**variables, "params": variables["params"] | others}, one)
    np.testing.assert_array_equal(changed.logits["fusion"], output.logits["fusion"])


@pytest.mark.parametrize("name", LIGHT)
def test_nothing_is_answered_by_the_bias(name):
    variables, apply = compiled(name)
    logits = apply(variables, without(batch(), "audio", "video")).logits["fusion"]
    np.testing.assert_array_equal(logits, np.tile(variables["params"]["head"]["bias"], (3, 1)))


def test_a_short_clip_is_followed_by_zeros():
    variables, apply = compiled("mmer_it")
    one = batch()
    short = one | {"audio": one["audio"][:, :4], "audio_mask": np.ones((3, 4), bool)}
    zeros = np.zeros((3, LEAST - 4, 7), np.float32)
    filled = short | {"audio": np.concatenate([short["audio"], zeros], 1), "audio_mask": np.ones((3, LEAST), bool)}
    np.testing.assert_allclose(
        apply(variables, short).logits["fusion"], apply(variables, filled).logits["fusion"], atol=1e-6
    )


def test_a_gate_sums_the_mean_head_over_the_real_steps_that_ask():
    one = batch()
    gate = CrossGate(heads=2)
    x, other = one["audio"][..., :4], one["video"]
    args = (x, one["audio_mask"], other, one["video_mask"])
    total, weights = gate.apply(gate.init(jax.random.key(0), *args), *args)
    for b in range(3):
        asking = int(one["audio_mask"][b].sum())
        np.testing.assert_allclose(total[b], np.asarray(weights)[b, :, :asking].mean(0).sum(0), atol=1e-5)
        assert float(total[b].sum()) == pytest.approx(asking, abs=1e-4)


def test_softhard_draws_four_kinds_of_clips_in_training_only():
    count = 400
    one = {k: np.repeat(v[:1], count, 0) for k, v in batch().items()}
    variables, apply = compiled("mmer_ia")
    soft = MmerIa(classes=3)
    drawn = jax.jit(functools.partial(soft.apply, train=True))(variables, one, rngs={"dropout": jax.random.key(0)})
    both, silent, blind = (
        np.asarray(apply(variables, b).logits["fusion"])[:1]
        for b in (one, without(one, "audio"), without(one, "video"))
    )
    like = lambda x: int((np.abs(np.asarray(drawn.logits["fusion"]) - x).max(-1) < 1e-5).sum())  # noqa: E731
    counts = [like(x) for x in (both, silent, blind)]
    counts.append(count - sum(counts))
    assert all(70 < n < 130 for n in counts), counts
    np.testing.assert_array_equal(apply(variables, one).logits["fusion"], np.tile(both, (count, 1)))


@pytest.mark.slow
def test_frames_are_a_picture_network_and_features_are_not():
    rng = np.random.default_rng(0)
    one = batch(2) | {"video": rng.integers(0, 256, (2, 5, 16, 16, 3)).astype(np.uint8)}
    module = MmerIt(classes=3, frames=True)
    shapes = jax.eval_shape(module.init, jax.random.key(0), one)
    variables = jax.tree.map(lambda v: (0.1 * rng.random(v.shape)).astype(np.float32), shapes)
    apply = jax.jit(lambda v, b: module.apply(v, b, mutable=["batch_stats"]))
    output, moved = apply(variables, one)
    still = jax.tree.map(np.array_equal, moved["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(still.pop("frame_network"))), "its statistics come with its weights"
    assert not any(jax.tree.leaves(still)), "those of the sequences move"
    hidden = np.where(one["video_mask"][..., None, None, None], one["video"], 255).astype(np.uint8)
    np.testing.assert_array_equal(
        apply(variables, one | {"video": hidden})[0].logits["fusion"], output.logits["fusion"]
    )
    assert "frame_network" not in compiled("mmer_it")[0]["params"]

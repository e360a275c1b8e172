"""MISA and MFM: their terms by hand, who takes part in them, and what each part of a system sees."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.models.base import Output
from avjax.models.fusions import mfm, misa
from avjax.models.fusions.mfm import Mfm
from avjax.models.fusions.misa import Misa
from avjax.models.fusions.registry import FUSIONS

STREAMS = ("text", "audio", "video")
SMALL = {
    "misa": Misa(3, width=4, inner=8, recurrent=2),
    "mfm": Mfm(
        3,
        latents={"label": 3, "text": 4, "audio": 2, "video": 3},
        factors={"label": 8, "text": 3, "audio": 2, "video": 4},
        widths={"text": 3, "audio": 2, "video": 4},
        memory=3,
        hidden=4,
        segment_count=3,
    ),
}
ALL = np.ones(4, bool)


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """Six clips: whole ones, one without audio, and padding of the batch."""
    rng = np.random.default_rng(0)
    out = {"label": np.array([0, 1, 2, 0, 1, 2]), "weight": np.float32([1, 1, 1, 1, 0, 0])}
    for s in STREAMS:
        out[s] = rng.normal(size=(6, 4, 3)).astype(np.float32)
        out[f"{s}_mask"] = np.arange(4)[None] < np.array([[4], [3], [0 if s == "audio" else 2], [4], [4], [1]])
    return out


@functools.cache
def run(name: str):
    """Random params, biases too, the module under jit, and its output."""
    module, rng = SMALL[name], np.random.default_rng(5)
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch())
    variables = jax.tree.map(lambda v: np.float32(rng.normal(size=v.shape)), shapes)
    apply = jax.jit(module.apply)
    return variables, apply, apply(variables, batch())


LOSSES = {name: jax.jit(FUSIONS[name].loss, static_argnums=2) for name in SMALL}


@pytest.mark.parametrize("name", SMALL)
def test_terms_of_a_batch_ignore_its_padding(name):
    output = run(name)[2]
    padded = LOSSES[name](output, batch(), "single")
    first = jax.tree.map(lambda x: x[:4], (output, batch()))
    for term, want in LOSSES[name](*first, "single").items():
        assert padded[term].shape == (6,)
        np.testing.assert_allclose(padded[term][:4], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_what_stands_for_missing_sound_costs_nothing(name):
    """Features of a missing stream change no loss."""
    output = run(name)[2]
    clip = np.arange(6)[:, None] == 2
    changed = {k: np.where(clip, 0.3, v) if k.endswith("_audio") else v for k, v in output.features.items()}
    assert sum(k.endswith("_audio") for k in changed) >= 2
    before, after = (LOSSES[name](o, batch(), "single") for o in (output, output.replace(features=changed)))
    for term in before:
        np.testing.assert_allclose(after[term], before[term], rtol=1e-6)


# ---- MISA ---------------------------------------------------------------------------------------------------------

discrepancy, overlap = jax.jit(misa.moment_discrepancy), jax.jit(misa.overlap)


def test_moment_discrepancy_is_hand_worked():
    """Equal means; central moment 2 is 1/4 and 0, 3 is 0 and 0, 4 is 1/16 and 0, 5 is 0 and 0."""
    x, y = np.float32([[0], [1], [9]]), np.float32([[0.5], [0.5], [0.5]])
    rows = np.array([True, True, False])
    assert float(discrepancy(x, y, rows)) == pytest.approx(1 / 4 + 1 / 16)
    assert float(discrepancy(x, x + np.float32(0.25), rows)) == pytest.approx(0.25)


def test_equal_distributions_pull_at_nothing():
    x = np.float32([[0.1, 0.9], [0.4, 0.2]])
    np.testing.assert_array_equal(jax.jit(jax.grad(misa.moment_discrepancy))(x, x, ALL[:2]), 0)


def test_overlap_is_hand_worked():
    """Channels that go together count 4² out of 4 products; those that do not, nothing."""
    ones, nothing = np.float32([1, -1, 1, -1]), np.zeros(4, np.float32)
    x, y, other = np.stack([ones, nothing], -1), np.stack([nothing, 3 * ones + 7], -1), np.float32([1, 1, -1, -1])
    assert float(overlap(x, y, ALL)) == pytest.approx(16 / 4, rel=1e-4)
    assert float(overlap(x, np.stack([other, nothing], -1), ALL)) == pytest.approx(0, abs=1e-6)


def test_no_gradient_of_the_overlap_flows_through_lengths():
    x, y = (np.float32(v - v.mean(0)) for v in np.random.default_rng(0).normal(size=(2, 4, 3)))
    size, other = np.linalg.norm(x, axis=-1, keepdims=True), y / np.linalg.norm(y, axis=-1, keepdims=True)
    # Of the mean square of G = (x/size)ᵀ·other, then of the centring.
    want = (other @ (2 / 9 * (x / size).T @ other).T) / size
    got = jax.jit(jax.grad(misa.overlap))(x, y, ALL)
    np.testing.assert_allclose(got, want - want.mean(0), atol=1e-5)


def test_misa_loss_weighs_its_terms():
    one = {"label": jnp.array([0, 1]), "weight": jnp.ones(2)} | {
        f"{s}_mask": jnp.ones((2, 1), bool) for s in ("audio", "video")
    }
    sides, still = jnp.array([[0.0], [1.0]]), jnp.array([[0.5], [0.5]])
    features = {
        "private_audio": sides, "private_video": still, "shared_audio": sides, "shared_video": still,
        "utterance_audio": sides, "utterance_video": sides, "rebuilt_audio": sides + 2, "rebuilt_video": sides,
    }  # fmt: skip
    terms = LOSSES["misa"](Output({"fusion": jnp.zeros((2, 3))}, features, {}), one, "single")
    np.testing.assert_allclose(terms["fusion"], math.log(3), rtol=1e-6)
    np.testing.assert_allclose(terms["similarity"], 1 / 4 + 1 / 16, rtol=1e-6)
    # The two audio vectors are the same: (1 + 1)². The video vectors do not vary, nor correlate with audio.
    np.testing.assert_allclose(terms["difference"], 0.3 * 4, rtol=1e-4)
    np.testing.assert_allclose(terms["reconstruction"], (4 + 0) / 2, rtol=1e-6)


def test_misa_shares_one_encoder():
    """Streams with equal vectors agree in the shared space and part in their own."""
    variables, apply, _ = run("misa")
    params = variables["params"]
    assert {"shared", "private_audio", "private_video"} <= set(params)
    own = [k for k in params if k.startswith("audio_")]
    params = params | {k.replace("audio", "video"): params[k] for k in own} | {"project_video": params["project_audio"]}
    one = batch() | {"video": batch()["audio"], "video_mask": batch()["audio_mask"]}
    features = apply({"params": params}, one).features
    np.testing.assert_allclose(features["shared_audio"], features["shared_video"], atol=1e-6)
    assert np.abs(features["private_audio"] - features["private_video"]).max() > 0.1


def test_misa_reads_text_by_its_mean():
    """The order of tokens does not matter; the order of frames does."""
    variables, apply, output = run("misa")
    for stream, same in (("text", True), ("video", False)):
        mask = batch()[f"{stream}_mask"]
        turned = batch() | {stream: batch()[stream][:, ::-1], f"{stream}_mask": mask[:, ::-1]}
        got = apply(variables, turned).features[f"utterance_{stream}"]
        assert np.allclose(got, output.features[f"utterance_{stream}"], atol=1e-5) == same


# ---- MFM ----------------------------------------------------------------------------------------------------------


from_normal = jax.jit(mfm.normal_discrepancy)


def test_normal_discrepancy_is_hand_worked():
    """One vector at 0, d = 1: 1 - 2·√(1/3) + √(1/5)."""
    z, rows = np.float32([[0], [5]]), np.array([True, False])
    assert float(from_normal(z, rows)) == pytest.approx(1 - 2 / math.sqrt(3) + 1 / math.sqrt(5), rel=1e-5)
    assert float(from_normal(z, ~rows & rows)) == 0


def test_normal_discrepancy_is_the_mean_of_the_released_one():
    """Against draws: the parts with normal vectors are means over many of them."""
    rng = np.random.default_rng(0)
    z, normal = rng.normal(1.0, 2.0, (5, 3)), rng.normal(size=(2000, 3))

    def kernel(x, y):
        return np.exp(-((x[:, None] - y[None]) ** 2).mean(-1) / 3).mean()

    want = kernel(z, z) + kernel(normal[:1000], normal[1000:]) - 2 * kernel(z, normal)
    assert float(from_normal(np.float32(z), np.ones(5, bool))) == pytest.approx(want, abs=0.01)


def test_normal_discrepancy_prefers_normal_vectors():
    z, rows = np.float32(np.random.default_rng(0).normal(size=(200, 2))), np.ones(200, bool)
    near, shifted, narrow = (float(from_normal(v, rows)) for v in (z, z + 1, z / 4))
    assert 0 <= near < 0.01 < min(shifted, narrow)


def test_mfm_loss_weighs_its_terms():
    one = {"label": jnp.array([0]), "weight": jnp.ones(1)}
    for s, value in (("text", 1.0), ("audio", 2.0), ("video", 3.0)):
        one |= {s: jnp.array([[[value - 1], [value + 1], [99.0]]]), f"{s}_mask": jnp.array([[True, True, False]])}
    features = {f"rebuilt_{s}": jnp.zeros((1, 1)) for s in STREAMS}
    features |= {f"latent_{s}": jnp.zeros((1, 1)) for s in ("label", *STREAMS)}
    terms = LOSSES["mfm"](Output({"fusion": jnp.zeros((1, 3))}, features, {}), one, "single")
    prior = 1 - 2 / math.sqrt(3) + 1 / math.sqrt(5)
    want = {"fusion": math.log(3), "text_rebuilt": 1.0, "audio_rebuilt": 0.04, "video_rebuilt": 4.5, "prior": 4 * prior}
    assert {k: float(v[0]) for k, v in terms.items()} == pytest.approx(want, rel=1e-4)


def test_mfm_parts_see_what_the_factorization_lets_them():
    """The label hangs on its own factor alone; a stream is rebuilt from its own and the label's."""
    variables, apply, output = run("mfm")
    label, audio = set(), set()
    for part, params in variables["params"].items():
        other = variables["params"] | {part: jax.tree.map(lambda v: v + np.float32(0.5), params)}
        changed = apply({"params": other}, batch())
        label |= {part} if np.any(changed.logits["fusion"] != output.logits["fusion"]) else set()
        audio |= {part} if np.any(changed.features["rebuilt_audio"] != output.features["rebuilt_audio"]) else set()
    assert label == {"memory_network", "label_factor", "fuse", "head"}
    own = {"audio_states", "audio_latent", "audio_factor", "rebuild_audio"}
    assert audio == own | {"memory_network", "label_factor"}

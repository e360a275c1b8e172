"""UAVM, VAVL and LADDER: shared layers, missing streams, and losses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.models.base import Output
from avjax.models.fusions import ladder, uavm, vavl
from avjax.models.fusions.ladder import Ladder
from avjax.models.fusions.uavm import Uavm
from avjax.models.fusions.vavl import Vavl

STREAMS = {"audio": 7, "video": 9}
SMALL = {
    "uavm": Uavm(classes=3, width=8, heads=2, depth=1, shared_depth=1, positions=4),
    "vavl": Vavl(classes=3, bottleneck=5, width=8, heads=2, kernel=3, depth=1, shared_depth=1),
    "ladder": Ladder(classes=3, widths=(8, 6)),
}


def batch(missing: str = "") -> dict[str, np.ndarray]:
    """Four clips, the last of which lacks the stream `missing`."""
    rng = np.random.default_rng(0)
    out = {"label": np.array([0, 1, 2, 0]), "weight": np.ones(4, np.float32)}
    for s, width in STREAMS.items():
        out[s] = rng.normal(size=(4, 6, width)).astype(np.float32)
        out[f"{s}_mask"] = np.arange(6)[None] < np.array([[6], [4], [3], [0 if s == missing else 5]])
    return out


@functools.cache
def compiled(name: str):
    module = SMALL[name]
    return jax.jit(module.init)(jax.random.key(0), batch()), jax.jit(module.apply)


def cross_entropy(logits, label) -> float:
    return math.log(sum(math.exp(z) for z in logits)) - logits[label]


# ---- UAVM ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_uavm_fuses_the_streams_that_a_clip_has():
    variables, apply = compiled("uavm")
    logits = apply(variables, batch("video")).logits
    np.testing.assert_allclose(logits["fusion"][:3], (logits["audio"] + logits["video"])[:3] / 2, atol=1e-6)
    np.testing.assert_allclose(logits["fusion"][3], logits["audio"][3], atol=1e-6)


@pytest.mark.slow
def test_uavm_loss_is_half_of_each_stream_that_is_there():
    variables, apply = compiled("uavm")
    one = batch("audio")
    output = apply(variables, one)
    terms = uavm.uavm_loss(output, one, "single")
    assert set(terms) == {"audio", "video"}
    for s in terms:
        expected = [cross_entropy(np.float64(output.logits[s][i]), y) / 2 for i, y in enumerate(one["label"])]
        if s == "audio":
            expected[3] = 0.0
        np.testing.assert_allclose(terms[s], expected, atol=1e-5)


@pytest.mark.slow
def test_uavm_streams_of_equal_layers_answer_alike():
    """With one stream's layers copied to the other, the same steps give the same output: the rest is shared."""
    module = Uavm(classes=3, width=8, heads=2, depth=1, shared_depth=1, positions=4)
    one = batch()
    one |= {"video": one["audio"], "video_mask": one["audio_mask"]}
    params = jax.jit(module.init)(jax.random.key(0), one)["params"]
    assert set(params) == {"audio", "video", "shared", "head_norm", "head"}
    logits = jax.jit(module.apply)({"params": params | {"video": params["audio"]}}, one).logits
    np.testing.assert_allclose(logits["audio"], logits["video"], atol=1e-6)


def test_uavm_averages_long_streams_onto_its_positions():
    variables, apply = compiled("uavm")
    full = {f"{s}_mask": np.ones((4, 4), bool) for s in STREAMS}
    one = {s: batch()[s][:, :4] for s in STREAMS}
    twice = {k: np.repeat(v, 2, 1) for k, v in (one | full).items()}
    short, long = (apply(variables, b).logits["fusion"] for b in (one | full, twice))
    np.testing.assert_allclose(short, long, atol=1e-5)


# ---- VAVL ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vavl_fused_head_leaves_the_encoders_alone():
    variables, _ = compiled("vavl")
    rest = {k: v for k, v in variables.items() if k != "params"}

    def total(params, head):
        return SMALL["vavl"].apply({"params": params, **rest}, batch()).logits[head].sum()

    gradients = jax.jit(lambda p: {head: jax.grad(total)(p, head) for head in ("fusion", "audio")})(variables["params"])
    moved = {
        head: {name for name, g in tree.items() if any(v.any() for v in jax.tree.leaves(g))}
        for head, tree in gradients.items()
    }
    assert moved["fusion"] == {"head_fusion"}
    assert moved["audio"] == {"head_audio", "audio_0", "shared_0", "norm", "audio_project", "audio_bottleneck"}


def test_vavl_loss_is_hand_worked():
    one = {
        "label": jnp.array([1, 0]),
        "weight": jnp.ones(2),
        "audio": jnp.array([[[1.0, 2.0], [3.0, 6.0]], [[9.0, 9.0], [9.0, 9.0]]]),
        "audio_mask": jnp.array([[True, True], [False, False]]),
    }
    logits = jnp.array([[0.0, 1.0], [2.0, 0.0]])
    features = {"audio_rebuilt": jnp.array([[1.0, 1.0], [5.0, 5.0]])}
    terms = vavl.vavl_loss(Output({"fusion": logits, "audio": logits}, features, {}), one, "single")
    entropy = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2))]
    np.testing.assert_allclose(terms["fusion"], entropy, atol=1e-6)
    np.testing.assert_allclose(terms["audio"], [entropy[0], 0], atol=1e-6)
    # The mean input is (2, 4): 2 · (1 + 9) / 2.
    np.testing.assert_allclose(terms["audio_rebuilt"], [10.0, 0], atol=1e-6)


# ---- LADDER -------------------------------------------------------------------------------------------------------


def test_ladder_without_noise_starts_with_nothing_to_mend():
    variables, apply = compiled("ladder")
    np.testing.assert_allclose(apply(variables, batch()).features["errors"], 0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["audio", "video"])
def test_ladder_mends_noise_from_the_other_stream(missing):
    variables, _ = compiled("ladder")
    one = batch(missing)

    def cost(params):
        output = SMALL["ladder"].apply({"params": params}, one, train=True, rngs={"dropout": jax.random.key(1)})
        terms = ladder.ladder_loss(output, one, "single")
        return terms["reconstruction"].sum(), (terms, output)

    gradient = jax.jit(jax.grad(cost, has_aux=True))
    grads, (terms, output) = gradient(variables["params"])
    assert output.features["errors"].shape == (4, 2 * 3)
    np.testing.assert_allclose(terms["reconstruction"], output.features["errors"].mean(-1), atol=1e-6)
    assert (np.asarray(terms["reconstruction"]) > 0).tolist() == [True, True, True, False]
    # The first step moves the curves of `Denoise`, which then look at what comes from above.
    grads, _ = gradient(jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads))
    reached = {name for name, g in grads.items() if any(v.any() for v in jax.tree.leaves(g))}
    assert {f"{s}_{part}_{i}" for s in STREAMS for part in ("down", "denoise") for i in range(3)} <= reached


def test_ladder_noise_has_the_size_it_is_told():
    variables, _ = compiled("ladder")
    loud = SMALL["ladder"].clone(noise=3.0)
    error = {
        m.noise: float(
            m.apply(variables, batch(), train=True, rngs={"dropout": jax.random.key(1)}).features["errors"].mean()
        )
        for m in (SMALL["ladder"], loud)
    }
    assert error[3.0] > 20 * error[0.3]

"""Baselines and AMH: shares of the attention, utterance features, and the hops by plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from avjax.layers.lstm import LstmEncoder
from avjax.models.fusions.amh import Amh
from avjax.models.fusions.averages import Additive, Concat, WeightedSum

WIDTHS = {"text": 4, "audio": 3, "video": 5}
STATES = {"text": 4, "audio": 2, "video": 3}


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """Three clips; the second lacks its sound, the third has nothing at all."""
    rng, out = np.random.default_rng(0), {}
    for i, (s, width) in enumerate(WIDTHS.items()):
        out[s] = rng.normal(size=(3, 4 + i, width)).astype(np.float32)
        out[f"{s}_mask"] = np.arange(4 + i)[None] < np.array([[3 + i], [0 if s == "audio" else 2], [0]])
    return out


@functools.cache
def run(kind, **settings):
    """A small module, params that are all random, biases too, and its answer under jit."""
    small = {"widths": STATES} if kind is Amh else {"width": 6, "hidden": 5}
    module = kind(3, **small | settings)
    variables = randomised(jax.eval_shape(module.init, jax.random.key(0), batch()))
    return module, variables, jax.jit(module.apply)(variables, batch())


def randomised(shapes):
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda v: np.float32(rng.normal(size=v.shape)), shapes)


def dense(x, layer):
    return np.float64(x) @ np.float64(layer["kernel"]) + np.float64(layer.get("bias", 0))


def softmax(scores):
    shares = np.exp(scores - np.max(scores))
    return shares / shares.sum()


# ---- Baselines ----------------------------------------------------------------------------------------------------


def test_a_baseline_reads_averages_as_it_reads_the_steps():
    module, variables, want = run(Concat)
    means = {}
    for s in WIDTHS:
        real = batch()[f"{s}_mask"]
        total = np.where(real[..., None], batch()[s], 0).sum(1, keepdims=True)
        means |= {s: total / np.maximum(real.sum(1), 1)[:, None, None], f"{s}_mask": real.any(1, keepdims=True)}
    got = jax.jit(module.apply)(variables, means)
    np.testing.assert_allclose(got.logits["fusion"], want.logits["fusion"], atol=1e-5)


def test_concat_leaves_the_place_of_a_missing_stream_empty():
    joint = np.asarray(run(Concat)[2].features["joint"])
    assert (joint != 0).reshape(3, 3, 6).any(-1).tolist() == [[True] * 3, [True, False, True], [False] * 3]


def test_weighted_sum_renormalises_over_the_streams_of_a_clip():
    module, variables, _ = run(WeightedSum)
    params = variables["params"] | {"scores": jnp.log(jnp.array([1.0, 2.0, 3.0]))}
    got = jax.jit(module.apply)({"params": params}, batch()).attention["streams"]
    np.testing.assert_allclose(got, [[1 / 6, 2 / 6, 3 / 6], [1 / 4, 0, 3 / 4], [0, 0, 0]], atol=1e-6)


def test_additive_attention_by_plain_loops():
    _, variables, output = run(Additive)
    params, real = variables["params"], [[0, 1, 2], [0, 2]]
    for b, present in enumerate(real):
        vectors = []
        for s in np.array(list(WIDTHS))[present]:
            mean = batch()[s][b][batch()[f"{s}_mask"][b]].mean(0)
            vectors.append(dense(mean, params[f"project_{s}"]))
        scores = [dense(np.tanh(dense(v, params["attention"])), params["score"])[0] for v in vectors]
        want = softmax(scores)
        np.testing.assert_allclose(output.attention["streams"][b][jnp.array(present)], want, atol=1e-5)
        np.testing.assert_allclose(output.features["joint"][b], want @ vectors, atol=1e-4)


# ---- AMH ----------------------------------------------------------------------------------------------------------


@functools.cache
def encoded(stream: str):
    """States and last state of a stream, as the module with the params of `run(Amh)` has them."""
    params = run(Amh)[1]["params"][f"{stream}_states"]
    apply = jax.jit(LstmEncoder(STATES[stream]).apply)
    return [np.float64(x) for x in apply({"params": params}, batch()[stream], batch()[f"{stream}_mask"])]


def test_hops_by_plain_loops():
    """Yoon et al. 2020, Eqs. 2–4: each hop replaces one vector, given the other two as they stand then."""
    _, variables, output = run(Amh)
    params = variables["params"]
    states, vectors = {s: encoded(s)[0] for s in WIDTHS}, {s: encoded(s)[1].copy() for s in WIDTHS}
    rounds = ["video", "audio", "text", "video", "audio", "text", "video"]
    assert list(output.attention) == [f"hop_{i + 1}_{s}" for i, s in enumerate(rounds)]
    for i, s in enumerate(rounds):
        others = np.concatenate([vectors[o] for o in WIDTHS if o != s], -1)
        query = dense(others, params[f"hop_{i + 1}"])
        for b in range(3):
            real = batch()[f"{s}_mask"][b]
            shares = np.zeros(real.shape)
            if real.any():
                shares[real] = softmax(states[s][b][real] @ query[b])
            vectors[s][b] = shares @ states[s][b]
            np.testing.assert_allclose(output.attention[f"hop_{i + 1}_{s}"][b], shares, atol=1e-5)
    for s in WIDTHS:
        np.testing.assert_allclose(output.features[s], vectors[s], atol=1e-5)


def test_one_hop_changes_only_the_picture():
    _, variables, _ = run(Amh)
    features = jax.jit(Amh(3, hops=1, widths=STATES).apply)(variables, batch()).features
    same = {s: np.allclose(features[s], encoded(s)[1], atol=1e-6) for s in WIDTHS}
    assert same == {"text": True, "audio": True, "video": False}


def test_two_streams_hop_to_and_fro():
    module = Amh(3, streams=("audio", "text"), hops=3, widths=STATES)
    output, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), batch())
    assert list(output.attention) == ["hop_1_audio", "hop_2_text", "hop_3_audio"]


def test_an_encoder_from_behind_reads_the_clip_turned_round():
    encoder = LstmEncoder(2, bidirectional=True)
    x, mask = batch()["text"][:1, :3], np.ones((1, 3), bool)
    params = randomised(jax.eval_shape(encoder.init, jax.random.key(0), x, mask))["params"]
    apply = jax.jit(encoder.apply)
    states, last = apply({"params": params}, x, mask)
    turned, turned_last = apply({"params": {"forth": params["back"], "back": params["forth"]}}, x[:, ::-1], mask)
    np.testing.assert_allclose(turned[:, ::-1], np.roll(states, 2, -1), atol=1e-6)
    np.testing.assert_allclose(turned_last, np.roll(last, 2, -1), atol=1e-6)


def test_bidirectional_hops_have_vectors_twice_as_wide():
    module = Amh(3, widths=STATES, bidirectional=True)
    output, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), batch())
    assert {s: output.features[s].shape[-1] for s in WIDTHS} == {s: 2 * w for s, w in STATES.items()}

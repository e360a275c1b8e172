"""AMH: the hops by plain loops, and its encoders."""

import functools

import jax
import numpy as np

from avjax.layers import LstmEncoder
from avjax.models.fusions.amh import Amh
from tests.models.fusions.made import WIDTHS, batch, dense, randomised, softmax

STATES = {"text": 4, "audio": 2, "video": 3}


@functools.cache
def run():
    """A small module with random params, biases too, and its output under jit."""
    module = Amh(3, widths=STATES)
    variables = randomised(module, batch())
    return variables, jax.jit(module.apply)(variables, batch())


@functools.cache
def encoded(stream: str):
    """States and last state of a stream, as the module with the params of `run()` has them."""
    params = run()[0]["params"][f"{stream}_states"]
    apply = jax.jit(LstmEncoder(STATES[stream]).apply)
    return [np.float64(x) for x in apply({"params": params}, batch()[stream], batch()[f"{stream}_mask"])]


def test_hops_by_plain_loops():
    """Yoon et al. 2020, Eqs. 2–4: each hop replaces one vector, given the other two as they stand then."""
    variables, output = run()
    params = variables["params"]
    states, vectors = {s: encoded(s)[0] for s in WIDTHS}, {s: encoded(s)[1].copy() for s in WIDTHS}
    rounds = ["video", "audio", "text", "video", "audio", "text", "video"]
    assert list(output.attention) == [f"hop_{i + 1}_{s}" for i, s in enumerate(rounds)]
    for i, s in enumerate(rounds):
        others = np.concatenate([vectors[o] for o in WIDTHS if o != s], -1)
        query = dense(others, params[f"hop_{i + 1}"])
        for b in range(3):
            real = batch()[f"{s}_mask"][b]
            alpha = np.zeros(real.shape)
            if real.any():
                alpha[real] = softmax(states[s][b][real] @ query[b])
            vectors[s][b] = alpha @ states[s][b]
            np.testing.assert_allclose(output.attention[f"hop_{i + 1}_{s}"][b], alpha, atol=1e-5)
    for s in WIDTHS:
        np.testing.assert_allclose(output.features[s], vectors[s], atol=1e-5)


def test_one_hop_changes_only_the_picture():
    variables, _ = run()
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
    params = randomised(encoder, x, mask)["params"]
    apply = jax.jit(encoder.apply)
    states, last = apply({"params": params}, x, mask)
    turned, turned_last = apply({"params": {"forth": params["back"], "back": params["forth"]}}, x[:, ::-1], mask)
    np.testing.assert_allclose(turned[:, ::-1], np.roll(states, 2, -1), atol=1e-6)
    np.testing.assert_allclose(turned_last, np.roll(last, 2, -1), atol=1e-6)


def test_bidirectional_hops_have_vectors_twice_as_wide():
    module = Amh(3, widths=STATES, bidirectional=True)
    output, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), batch())
    assert {s: output.features[s].shape[-1] for s in WIDTHS} == {s: 2 * w for s, w in STATES.items()}

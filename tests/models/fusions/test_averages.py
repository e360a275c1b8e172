"""Plain baselines: averages, attention weights, and missing streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from avjax.models.fusions.averages import Additive, Concat, WeightedSum
from tests.models.fusions.made import WIDTHS, batch, dense, randomised, softmax


@functools.cache
def run(kind):
    """A small module, random params, biases too, and its output under jit."""
    module = kind(3, width=6, hidden=5)
    variables = randomised(module, batch())
    return module, variables, jax.jit(module.apply)(variables, batch())


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

"""Contrastive losses: values worked by hand, plain loops, gradients, who is in whose set, memory and many devices."""

import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from avjax.errors import AvjaxError
from avjax.tasks import contrastive

LABEL = np.array([0, 1, 0, 2, 1, 1, -7])


def features(clips: int, width: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    z = np.random.default_rng(seed).normal(size=(2, clips, width))
    return tuple((z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32))


def losses(label=LABEL, **options) -> dict:
    """Both losses of (x, y, weight)."""
    return {
        "clip": functools.partial(contrastive.clip_loss, **options),
        "supcon": lambda x, y, weight: contrastive.supcon(x, y, jnp.asarray(label), weight, **options),
    }


def thorough(*values):
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]


BOTH = pytest.mark.parametrize("name", ["clip", "supcon"])


def summed(loss):
    """Value and gradient of the sum over clips, each with a factor of its own."""
    return jax.value_and_grad(lambda x, y, w: jnp.sum(loss(x, y, w) * (jnp.arange(len(w)) + 1)), (0, 1))


# ---- Values -------------------------------------------------------------------------------------------------------


def test_clip_loss_by_hand():
    # Similarities of each x to (y₀, y₁): (1, 0) and (0.6, 0.8); τ = 1.
    x, y = jnp.array([[1.0, 0.0], [0.6, 0.8]]), jnp.eye(2)
    by_x = math.log(1 + math.exp(-1)), math.log(1 + math.exp(-0.2))
    by_y = math.log(1 + math.exp(-0.4)), math.log(1 + math.exp(-0.8))
    actual = contrastive.clip_loss(x, y, jnp.ones(2), temperature=1.0)
    np.testing.assert_allclose(actual, [(a + b) / 2 for a, b in zip(by_x, by_y, strict=True)], rtol=1e-6)


def test_supcon_by_hand():
    # Two clips of two classes; every anchor has one positive, its clip's other feature, and two negatives.
    x, y = jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    first = math.log(2 * math.e + 1) - 1  # of x₀ and y₀: e to each other and to y₁, 1 to x₁
    second = (math.log(3) + math.log(2 * math.e + 1)) / 2  # of x₁, far from all; of y₁, near the other clip alone
    actual = contrastive.supcon(x, y, jnp.array([3, 9]), jnp.ones(2), temperature=1.0)
    np.testing.assert_allclose(actual, [first, second], rtol=1e-6)
    # One class: the mean over three positives, of the log probabilities.
    actual = contrastive.supcon(x, y, jnp.array([3, 3]), jnp.ones(2), temperature=1.0)
    near, far = math.log(2 * math.e + 1) - 2 / 3, math.log(3)
    np.testing.assert_allclose(actual, [near, (far + near) / 2], rtol=1e-6)


def clip_loops(x, y, label, tau) -> list[float]:
    out = []
    for i in range(len(x)):
        row = [math.exp(float(x[i] @ other) / tau) for other in y]
        column = [math.exp(float(y[i] @ other) / tau) for other in x]
        out.append(-(math.log(row[i] / sum(row)) + math.log(column[i] / sum(column))) / 2)
    return out


def supcon_loops(x, y, label, tau) -> list[float]:
    z, labels, value = [*x, *y], [*label, *label], []
    for i, anchor in enumerate(z):
        others = [a for a in range(len(z)) if a != i]
        total = sum(math.exp(float(anchor @ z[a]) / tau) for a in others)
        positives = [p for p in others if labels[p] == labels[i]]
        logs = [math.log(math.exp(float(anchor @ z[p]) / tau) / total) for p in positives]
        value.append(-sum(logs) / len(positives))
    return [(a + b) / 2 for a, b in zip(value[: len(x)], value[len(x) :], strict=True)]


LOOPS = {"clip": clip_loops, "supcon": supcon_loops}


@BOTH
@pytest.mark.parametrize("block", [3, 512, *thorough(1, 7, 14)])
def test_against_plain_loops_in_blocks_of_any_size(name, block):
    x, y = features(7)
    expected = LOOPS[name](np.float64(x), np.float64(y), LABEL, 0.07)
    loss = losses(block=block)[name]
    for run in (loss, jax.jit(loss)):
        actual = run(x, y, jnp.ones(7))
        assert actual.shape == (7,)
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


# ---- Gradients ----------------------------------------------------------------------------------------------------


def direct(x, y, label, weight, name: str, tau: float = 0.07) -> jax.Array:
    """The losses with a matrix of all similarities, for autodiff; every clip counts."""
    if name == "clip":
        s = x @ y.T / tau
        return (jax.nn.logsumexp(s, 0) + jax.nn.logsumexp(s, 1)) / 2 - jnp.diagonal(s)
    z, labels = jnp.concatenate([x, y]), jnp.concatenate([label, label])
    s, other = z @ z.T / tau, ~jnp.eye(len(z), dtype=bool)
    positive = (labels[:, None] == labels[None]) & other
    mean = jnp.sum(jnp.where(positive, s, 0), -1) / jnp.sum(positive, -1)
    return (jax.nn.logsumexp(jnp.where(other, s, -jnp.inf), -1) - mean).reshape(2, -1).mean(0)


@BOTH
@pytest.mark.parametrize("block", [3, *thorough(512)])
def test_gradient_is_that_of_the_direct_form_and_of_finite_differences(name, block):
    x, y = features(7)
    loss = losses(block=block)[name]
    theirs = summed(lambda x, y, w: direct(x, y, jnp.asarray(LABEL), w, name))(x, y, jnp.ones(7))
    for run in (summed(loss), jax.jit(summed(loss))):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), run(x, y, jnp.ones(7)), theirs
        )
    smooth = losses(block=block, temperature=0.5)[name]
    check_grads(lambda x, y: smooth(x, y, jnp.ones(7)), (x, y), 1, ["rev"], atol=1e-2, rtol=1e-2)


@BOTH
def test_temperature_divides_similarities_and_can_be_learnt(name):
    x, y = features(7)
    of = lambda t: losses(temperature=t)[name](x, y, jnp.ones(7))  # noqa: E731
    np.testing.assert_allclose(of(0.4), LOOPS[name](np.float64(x), np.float64(y), LABEL, 0.4), rtol=1e-5)
    check_grads(of, (jnp.float32(0.4),), 1, ["rev"], atol=1e-2, rtol=1e-2)


# ---- Who is in whose set ------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("poison", [np.nan, *thorough(np.inf, 1e30)])
def test_rows_of_weight_0_are_in_nobodys_set(name, poison):
    x, y = features(7)
    weight = jnp.array([1.0, 0, 0.5, 2, 0, 1, 1])
    kept = np.flatnonzero(weight)
    factors = jnp.asarray(kept + 1)
    x[1], y[1], y[4] = poison, -poison, poison
    actual = losses(block=3)[name](x, y, weight)
    alone = losses(LABEL[kept])[name]
    np.testing.assert_allclose(actual[kept], alone(x[kept], y[kept], jnp.ones(5)), rtol=1e-5)
    assert not np.asarray(actual)[[1, 4]].any()
    for ours, theirs in zip(
        jax.jit(summed(losses(block=3)[name]))(x, y, weight)[1],
        jax.jit(jax.grad(lambda x, y: jnp.sum(alone(x, y, jnp.ones(5)) * factors), (0, 1)))(x[kept], y[kept]),
        strict=True,
    ):
        np.testing.assert_allclose(ours[kept], theirs, rtol=1e-4, atol=1e-4)
        assert not np.asarray(ours)[[1, 4]].any()


@BOTH
def test_one_clip_costs_nothing_and_no_clip_neither(name):
    x, y = features(3)
    for weight in ([0, 1, 0], [0, 0, 0]):
        value, slopes = jax.jit(summed(losses(LABEL[:3])[name]))(x, y, jnp.array(weight))
        assert float(value) == pytest.approx(0, abs=1e-5)
        np.testing.assert_allclose(slopes, np.zeros((2, 3, 5)), atol=1e-4)
    np.testing.assert_allclose(losses(LABEL[:1])[name](x[:1], y[:1], jnp.ones(1)), [0], atol=1e-5)


@BOTH
def test_order_of_clips_moves_only_the_answers(name):
    x, y = features(7)
    order = np.random.default_rng(1).permutation(7)
    actual = losses(LABEL[order], block=2)[name](x[order], y[order], jnp.ones(7))
    np.testing.assert_allclose(actual, losses()[name](x, y, jnp.ones(7))[order], rtol=1e-5, atol=1e-6)


def test_clip_loss_is_symmetric_and_supcon_knows_labels_apart_from_their_names():
    x, y = features(7)
    for run in losses().values():
        np.testing.assert_allclose(run(x, y, jnp.ones(7)), run(y, x, jnp.ones(7)), rtol=1e-5, atol=1e-6)
    renamed = losses(2**31 - 8 - LABEL)["supcon"]
    np.testing.assert_array_equal(renamed(x, y, jnp.ones(7)), losses()["supcon"](x, y, jnp.ones(7)))


@pytest.mark.parametrize("label", [np.ones(7, np.float32), np.ones((7, 2), np.int32), np.ones(7, bool)])
def test_labels_that_are_no_classes_are_refused(label):
    x, y = features(7)
    with pytest.raises(AvjaxError, match=r"integers \(b,\)"):
        contrastive.supcon(x, y, jnp.asarray(label), jnp.ones(7))


# ---- In programs --------------------------------------------------------------------------------------------------


@BOTH
def test_lanes_together_are_lanes_alone(name):
    x, y = (np.stack(v) for v in zip(features(7), features(7, seed=1), strict=True))
    weight, label = jnp.array([[1.0] * 7, [1, 1, 0, 1, 1, 1, 0]]), jnp.stack([LABEL, LABEL[::-1]])

    def one(x, y, label, weight):
        return summed(losses(label, block=4)[name])(x, y, weight)

    together = jax.jit(jax.vmap(one))(x, y, label, weight)
    for i in range(2):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4),
            together,
            one(x[i], y[i], label[i], weight[i]),
        )


def test_one_program_may_use_it_twice():
    (x, y), (u, v) = features(7), features(4, width=3, seed=1)

    @jax.jit
    def both(x, y, u, v):
        first, _ = summed(losses(block=3)["supcon"])(x, y, jnp.ones(7))
        return first, summed(losses(LABEL[:4], block=2)["clip"])(u, v, jnp.ones(4))[0]

    expected = [
        np.dot(LOOPS["supcon"](x, y, LABEL, 0.07), range(1, 8)),
        np.dot(clip_loops(u, v, None, 0.07), range(1, 5)),
    ]
    np.testing.assert_allclose(both(x, y, u, v), expected, rtol=1e-4)


def test_half_precision_is_widened_and_gets_its_gradient_back():
    x, y = (v.astype(jnp.bfloat16) for v in features(7))
    for loss in losses().values():
        value, slopes = summed(loss)(x, y, jnp.ones(7))
        wide, _ = summed(loss)(x.astype(np.float32), y.astype(np.float32), jnp.ones(7))
        assert value.dtype == jnp.float32
        assert slopes[0].dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, wide)


ON_MANY_DEVICES = """
import sys
import numpy as np, jax, jax.numpy as jnp
sys.path.insert(0, ".")
from tests.tasks.test_contrastive import features, summed, losses
assert jax.device_count() == 8
split = jax.sharding.NamedSharding(jax.sharding.Mesh(jax.devices(), ("b",)), jax.sharding.PartitionSpec("b"))
x, y = features(64, 16)
label, weight = jnp.arange(64) % 5, jnp.float32(np.arange(64) % 9 > 0)
out = {}
for name in ("clip", "supcon"):
    run = jax.jit(lambda x, y, l, w: summed(losses(l, block=24)[name])(x, y, w))
    value, slopes = run(*(jax.device_put(v, split) for v in (x, y, label, weight)))
    assert not slopes[0].is_fully_replicated
    out |= {f"{name}_value": value, f"{name}_x": slopes[0], f"{name}_y": slopes[1]}
np.savez(sys.argv[1], **out)
"""


@pytest.mark.thorough
def test_clips_split_over_devices_are_one_set(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_MANY_DEVICES, str(tmp_path / "out.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    x, y = features(64, 16)
    label, weight = np.arange(64) % 5, jnp.float32(np.arange(64) % 9 > 0)
    with np.load(tmp_path / "out.npz") as actual:
        for name in ("clip", "supcon"):
            value, slopes = summed(losses(label)[name])(x, y, weight)
            np.testing.assert_allclose(actual[f"{name}_value"], value, rtol=1e-5)
            np.testing.assert_allclose([actual[f"{name}_x"], actual[f"{name}_y"]], slopes, rtol=1e-4, atol=1e-3)


# ---- Size ---------------------------------------------------------------------------------------------------------


def mean_compiled(loss, clips: int):
    """The program of value and gradient of the mean over clips of 512 dimensions in seven classes."""
    label = jnp.asarray(np.random.default_rng(0).integers(0, 7, clips))
    of = jax.jit(jax.value_and_grad(lambda x, y: jnp.mean(loss(x, y, label, jnp.ones(clips))), (0, 1)))
    shape = jax.ShapeDtypeStruct((clips, 512), jnp.float32)
    return of.lower(shape, shape).compile()


def blockwise(x, y, label, weight, name: str) -> jax.Array:
    return losses(label)[name](x, y, weight)


# Temporary memory in MiB of value and gradient of 4,096 clips of 512 dimensions, ours and that of the direct form, as
# measured: 57 and 192 (clip), 160 and 848 (supcon, whose 8,192 features have similarities of 256 MiB).
@BOTH
def test_memory_grows_with_the_batch_and_not_with_its_square(name):
    half, ours = (
        mean_compiled(functools.partial(blockwise, name=name), n).memory_analysis().temp_size_in_bytes
        for n in (2048, 4096)
    )
    theirs = mean_compiled(functools.partial(direct, name=name), 4096).memory_analysis().temp_size_in_bytes
    print(f"{name}: {ours / 2**20:.0f} MiB, of 2,048 clips {half / 2**20:.0f}; direct {theirs / 2**20:.0f}")
    matrix = 4 * (4096 * {"clip": 1, "supcon": 2}[name]) ** 2
    assert ours < min(matrix, theirs / 3)
    assert ours < 2.4 * half


@BOTH
@pytest.mark.parametrize("clips", [2048, *thorough(4096)])
def test_many_clips_cost_what_the_direct_form_says(name, clips):
    x, y = features(clips, 512)
    ours = mean_compiled(functools.partial(blockwise, name=name), clips)(x, y)
    theirs = mean_compiled(functools.partial(direct, name=name), clips)(x, y)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(b))))


# ---- Features of length 1 -----------------------------------------------------------------------------------------


def test_unit_is_of_length_1_or_zero():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [-1e-9, 0.0], [1e-20, 0.0], [6e8, -8e8]])
    np.testing.assert_allclose(contrastive.unit(x), [[0.6, 0.8], [0, 0], [-1, 0], [0, 0], [0.6, -0.8]], rtol=1e-6)
    assert contrastive.unit(jnp.ones((2, 3, 4), jnp.bfloat16)).dtype == jnp.float32


def test_unit_has_a_gradient_and_zeros_have_none():
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 3, 4)))
    check_grads(contrastive.unit, (x,), 1, atol=1e-2, rtol=1e-2)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(contrastive.unit(x))))(jnp.array([[0.0, 0.0], [3.0, 4.0], [1e-20, 0]]))
    # (1 − u Σu) / ‖x‖ with u = (0.6, 0.8).
    np.testing.assert_allclose(slope, [[0, 0], [(1 - 0.6 * 1.4) / 5, (1 - 0.8 * 1.4) / 5], [0, 0]], atol=1e-6)

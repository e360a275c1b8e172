"""Kinds of tasks: what is counted, on the device and on the host, and its scores against other implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from sklearn import metrics as sk

from avjax import tasks
from avjax.errors import AvjaxError
from avjax.models.fusions import base, m2fnet

CLASSES = 3
KINDS = tuple(tasks.SCORINGS)


def made(kind: str, clips: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits that agree somewhat."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(clips, CLASSES)).astype(np.float32)
    if kind == "single":
        label = rng.permutation(np.arange(clips) % CLASSES).astype(np.int32)
        return label, noise + np.eye(CLASSES, dtype=np.float32)[label]
    if kind == "soft":
        label = rng.dirichlet((1, 0.7, 0.4), clips)
        return tasks.encoded([tuple(row) for row in label], ("a", "b", "c"), kind), noise + label.astype(np.float32)
    if kind == "multilabel":
        label = rng.random((clips, CLASSES)) < (0.5, 0.2, 0.8)
        return label, noise + label
    label = rng.normal((0.2, 0.5, 0.8), 0.1, (clips, CLASSES)).astype(np.float32)
    return label, (label + 0.1 * noise + (0, 0.1, 0)).astype(np.float32)


def conversations(values: np.ndarray) -> np.ndarray:
    """60 clips as 5 conversations of 12 turns."""
    return values.reshape(5, 12, *values.shape[1:])


def agreement(label: np.ndarray, predicted: np.ndarray) -> float:
    """CCC of one value in float64, from its definition (Lin 1989)."""
    x, y = predicted.astype(np.float64), label.astype(np.float64)
    return 2 * np.mean((x - x.mean()) * (y - y.mean())) / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def expected(kind: str, label: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    if kind in tasks.ONE_CLASS:
        label, predicted = label if kind == "single" else label.argmax(-1), logits.argmax(-1)
        return {"war": sk.accuracy_score(label, predicted), "uar": sk.balanced_accuracy_score(label, predicted)}
    columns = list(zip(label.T, logits.T, strict=True))
    by_name = {
        "regression": {
            "ccc": agreement,
            "pearson": lambda y, x: stats.pearsonr(x, y).statistic,
            "rmse": sk.root_mean_squared_error,
        },
        "multilabel": {
            "wa": lambda y, x: sk.balanced_accuracy_score(y, x > 0),
            "f1": lambda y, x: sk.f1_score(y, x > 0, average="weighted"),
        },
    }
    return {name: np.mean([score(y, x) for y, x in columns]) for name, score in by_name[kind].items()}


def on_device(kind: str, label, logits, weight) -> jax.Array:
    return jax.jit(tasks.SCORINGS[kind].table)(jnp.asarray(label), jnp.asarray(logits), jnp.float32(weight))


# ---- Scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_scipy_and_scikit_learn(kind):
    scoring, (label, logits) = tasks.SCORINGS[kind], made(kind)
    table = scoring.count(label, logits)
    assert table.dtype == np.float64
    assert table.shape == scoring.shape(CLASSES)
    result, wanted = scoring.scores(table), expected(kind, label, logits)
    assert set(result) == set(scoring.names) == set(wanted)
    assert scoring.picks in scoring.names
    for name, score in wanted.items():
        assert result[name] == pytest.approx(score, rel=1e-5), name  # SciPy computes in the float32 it is given
    stacked = scoring.scores(np.stack([table, scoring.count(*made(kind, seed=1))]))
    assert {name: score[0] for name, score in stacked.items()} == pytest.approx(result)


@pytest.mark.parametrize("kind", KINDS)
def test_what_validation_picks_by_is_larger_for_better_answers(kind):
    scoring, (label, logits) = tasks.SCORINGS[kind], made(kind)
    right = {"single": np.eye(CLASSES)[label] if kind == "single" else 0, "multilabel": 2.0 * label - 1, "soft": label}
    best = scoring.scores(scoring.count(label, right.get(kind, label)))[scoring.picks]
    assert best == pytest.approx(1)
    assert best > scoring.scores(scoring.count(label, logits))[scoring.picks]


@pytest.mark.parametrize("kind", KINDS)
def test_the_devices_table_is_the_hosts(kind):
    label, logits = made(kind)
    host = tasks.SCORINGS[kind].count(label, logits)
    table = on_device(kind, label, logits, np.ones(60))
    assert table.dtype == jnp.float32
    np.testing.assert_allclose(table, host, rtol=1e-5)
    talks = on_device(kind, conversations(label), conversations(logits), np.ones((5, 12)))
    np.testing.assert_allclose(talks, host, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_merge_by_addition_and_rows_of_weight_0_are_not_read(kind):
    scoring, (label, logits) = tasks.SCORINGS[kind], made(kind)
    weight = np.arange(60) % 3 > 0
    broken = np.where(weight[:, None], logits, np.nan)
    some = on_device(kind, label, broken, weight)
    np.testing.assert_allclose(some, scoring.count(label[weight], logits[weight]), rtol=1e-5)
    rest = on_device(kind, label, logits, ~weight)
    np.testing.assert_allclose(some + rest, scoring.count(label, logits), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_table_scores_nothing(kind):
    scoring = tasks.SCORINGS[kind]
    assert set(scoring.scores(np.zeros(scoring.shape(CLASSES))).values()) == {0.0}


def test_the_loss_of_a_whole_set_is_that_of_its_table():
    assert tasks.SCORINGS["single"].set_loss is tasks.SCORINGS["multilabel"].set_loss is None
    label, logits = made("regression")
    tables = np.stack([tasks.SCORINGS["regression"].count(label, v) for v in (logits, label)])
    wanted = [1 - np.mean([agreement(y, x) for y, x in zip(label.T, logits.T, strict=True)]), 0]
    np.testing.assert_allclose(tasks.SCORINGS["regression"].set_loss(tables), wanted, atol=1e-6)


# ---- Labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "labels", "wanted", "prior"),
    [
        ("single", ["b", "a", "b", "b"], np.array([1, 0, 1, 1], np.int32), [0.25, 0.75, 0]),
        ("regression", [(0.5, 1, -1), (0, 1, 0)], np.array([[0.5, 1, -1], [0, 1, 0]], np.float32), [0.25, 1, -0.5]),
        (
            "soft",
            [(0.75, 0.25, 0), (0.25, 0.25, 0.5)],
            np.array([[0.75, 0.25, 0], [0.25, 0.25, 0.5]], np.float32),
            [0.5, 0.25, 0.25],
        ),
        ("multilabel", [(1.0, 0.0, 1.0), (0.0, 0.0, 1.0)], np.array([[1, 0, 1], [0, 0, 1]], bool), [0.5, 0, 1]),
    ],
)
def test_labels_of_clips_become_arrays_of_their_kind(task, labels, wanted, prior):
    result = tasks.encoded(labels, ("a", "b", "c"), task)
    assert result.dtype == wanted.dtype
    np.testing.assert_array_equal(result, wanted)
    np.testing.assert_allclose(tasks.prior(result, 3), prior)


# ---- Losses -------------------------------------------------------------------------------------------------------


def by_hand(kind: str, label: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The loss of each of (n, c), in float64."""
    logits = logits.astype(np.float64)
    if kind == "single":
        return -np.take_along_axis(special.log_softmax(logits, -1), label[:, None], 1)[:, 0]
    if kind == "soft":
        return -(label / label.sum(-1, keepdims=True) * special.log_softmax(logits, -1)).sum(-1)
    if kind == "multilabel":
        return -np.where(label, special.log_expit(logits), special.log_expit(-logits)).mean(-1)
    return np.full(len(label), 1 - np.mean([agreement(y, x) for y, x in zip(label.T, logits.T, strict=True)]))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_loss(kind):
    label, logits = made(kind)
    wanted = by_hand(kind, label, logits)
    loss = jax.jit(tasks.SCORINGS[kind].loss)
    result = loss(jnp.asarray(logits), jnp.asarray(label), jnp.ones(60))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-5)
    talks = loss(conversations(logits), conversations(label), jnp.ones((5, 12)))
    assert talks.shape == (5, 12)
    np.testing.assert_allclose(talks.reshape(-1), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_weight_0_does_not_change_the_loss_of_the_others_nor_their_gradient(kind):
    label, logits = made(kind)
    real = np.arange(60) % 3 > 0
    broken, weight = jnp.asarray(np.where(real[:, None], logits, np.nan)), jnp.float32(real)
    result, pull = jax.vjp(lambda x: tasks.SCORINGS[kind].loss(x, jnp.asarray(label), weight)[real], broken)
    np.testing.assert_allclose(result, by_hand(kind, label[real], logits[real]), rtol=1e-4, atol=1e-5)
    assert np.isfinite(pull(jnp.ones(real.sum()))[0][real]).all()


def test_shares_of_one_class_cost_to_the_bit_what_the_class_costs():
    label, logits = made("single")
    soft_labels = tasks.encoded([tuple(row) for row in np.eye(CLASSES)[label]], ("a", "b", "c"), "soft")
    soft = tasks.SCORINGS["soft"].loss(jnp.asarray(logits), jnp.asarray(soft_labels), jnp.ones(60))
    hard = tasks.SCORINGS["single"].loss(jnp.asarray(logits), jnp.asarray(label), jnp.ones(60))
    np.testing.assert_array_equal(soft, hard)
    for count in ("count", "table"):
        more = () if count == "count" else (jnp.ones(60),)
        tables = (
            getattr(tasks.SCORINGS[k], count)(y, logits, *more) for k, y in (("soft", soft_labels), ("single", label))
        )
        np.testing.assert_array_equal(*tables)


def test_thirds_add_up_to_one():
    label = tasks.encoded([(1 / 3,) * 3], ("a", "b", "c"), "soft")
    np.testing.assert_allclose(label.sum(-1), 1, rtol=1e-6)
    loss = tasks.SCORINGS["soft"].loss(jnp.zeros((1, 3)), jnp.asarray(label), jnp.ones(1))
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)


def test_concordance_is_the_whole_batchs_and_the_same_for_every_clip():
    label, logits = made("regression")
    loss = tasks.SCORINGS["regression"].loss
    result = loss(jnp.asarray(logits), jnp.asarray(label), jnp.float32(np.arange(60) % 2))
    assert len(set(result.tolist())) == 1  # those that do not count have it too
    halves = [loss(jnp.asarray(logits[h]), jnp.asarray(label[h]), jnp.ones(30)) for h in np.split(np.arange(60), 2)]
    assert abs(np.mean(halves) - by_hand("regression", label, logits)[0]) > 1e-4, "no mean over parts"


def test_losses_beside_the_heads_know_of_other_tasks():
    weight = jnp.ones(2)
    value = base.for_clips({"label": jnp.zeros((2, 3)), "weight": weight}, jnp.float32(4))
    np.testing.assert_array_equal(value, [4, 4])
    with pytest.raises(AvjaxError, match="m2fnet's triplets compare classes; the task is 'regression'"):
        m2fnet.m2fnet_loss(None, {"label": jnp.zeros((2, 3)), "weight": weight}, "regression")

"""Metrics against scikit-learn, as mergeable sums, inside jit and in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from avjax import metrics

# No clip of class 3, none answered 2, and class 4 neither occurs nor is answered.
LABEL = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 0, 1])
ANSWER = np.array([0, 0, 1, 3, 1, 0, 0, 1, 1, 0, 1])
CLASSES = 5


def counts(label, answer, weight=None) -> jax.Array:
    weight = np.ones(len(label), np.float32) if weight is None else weight
    return metrics.confusion(jnp.asarray(label), jnp.asarray(answer), jnp.asarray(weight), CLASSES)


def test_confusion_is_scikit_learns_with_rows_of_true_classes():
    np.testing.assert_array_equal(counts(LABEL, ANSWER), sk.confusion_matrix(LABEL, ANSWER, labels=range(CLASSES)))


def test_the_host_counts_the_same_in_float64():
    host = metrics.count(LABEL, ANSWER, CLASSES)
    assert host.dtype == np.float64
    np.testing.assert_array_equal(host, counts(LABEL, ANSWER))


def test_scores_are_scikit_learns_with_absent_classes():
    matrix = np.asarray(counts(LABEL, ANSWER), np.float64)
    assert metrics.war(matrix) == pytest.approx(sk.accuracy_score(LABEL, ANSWER), abs=1e-12)
    present = np.unique(LABEL)
    expected = sk.recall_score(LABEL, ANSWER, labels=present, average="macro")
    assert metrics.uar(matrix) == pytest.approx(expected, abs=1e-12)
    for average, ours in metrics.f1(matrix).items():
        expected = sk.f1_score(LABEL, ANSWER, average=average, zero_division=0)
        assert ours == pytest.approx(expected, abs=1e-12), average


def test_matrices_merge_by_addition_and_padding_counts_nothing():
    weight = np.ones(len(LABEL), np.float32)
    weight[4:] = 0
    first, rest = counts(LABEL, ANSWER, weight), counts(LABEL, ANSWER, 1 - weight)
    np.testing.assert_array_equal(first, counts(LABEL[:4], ANSWER[:4]))
    np.testing.assert_array_equal(first + rest, counts(LABEL, ANSWER))


def test_scores_of_a_stack_are_those_of_each_matrix_also_inside_jit():
    stack = np.stack([np.asarray(counts(LABEL, a), np.float64) for a in (ANSWER, LABEL, ANSWER[::-1])])
    for score in (metrics.war, metrics.uar, lambda m: metrics.f1(m)["macro"], lambda m: metrics.f1(m)["weighted"]):
        alone = [score(m) for m in stack]
        np.testing.assert_allclose(score(stack), alone, rtol=1e-12)
        np.testing.assert_allclose(jax.jit(score)(jnp.float32(stack)), alone, rtol=1e-6)
    assert metrics.uar(stack).dtype == np.float64


def test_an_empty_matrix_scores_nothing():
    empty = np.zeros((CLASSES, CLASSES))
    assert metrics.war(empty) == metrics.uar(empty) == 0
    assert set(metrics.f1(empty).values()) == {0.0}

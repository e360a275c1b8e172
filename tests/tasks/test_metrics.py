"""Metrics against scikit-learn, as mergeable sums, inside jit and in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from avjax.tasks import metrics

# No clip of class 3, none predicted 2, and class 4 neither occurs nor is predicted.
LABEL = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 0, 1])
PREDICTED = np.array([0, 0, 1, 3, 1, 0, 0, 1, 1, 0, 1])
CLASSES = 5


def counts(label, guessed, weight=None) -> jax.Array:
    weight = np.ones(len(label), np.float32) if weight is None else weight
    return metrics.confusion(jnp.asarray(label), jnp.asarray(guessed), jnp.asarray(weight), CLASSES)


def test_confusion_is_scikit_learns_with_rows_of_true_classes():
    np.testing.assert_array_equal(
        counts(LABEL, PREDICTED), sk.confusion_matrix(LABEL, PREDICTED, labels=range(CLASSES))
    )


def test_the_host_counts_the_same_in_float64():
    host = metrics.count(LABEL, PREDICTED, CLASSES)
    assert host.dtype == np.float64
    np.testing.assert_array_equal(host, counts(LABEL, PREDICTED))


def test_scores_are_scikit_learns_with_absent_classes():
    matrix = np.asarray(counts(LABEL, PREDICTED), np.float64)
    assert metrics.war(matrix) == pytest.approx(sk.accuracy_score(LABEL, PREDICTED), abs=1e-12)
    present = np.unique(LABEL)
    expected = sk.recall_score(LABEL, PREDICTED, labels=present, average="macro")
    assert metrics.uar(matrix) == pytest.approx(expected, abs=1e-12)
    for average, ours in metrics.f1(matrix).items():
        expected = sk.f1_score(LABEL, PREDICTED, average=average, zero_division=0)
        assert ours == pytest.approx(expected, abs=1e-12), average


def test_matrices_merge_by_addition_and_padding_counts_nothing():
    weight = np.ones(len(LABEL), np.float32)
    weight[4:] = 0
    first, rest = counts(LABEL, PREDICTED, weight), counts(LABEL, PREDICTED, 1 - weight)
    np.testing.assert_array_equal(first, counts(LABEL[:4], PREDICTED[:4]))
    np.testing.assert_array_equal(first + rest, counts(LABEL, PREDICTED))


def test_scores_of_a_stack_are_those_of_each_matrix_also_inside_jit():
    stack = np.stack([np.asarray(counts(LABEL, a), np.float64) for a in (PREDICTED, LABEL, PREDICTED[::-1])])
    for score in (metrics.war, metrics.uar, lambda m: metrics.f1(m)["macro"], lambda m: metrics.f1(m)["weighted"]):
        alone = [score(m) for m in stack]
        np.testing.assert_allclose(score(stack), alone, rtol=1e-12)
        np.testing.assert_allclose(jax.jit(score)(jnp.float32(stack)), alone, rtol=1e-6)
    assert metrics.uar(stack).dtype == np.float64


def test_an_empty_matrix_scores_nothing():
    empty = np.zeros((CLASSES, CLASSES))
    assert metrics.war(empty) == metrics.uar(empty) == 0
    assert set(metrics.f1(empty).values()) == {0.0}


# ---- Questions of yes and no --------------------------------------------------------------------------------------


def questions(clips: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    label = rng.random((clips, 4)) < (0.5, 0.2, 0.8, 0.4)
    return label, label ^ (rng.random(label.shape) < 0.3)


def test_binary_confusion_is_scikit_learns():
    label, guessed = questions()
    expected = sk.multilabel_confusion_matrix(label, guessed)
    host = metrics.binary_confusion(label, guessed, np.ones(40))
    assert host.dtype == np.float64
    np.testing.assert_array_equal(host, expected)
    numbers = metrics.binary_confusion(np.int32(label), np.float32(guessed), np.ones(40, bool))
    np.testing.assert_array_equal(numbers, expected)
    traced = jax.jit(metrics.binary_confusion)(jnp.asarray(label), jnp.asarray(guessed), jnp.ones(40))
    assert traced.dtype == jnp.float32
    np.testing.assert_array_equal(traced, expected)
    folded = metrics.binary_confusion(label.reshape(5, 8, 4), guessed.reshape(5, 8, 4), np.ones((5, 8)))
    np.testing.assert_array_equal(folded, expected)


def test_binary_confusions_merge_by_addition_and_padding_counts_nothing():
    label, guessed = questions()
    weight = np.arange(40) % 3 > 0
    some, others = (metrics.binary_confusion(label, guessed, w) for w in (weight, ~weight))
    np.testing.assert_array_equal(some, sk.multilabel_confusion_matrix(label[weight], guessed[weight]))
    np.testing.assert_array_equal(some + others, sk.multilabel_confusion_matrix(label, guessed))


def test_weighted_accuracy_by_hand():
    # Three of four yes are found, and four of six no: (TP · N/P + TN) / 2N of CMU-MOSEI.
    matrix = np.array([[4.0, 2.0], [1.0, 3.0]])
    assert metrics.weighted_accuracy(matrix) == pytest.approx((3 * 6 / 4 + 4) / (2 * 6), abs=1e-12)
    all_no = np.array([[4.0, 2.0], [0.0, 0.0]])
    assert metrics.weighted_accuracy(all_no) == pytest.approx(4 / 6, abs=1e-12)
    assert metrics.weighted_accuracy(np.zeros((2, 2))) == 0


def test_scores_of_questions_are_scikit_learns():
    label, guessed = questions()
    matrices = metrics.binary_confusion(label, guessed, np.ones(40))
    by_question = list(zip(label.T, guessed.T, strict=True))
    expected = {
        metrics.weighted_accuracy: [sk.balanced_accuracy_score(y, a) for y, a in by_question],
        metrics.war: [sk.accuracy_score(y, a) for y, a in by_question],
        lambda m: metrics.f1(m)["weighted"]: [sk.f1_score(y, a, average="weighted") for y, a in by_question],
        lambda m: metrics.f1(m)["macro"]: [sk.f1_score(y, a, average="macro") for y, a in by_question],
    }
    for score, of_each in expected.items():
        np.testing.assert_allclose(score(matrices), of_each, rtol=1e-12)
        np.testing.assert_allclose(jax.jit(score)(jnp.float32(matrices)), of_each, rtol=1e-6)


# ---- Values -------------------------------------------------------------------------------------------------------


def values(clips: int = 50, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions of three values: apart in the mean, in the spread, and against each other."""
    rng = np.random.default_rng(seed)
    y = rng.normal((3, 0, -1), size=(clips, 3))
    return y, rng.normal(y * (0.5, 1, -1), 0.4)


def equation_7(y: np.ndarray, x: np.ndarray) -> list[float]:
    """DE-III, Eq. 7, by column, with SciPy's correlation and NumPy's means and deviations."""
    out = []
    for a, b in zip(x.T, y.T, strict=True):
        product = 2 * stats.pearsonr(a, b).statistic * np.std(a) * np.std(b)
        out.append(product / (np.var(a) + np.var(b) + (np.mean(a) - np.mean(b)) ** 2))
    return out


SCORES = {
    metrics.ccc: equation_7,
    metrics.pearson: lambda y, x: [stats.pearsonr(a, b).statistic for a, b in zip(x.T, y.T, strict=True)],
    metrics.rmse: lambda y, x: [sk.root_mean_squared_error(a, b) for a, b in zip(y.T, x.T, strict=True)],
}


def on_device(label, predicted, weight) -> jax.Array:
    return jax.jit(metrics.scoring_sums)(jnp.float32(label), jnp.float32(predicted), jnp.asarray(weight, jnp.float32))


def test_scoring_sums_by_hand():
    label, predicted = np.array([[1.0], [2.0], [5.0]]), np.array([[3.0], [4.0], [7.0]])
    expected = [[4, 3 + 4 + 14, 1 + 2 + 10, 9 + 16 + 98, 1 + 4 + 50, 3 + 8 + 70]]
    np.testing.assert_array_equal(metrics.scoring_sums(label, predicted, np.array([1, 1, 2])), expected)
    np.testing.assert_array_equal(on_device(label, predicted, [1, 1, 2]), expected)


@pytest.mark.parametrize("score", SCORES, ids=lambda s: s.__name__)
def test_scores_of_values_are_those_of_scipy_and_scikit_learn(score):
    label, predicted = values()
    host = score(metrics.scoring_sums(label, predicted, np.ones(50)))
    assert host.dtype == np.float64
    np.testing.assert_allclose(host, SCORES[score](label, predicted), rtol=1e-12)
    traced = jax.jit(score)(on_device(label, predicted, np.ones(50)))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, host, rtol=1e-4)
    stack = np.stack([metrics.scoring_sums(*values(seed=i), np.ones(50)) for i in range(2)])
    np.testing.assert_array_equal(score(stack)[0], host)


def test_scoring_sums_merge_by_addition_and_rows_of_weight_0_are_not_read():
    label, predicted = values()
    weight = np.arange(50) % 3 > 0
    broken = [np.where(weight[:, None], v, bad) for v, bad in ((label, np.nan), (predicted, np.inf))]
    some = metrics.scoring_sums(*broken, weight)
    np.testing.assert_allclose(some, metrics.scoring_sums(label[weight], predicted[weight], np.ones(weight.sum())))
    np.testing.assert_allclose(on_device(*broken, weight), some, rtol=1e-5)
    full = metrics.scoring_sums(label, predicted, np.ones(50))
    np.testing.assert_allclose(some + metrics.scoring_sums(label, predicted, ~weight), full)
    folded = metrics.scoring_sums(label.reshape(5, 10, 3), predicted.reshape(5, 10, 3), np.ones((5, 10)))
    np.testing.assert_allclose(folded, full)
    for score, expected in SCORES.items():
        np.testing.assert_allclose(score(some), expected(label[weight], predicted[weight]), rtol=1e-12)


def in_batches(label, predicted, weight) -> jax.Array:
    """As the trainer does: merged from the device's sums of 64 clips each."""
    parts = [slice(i, i + 64) for i in range(0, len(weight), 64)]
    return sum((on_device(label[p], predicted[p], weight[p]) for p in parts), jnp.zeros((label.shape[-1], 6)))


@pytest.mark.parametrize("clips", [0, 1, 7, 10_000])
@pytest.mark.parametrize("make", [metrics.scoring_sums, in_batches], ids=["host", "device"])
def test_values_without_spread_agree_with_nothing(make, clips):
    levels = np.array([0.0, 0.1, 1 / 3, -5.123])
    constant, one = np.tile(levels, (clips, 1)), np.ones(clips)
    varied = constant + np.random.default_rng(0).normal(size=(clips, 4))
    pairs = [(constant, constant), (constant, 2 * constant)]
    if clips > 1:
        pairs += [(constant, varied), (varied, constant)]
    for label, predicted in pairs:
        sums = make(label, predicted, one)
        np.testing.assert_array_equal(metrics.ccc(sums), 0)
        np.testing.assert_array_equal(metrics.pearson(sums), 0)
    expected = np.zeros(4) if not clips else np.abs(levels)
    np.testing.assert_allclose(metrics.rmse(make(constant, 2 * constant, one)), expected, rtol=1e-4)


def test_perfect_answers_score_one_and_opposite_ones_minus_one():
    label, _ = values()
    same, opposite = (metrics.scoring_sums(label, v, np.ones(50)) for v in (label, 2 * label.mean(0) - label))
    for score in (metrics.ccc, metrics.pearson):
        np.testing.assert_allclose(score(same), 1, rtol=1e-12)
        np.testing.assert_allclose(score(opposite), -1, rtol=1e-12)
    np.testing.assert_array_equal(metrics.rmse(same), 0)


# ---- Sentiment ----------------------------------------------------------------------------------------------------

# By hand: 8 clips, two of them at 0.
FEELING = np.array([-3.0, -1.2, -0.4, 0.0, 0.0, 0.6, 1.6, 3.0])
GUESSED = np.array([-2.2, 0.4, -0.1, -0.3, 0.2, 0.7, 2.4, 3.9])


def test_sentiment_by_hand():
    scores = metrics.sentiment(metrics.sentiment_sums(FEELING, GUESSED))
    # 0 counts as positive: the predictions for -1.2 and for the first 0 are wrong.
    assert scores["acc2_has0"] == pytest.approx(6 / 8)
    assert scores["acc2_non0"] == pytest.approx(5 / 6)
    # Of has0: negative 2 of 3 found, 3 said; the rest 4 of 5 found, 5 said.
    assert scores["f1_has0"] == pytest.approx((3 * 2 / 3 + 5 * 4 / 5) / 8)
    # Of non0: negative 2 of 3 found, 2 said; positive 3 of 3 found, 4 said.
    assert scores["f1_non0"] == pytest.approx((3 * 4 / 5 + 3 * 6 / 7) / 6)
    # Rounded within 2: -2 -1 0 0 0 1 2 2 against -2 0 0 0 0 1 2 2; within 3: -3 ... 2 3 against -2 ... 2 3.
    assert scores["acc5"] == pytest.approx(7 / 8)
    assert scores["acc7"] == pytest.approx(6 / 8)
    assert scores["mae"] == pytest.approx((0.8 + 1.6 + 0.3 + 0.3 + 0.2 + 0.1 + 0.8 + 0.9) / 8)
    assert scores["corr"] == pytest.approx(stats.pearsonr(FEELING, GUESSED).statistic)


def test_sums_of_sentiment_merge_by_addition():
    rng = np.random.default_rng(0)
    label, guessed = rng.integers(-9, 10, 500) / 3, rng.normal(0, 2, 500)
    parts = [metrics.sentiment_sums(label[part], guessed[part]) for part in (slice(0, 100), slice(100, 500))]
    np.testing.assert_allclose(sum(parts), metrics.sentiment_sums(label, guessed), rtol=1e-12)
    scores, polar = metrics.sentiment(sum(parts)), label != 0
    assert scores["f1_has0"] == pytest.approx(sk.f1_score(label >= 0, guessed >= 0, average="weighted"))
    assert scores["f1_non0"] == pytest.approx(sk.f1_score(label[polar] > 0, guessed[polar] > 0, average="weighted"))
    assert scores["acc2_non0"] == pytest.approx(sk.accuracy_score(label[polar] > 0, guessed[polar] > 0))


def test_sentiment_of_nothing_is_zero():
    assert set(metrics.sentiment(metrics.sentiment_sums(np.zeros(0), np.zeros(0))).values()) == {0.0}

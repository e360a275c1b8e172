"""Losses: values worked by hand, gradients, masks, and what the options against imbalance do."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import stats

from avjax.errors import AvjaxError
from avjax.tasks import losses

gradients_hold = functools.partial(check_grads, order=1, atol=1e-2, rtol=1e-2)
LOGITS = np.array([[0.0, 0.0], [math.log(3), 0.0], [1.0, 3.0]])
LABEL = np.array([0, 1, 1])


def entropy(**options) -> np.ndarray:
    return np.asarray(losses.cross_entropy(jnp.float32(LOGITS), jnp.asarray(LABEL), **options))


def test_cross_entropy_by_hand():
    # −log softmax: even odds; odds 3 : 1 against; e³ / (e + e³).
    expected = [math.log(2), math.log(4), math.log(1 + math.exp(-2))]
    np.testing.assert_allclose(entropy(), expected, rtol=1e-6)


def test_smoothing_spreads_its_share_over_all_classes():
    # Odds 3 : 1 against, target (0.1, 0.9): 0.1 · log(4/3) + 0.9 · log 4.
    assert entropy(smoothing=0.2)[1] == pytest.approx(0.1 * math.log(4 / 3) + 0.9 * math.log(4), rel=1e-6)


def test_class_weights_multiply_by_the_true_class():
    np.testing.assert_allclose(entropy(class_weight=jnp.array([2.0, 0.5])), entropy() * [2, 0.5, 0.5], rtol=1e-6)


def test_gradient_and_far_logits():
    rng = np.random.default_rng(0)
    logits, label = jnp.float32(rng.normal(size=(4, 3))), jnp.array([0, 1, 2, 1])
    weight = jnp.array([1.0, 2.0, 0.5])
    check_grads(
        lambda z: losses.cross_entropy(z, label, smoothing=0.1, class_weight=weight), (logits,), 2, atol=1e-2, rtol=1e-2
    )
    far = losses.cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))
    assert float(far[0]) == pytest.approx(2e4)


def test_each_clip_is_for_itself_and_half_precision_is_widened():
    for i in range(3):
        alone = losses.cross_entropy(jnp.float32(LOGITS[i : i + 1]), jnp.asarray(LABEL[i : i + 1]))
        np.testing.assert_array_equal(alone, entropy()[i : i + 1])
    assert losses.cross_entropy(jnp.bfloat16(LOGITS), jnp.asarray(LABEL)).dtype == jnp.float32


# ---- Labels that share clips out ----------------------------------------------------------------------------------


def test_shares_by_hand():
    # Odds 3 : 1, soft labels 1 : 1, and half of them smoothed over evenly, which changes nothing.
    expected = 0.5 * math.log(4 / 3) + 0.5 * math.log(4)
    for smoothing in (0.0, 0.5):
        loss = losses.cross_entropy(jnp.float32(LOGITS[1:2]), jnp.array([[0.5, 0.5]]), smoothing=smoothing)
        assert float(loss[0]) == pytest.approx(expected, rel=1e-6)
    weighted = losses.cross_entropy(
        jnp.float32(LOGITS[1:2]), jnp.array([[0.5, 0.5]]), class_weight=jnp.array([3.0, 1.0])
    )
    assert float(weighted[0]) == pytest.approx(2 * expected, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.2}, {"smoothing": 0.2, "class_weight": np.float32([2, 0.5])}])
def test_shares_of_one_class_are_that_class(options):
    one_hot = jnp.float32(np.eye(2)[LABEL])
    np.testing.assert_array_equal(losses.cross_entropy(jnp.float32(LOGITS), one_hot, **options), entropy(**options))
    counts = jnp.asarray(one_hot, jnp.int32)
    np.testing.assert_array_equal(losses.cross_entropy(jnp.float32(LOGITS), counts, **options), entropy(**options))


def soft_reference(logits, soft_labels, smoothing, weight) -> list[float]:
    out = []
    for z, share in zip(logits, soft_labels, strict=True):
        log_sum = math.log(sum(math.exp(v) for v in z))
        target = [s * (1 - smoothing) + smoothing / len(z) for s in share]
        factor = sum(s * w for s, w in zip(share, weight, strict=True))
        out.append(factor * sum(t * (log_sum - v) for t, v in zip(target, z, strict=True)))
    return out


def test_shares_against_plain_loops():
    rng = np.random.default_rng(1)
    logits, soft_labels, weight = rng.normal(size=(5, 4)), rng.dirichlet(np.ones(4), 5), rng.uniform(0.5, 2, 4)
    one = jax.jit(functools.partial(losses.cross_entropy, smoothing=0.1, class_weight=jnp.float32(weight)))
    ours = one(jnp.float32(logits), jnp.float32(soft_labels))
    np.testing.assert_allclose(ours, soft_reference(logits, soft_labels, 0.1, weight), rtol=1e-5)
    gradients_hold(lambda z: one(z, jnp.float32(soft_labels)), (jnp.float32(logits),))
    far = losses.cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([[0.25, 0.75]]))
    assert float(far[0]) == pytest.approx(1.5e4)


# ---- Questions of yes and no --------------------------------------------------------------------------------------


def test_binary_cross_entropy_by_hand():
    # Odds 3 : 1 for presence, twice, with labels 1 and 0; even odds.
    logits, label = jnp.log(jnp.array([[3.0, 3.0], [1.0, 1.0]])), jnp.array([[True, False], [True, True]])
    expected = [(math.log(4 / 3) + math.log(4)) / 2, math.log(2)]
    np.testing.assert_allclose(losses.binary_cross_entropy(logits, label), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.binary_cross_entropy(logits, jnp.float32(label)), expected, rtol=1e-6)


def test_binary_cross_entropy_against_plain_loops_and_its_gradient():
    rng = np.random.default_rng(2)
    logits, label = rng.normal(size=(6, 3)) * 4, rng.random((6, 3)) < 0.4
    logits[0, 0] = 0
    expected = [
        np.mean([-math.log(1 / (1 + math.exp(-z if y else z))) for z, y in zip(*row, strict=True)])
        for row in zip(logits, label, strict=True)
    ]
    one = jax.jit(losses.binary_cross_entropy)
    np.testing.assert_allclose(one(jnp.float32(logits), jnp.asarray(label)), expected, rtol=1e-5)
    gradients_hold(lambda z: one(z, jnp.asarray(label)), (jnp.float32(logits),))
    slope = jax.grad(lambda z: one(z, jnp.asarray(label)).sum())(jnp.float32(logits))
    np.testing.assert_allclose(slope, (1 / (1 + np.exp(-logits)) - label) / 3, atol=1e-6)


def test_binary_cross_entropy_of_far_logits():
    logits, label = jnp.array([[1e4, -1e4], [1e4, -1e4], [20.0, -20.0]]), jnp.array([[1, 0], [0, 1], [1, 0]])
    loss, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda z, y: losses.binary_cross_entropy(z[None], y[None])[0])))(
        logits, label
    )
    np.testing.assert_allclose(loss, [0, 1e4, math.log1p(math.exp(-20))], rtol=1e-5)
    np.testing.assert_allclose(slope, [[0, 0], [0.5, -0.5], [0, 0]], atol=1e-8)


# ---- Focal loss ---------------------------------------------------------------------------------------------------


def focal(**options) -> np.ndarray:
    return np.asarray(losses.focal(jnp.float32(LOGITS), jnp.asarray(LABEL), **options))


def test_focal_by_hand():
    # Eq. 4 at p = 1/2 and at p = 1/4; Eq. 5 with α = 3 for the second class.
    np.testing.assert_allclose(focal()[:2], [0.25 * math.log(2), 0.5625 * math.log(4)], rtol=1e-6)
    np.testing.assert_allclose(focal(gamma=1.0)[:2], [0.5 * math.log(2), 0.75 * math.log(4)], rtol=1e-6)
    np.testing.assert_allclose(focal(class_weight=jnp.array([1.0, 3.0])), focal() * [1, 3, 3], rtol=1e-6)


def test_focal_without_focus_is_cross_entropy():
    np.testing.assert_array_equal(focal(gamma=0.0), entropy())
    weight = jnp.array([2.0, 0.5])
    np.testing.assert_array_equal(focal(gamma=0.0, class_weight=weight), entropy(class_weight=weight))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_against_plain_loops_and_its_gradient(gamma):
    rng = np.random.default_rng(3)
    logits, label, weight = rng.normal(size=(5, 4)), rng.integers(0, 4, 5), rng.uniform(0.5, 2, 4)
    expected = []
    for z, y in zip(logits, label, strict=True):
        p = math.exp(z[y]) / sum(math.exp(v) for v in z)
        expected.append(-weight[y] * (1 - p) ** gamma * math.log(p))
    one = jax.jit(functools.partial(losses.focal, gamma=gamma, class_weight=jnp.float32(weight)))
    np.testing.assert_allclose(one(jnp.float32(logits), jnp.asarray(label)), expected, rtol=1e-5)
    gradients_hold(lambda z: one(z, jnp.asarray(label)), (jnp.float32(logits),))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("far", [40.0, 1e4])
def test_focal_is_finite_where_a_clip_is_sure(gamma, far):
    """At p → 1 both are nothing, also for γ < 1, whose power has no slope there; at p → 0 they are cross entropy's."""
    logits = jnp.array([[far, 0.0, 0.0]])
    one = lambda z, y: losses.focal(z, jnp.array([y]), gamma=gamma)[0]  # noqa: E731
    for label, value, slope in ((0, 0.0, [0, 0, 0]), (1, far, [1, -1, 0])):
        loss, gradient = jax.jit(jax.value_and_grad(one))(logits, label)
        np.testing.assert_allclose(loss, value, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(gradient[0], slope, atol=1e-6)


def test_focal_needs_a_true_class():
    with pytest.raises(AvjaxError, match=r"focal loss got soft labels \(3, 2\); give it a true class, \(3,\)"):
        losses.focal(jnp.float32(LOGITS), jnp.ones((3, 2)) / 2)


# ---- What holds for every loss by clip ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "label"),
    [
        (losses.cross_entropy, LABEL),
        (losses.cross_entropy, np.float32([[0.5, 0.5], [0.2, 0.8], [1, 0]])),
        (losses.binary_cross_entropy, np.array([[True, False], [False, False], [True, True]])),
        (losses.focal, LABEL),
    ],
    ids=["integers", "soft", "multilabel", "focal"],
)
def test_a_broken_neighbour_changes_neither_value_nor_gradient(loss, label):
    label, broken = jnp.asarray(label), jnp.float32(LOGITS).at[1].set(jnp.nan)
    kept = np.array([0, 2])
    both = jax.jit(lambda z, y: (loss(z, y), jax.grad(lambda z: loss(z, y)[kept].sum())(z)))
    alone = both(jnp.float32(LOGITS), label)
    together = both(broken, label)
    for a, b in zip(alone, together, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a[kept], b[kept])
    np.testing.assert_allclose(loss(jnp.float32(LOGITS)[kept], label[kept]), alone[0][kept], rtol=1e-6)
    assert loss(jnp.bfloat16(LOGITS), label).dtype == jnp.float32


# ---- Concordance --------------------------------------------------------------------------------------------------


def equation_7(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """DE-III, Eq. 7, by column, with SciPy's correlation and NumPy's means and deviations."""
    out = []
    for a, b in zip(x.T, y.T, strict=True):
        rho, spread = stats.pearsonr(a, b).statistic, np.std(a) * np.std(b)
        out.append(1 - 2 * rho * spread / (np.std(a) ** 2 + np.std(b) ** 2 + (np.mean(a) - np.mean(b)) ** 2))
    return np.array(out)


def values(clips: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.normal((3, 0, -1), size=(clips, 3))
    return rng.normal(y * (0.5, 1, -1), 0.4), y


concordance = jax.jit(losses.concordance)


def test_concordance_by_hand():
    # Deviations −1, 0, 1 and −2, 0, 2: covariance 4/3, variances 2/3 and 8/3, means 1 apart.
    x, y = jnp.array([[0.0], [1], [2]]), jnp.array([[0.0], [2], [4]])
    loss = losses.concordance(x, y, jnp.ones(3))
    np.testing.assert_allclose(loss, [1 - (8 / 3) / (2 / 3 + 8 / 3 + 1)], rtol=1e-6)
    np.testing.assert_allclose(losses.concordance(y, y, jnp.ones(3)), [0], atol=1e-6)
    np.testing.assert_allclose(losses.concordance(-y + 4, y, jnp.ones(3)), [2], atol=1e-6)


def test_concordance_is_equation_7_over_all_leading_axes():
    x, y = values(12)
    one = jnp.ones(12)
    np.testing.assert_allclose(concordance(jnp.float32(x), jnp.float32(y), one), equation_7(x, y), atol=1e-6)
    folded = concordance(*(jnp.float32(v).reshape(3, 4, 3) for v in (x, y)), one.reshape(3, 4))
    np.testing.assert_allclose(folded, equation_7(x, y), atol=1e-6)
    assert concordance(jnp.bfloat16(x), jnp.bfloat16(y), one).dtype == jnp.float32


def test_concordance_centres_before_it_squares():
    x, y = values(200)
    far = [jnp.float32(v + 1000) for v in (x, y)]
    expected = equation_7(*(np.float64(v) for v in far))
    np.testing.assert_allclose(concordance(*far, jnp.ones(200)), expected, atol=1e-5)


def test_rows_of_weight_0_are_not_read_and_weights_count():
    x, y = values(9)
    weight = np.float32([1, 0, 1, 1, 0, 1, 1, 0, 1])
    broken_x, broken_y = np.where(weight[:, None] > 0, x, np.nan), np.where(weight[:, None] > 0, y, np.inf)
    broken_x[1] = -np.inf
    real = weight > 0
    total = jax.jit(jax.value_and_grad(lambda x, y, w: losses.concordance(x, y, w).sum()))
    loss, slope = total(jnp.float32(broken_x), jnp.float32(broken_y), jnp.asarray(weight))
    assert float(loss) == pytest.approx(equation_7(x[real], y[real]).sum(), abs=1e-5)
    alone = jax.grad(lambda x: losses.concordance(x, jnp.float32(y[real]), jnp.ones(6)).sum())(jnp.float32(x[real]))
    np.testing.assert_allclose(slope[real], alone, atol=1e-6)
    np.testing.assert_array_equal(slope[~real], 0)
    twice = np.repeat(np.arange(9), 1 + (np.arange(9) % 2))
    doubled = concordance(jnp.float32(x), jnp.float32(y), jnp.float32(1 + np.arange(9) % 2))
    np.testing.assert_allclose(doubled, equation_7(x[twice], y[twice]), atol=1e-6)


def test_concordance_gradient():
    x, y = (jnp.float32(v) for v in values(6))
    gradients_hold(lambda x: concordance(x, y, jnp.ones(6)), (x,))


@pytest.mark.parametrize("level", [0.0, 0.1, 3.3, -7.7])
def test_concordance_without_spread_is_one_and_pulls_nowhere(level):
    varied, constant = jnp.float32(values(7)[1]), jnp.full((7, 3), level)
    total = jax.jit(jax.value_and_grad(lambda x, y, w: losses.concordance(x, y, w).sum()))
    one, none = jnp.ones(7), jnp.zeros(7)
    alone = one * (jnp.arange(7) == 2)
    for x, y, w in ((constant, varied, one), (varied, constant, one), (constant, constant, one)):
        loss, slope = total(x, y, w)
        assert float(loss) == pytest.approx(3, abs=1e-3)
        assert bool(jnp.isfinite(slope).all())
    for w in (alone, none):
        loss, slope = total(varied, 2 * varied, w)
        assert float(loss) == 3
        np.testing.assert_array_equal(slope, 0)


# ---- Against imbalance --------------------------------------------------------------------------------------------


def test_balanced_weights_give_each_present_class_the_same_total():
    prior = jnp.array([0.5, 0.125, 0.375, 0.0])
    weights = np.asarray(losses.balanced_weights(prior))
    np.testing.assert_allclose(weights, [1 / 2, 2, 2 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose((weights * prior)[:3], 0.25, rtol=1e-6)


def test_logit_adjustment_cancels_the_prior():
    """With logits equal in the training odds, the adjusted loss is that of the prior: −log π (Menon et al., Eq. 10)."""
    prior = jnp.array([0.7, 0.2, 0.1])
    adjusted = losses.adjust_logits(jnp.zeros((3, 3)), prior)
    np.testing.assert_allclose(losses.cross_entropy(adjusted, jnp.arange(3)), -np.log([0.7, 0.2, 0.1]), rtol=1e-6)
    np.testing.assert_allclose(losses.adjust_logits(jnp.zeros((1, 3)), prior, 2.0)[0], 2 * np.log(prior), rtol=1e-6)
    assert bool(jnp.isfinite(losses.adjust_logits(jnp.zeros((1, 2)), jnp.array([1.0, 0.0]))).all())

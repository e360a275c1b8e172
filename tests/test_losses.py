"""Losses: values worked by hand, gradients, masks, and what the options against imbalance do."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from avjax import losses

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

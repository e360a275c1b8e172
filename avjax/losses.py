"""Pure loss functions: one unreduced value per clip, in float32. The trainer weighs, sums and divides."""

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array,
    label: jax.Array,
    *,
    smoothing: float = 0.0,
    class_weight: jax.Array | None = None,
) -> jax.Array:
    """Cross entropy of integer labels.

    Args:
      logits: (b, c).
      label: (b,) integers in [0, c).
      smoothing: the share of the target that is spread evenly over all classes, in [0, 1).
      class_weight: (c,) factor by the true class, or None for 1.
    Returns:
      (b,) float32.
    """
    classes = logits.shape[-1]
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))  # (b, c)
    target = jax.nn.one_hot(label, classes, dtype=jnp.float32) * (1 - smoothing) + smoothing / classes
    loss = -jnp.sum(target * log_p, -1)
    return loss if class_weight is None else loss * class_weight[label]


def balanced_weights(prior: jax.Array) -> jax.Array:
    """Class weights inverse to frequency, 1 / (c · prior), so that each present class weighs the same; 0 if absent.

    Args:
      prior: (c,) shares of the training labels, summing to 1.
    """
    present = prior > 0
    return jnp.where(present, 1.0 / (prior.size * jnp.where(present, prior, 1.0)), 0.0)


def adjust_logits(logits: jax.Array, prior: jax.Array, tau: float = 1.0) -> jax.Array:
    """Training logits plus `tau` · log prior (Menon et al. 2021, "Long-tail learning via logit adjustment", Eq. 10).

    Args:
      logits: (b, c).
      prior: (c,) shares of the training labels; a class without training clips keeps a floor of 1e-6.
    """
    return logits + tau * jnp.log(jnp.maximum(prior, 1e-6))[None, :].astype(logits.dtype)

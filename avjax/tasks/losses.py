"""Pure loss functions in float32: one unreduced value per clip, which the trainer weights, sums and divides.

Only `concordance` is computed over a whole batch, as its means and variances are.
"""

import jax
import jax.numpy as jnp

from avjax.errors import AvjaxError

# Added to the variances of labels: keeps the division finite for a constant batch, negligible for any other.
_VARIANCE_FLOOR = 1e-8
_TINY = 1e-9  # below any count, so that an empty sum divided by it is 0


def cross_entropy(
    logits: jax.Array,
    label: jax.Array,
    *,
    smoothing: float = 0.0,
    class_weight: jax.Array | None = None,
) -> jax.Array:
    """Computes the cross entropy of integer labels, or of soft labels.

    Args:
      logits: (b, c).
      label: (b,) integers in [0, c); or (b, c) soft labels, each row summing to 1.
      smoothing: the part of the target that is spread evenly over all classes, in [0, 1).
      class_weight: (c,) factor by the true class, averaged for soft labels (before smoothing); or None for 1.

    Returns:
      (b,) float32.
    """
    classes = logits.shape[-1]
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))  # (b, c)
    soft = _is_soft(logits, label)
    true = label.astype(jnp.float32) if soft else jax.nn.one_hot(label, classes, dtype=jnp.float32)
    target = true * (1 - smoothing) + smoothing / classes
    loss = -jnp.sum(target * log_p, -1)
    if class_weight is None:
        return loss
    return loss * (jnp.sum(true * class_weight[None, :], -1) if soft else class_weight[label])


def _is_soft(logits: jax.Array, label: jax.Array) -> bool:
    return label.ndim == logits.ndim


def focal(
    logits: jax.Array, label: jax.Array, *, gamma: float = 2.0, class_weight: jax.Array | None = None
) -> jax.Array:
    """Computes the focal loss −α (1 − p)^γ log p of the true class.

    Lin et al. 2017, "Focal loss for dense object detection", Eq. 4, and Eq. 5 with `class_weight` as α; p is the
    softmax over all classes instead of their sigmoid.

    Args:
      logits: (b, c) of at least two classes.
      label: (b,) integers in [0, c).
      gamma: γ ≥ 0, how strongly well-classified clips are down-weighted; 0 is `cross_entropy`.
      class_weight: (c,) factor by the true class, or None for 1.

    Returns:
      (b,) float32.

    Raises:
      AvjaxError: the labels are soft, without a single true class.
    """
    if _is_soft(logits, label):
        raise AvjaxError(f"focal loss got soft labels {label.shape}; give it a true class, {label.shape[:-1]}")
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    true = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
    # log(1 − p) from the other classes: it and its gradient stay accurate and finite where p is near 1.
    log_rest = jax.nn.logsumexp(jnp.where(true, -jnp.inf, log_p), -1)
    return jnp.exp(gamma * log_rest) * cross_entropy(logits, label, class_weight=class_weight)


def binary_cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Computes the multi-label cross entropy: one sigmoid for each of c labels, averaged over the labels.

    Args:
      logits: (b, c).
      label: (b, c) bool, or 0 and 1.

    Returns:
      (b,) float32.
    """
    logits = logits.astype(jnp.float32)
    return jnp.mean(jax.nn.softplus(jnp.where(label.astype(bool), -logits, logits)), -1)


def concordance(prediction: jax.Array, label: jax.Array, weight: jax.Array) -> jax.Array:
    """Computes 1 − the concordance correlation coefficient of a whole batch (DE-III, Eq. 7; Lin 1989, Biometrics 45).

    Means and variances are weighted, centred first, and those of the population (divided by n, as in the paper). All
    leading axes form one set: the global batch where it is sharded. Without any spread, as for one clip, it is 1.

    Args:
      prediction: (..., r), r values per clip, of magnitude about 1; rows of weight 0 are not read.
      label: (..., r), likewise.
      weight: (...), 0 for padding rows.

    Returns:
      (r,) float32, from 0 (full agreement) to 2.
    """
    axes = tuple(range(weight.ndim))
    real = weight[..., None] > 0
    x, y = (jnp.where(real, v, 0).astype(jnp.float32) for v in (prediction, label))
    normed = (weight / jnp.maximum(jnp.sum(weight), _TINY)).astype(jnp.float32)[..., None]

    def mean(v: jax.Array) -> jax.Array:
        return jnp.sum(v * normed, axes, keepdims=True)

    apart = mean(x - y)
    x, y = x - mean(x), y - mean(y)
    agreement = 2 * mean(x * y) / (mean(x * x) + mean(y * y) + apart**2 + _VARIANCE_FLOOR)
    return 1 - agreement.reshape(-1)


def balanced_weights(prior: jax.Array) -> jax.Array:
    """Computes class weights 1 / (c · prior), so that all present classes count the same; 0 for absent ones.

    Args:
      prior: (c,) class frequencies of the training labels, summing to 1.
    """
    present = prior > 0
    return jnp.where(present, 1.0 / (prior.size * jnp.where(present, prior, 1.0)), 0.0)


def adjust_logits(logits: jax.Array, prior: jax.Array, tau: float = 1.0) -> jax.Array:
    """Adds `tau` · log prior to logits (Menon et al. 2021, "Long-tail learning via logit adjustment", Eq. 10).

    Args:
      logits: (b, c).
      prior: (c,) class frequencies of the training labels, at least 1e-6 each.
      tau: strength of the adjustment.
    """
    return logits + tau * jnp.log(jnp.maximum(prior, 1e-6))[None, :].astype(logits.dtype)

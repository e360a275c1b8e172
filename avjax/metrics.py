"""Whole-set metrics out of sums that merge by addition. Everything about classes comes from one confusion matrix.

Matrices may be JAX arrays, inside jit, or NumPy arrays, whose float64 the reported figures keep.
"""

import jax
import jax.numpy as jnp
import numpy as np

Matrix = np.ndarray | jax.Array
_TINY = 1e-9  # below any count: divides an empty sum to 0


def confusion(label: jax.Array, predicted: jax.Array, weight: jax.Array, classes: int) -> jax.Array:
    """Weighted counts, rows = true class, columns = predicted class. Add matrices to merge sets.

    Args:
      label, predicted: (…) integers.
      weight: (…), 0 for padding rows.
    Returns:
      (classes, classes) float32.
    """
    cells = label * classes + predicted
    return jnp.zeros(classes * classes, jnp.float32).at[cells].add(weight).reshape(classes, classes)


def count(label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """`confusion` on the host: (classes, classes) float64 counts of (n,) integers."""
    return np.bincount(label * classes + predicted, minlength=classes**2).reshape(classes, classes).astype(np.float64)


def war(matrix: Matrix) -> Matrix:
    """Weighted average recall = accuracy = trace / n; 0 for an empty matrix. (..., c, c) → (...)."""
    return matrix.trace(axis1=-2, axis2=-1) / matrix.sum((-2, -1)).clip(_TINY)


def uar(matrix: Matrix) -> Matrix:
    """Unweighted average recall: mean recall over the classes that occur among the labels. (..., c, c) → (...)."""
    support = matrix.sum(-1)
    recall = matrix.diagonal(axis1=-2, axis2=-1) / support.clip(_TINY)
    return recall.sum(-1) / (support > 0).sum(-1).clip(1)


def f1(matrix: Matrix) -> dict[str, Matrix]:
    """F1 averaged `macro` (over classes among labels or predictions), `micro` and `weighted` by support."""
    hit = matrix.diagonal(axis1=-2, axis2=-1)
    support, answered = matrix.sum(-1), matrix.sum(-2)
    per_class = 2 * hit / (support + answered).clip(_TINY)
    total = support.sum(-1).clip(_TINY)
    return {
        "macro": per_class.sum(-1) / (support + answered > 0).sum(-1).clip(1),
        "micro": hit.sum(-1) / total,
        "weighted": (per_class * support).sum(-1) / total,
    }

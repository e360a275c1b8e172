"""Metrics of whole sets, computed from sums that merge by addition.

Classification metrics come from one confusion matrix, multi-label metrics from one per label, regression metrics from
sums and sums of squares. All may be JAX arrays, inside jit, or NumPy arrays, whose float64 the reported metrics keep.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray | jax.Array
_TINY = 1e-9  # below any count, so that an empty sum divided by it is 0
# A variance below this many machine epsilons of the mean square counts as 0: it is rounding of constant values.
_ROUNDING = 64


def confusion(label: jax.Array, predicted: jax.Array, weight: jax.Array, classes: int) -> jax.Array:
    """Counts predictions, weighted: rows = true class, columns = predicted class. Add matrices to merge sets.

    Args:
      label: (…) integers.
      predicted: (…) integers.
      weight: (…), 0 for padding rows.
      classes: number of classes.

    Returns:
      (classes, classes) float32.

    Example:
      >>> confusion(jnp.array([0, 0, 1]), jnp.array([0, 1, 1]), jnp.ones(3), 2).tolist()
      [[1.0, 1.0], [0.0, 1.0]]
    """
    cells = label * classes + predicted
    return jnp.zeros(classes * classes, jnp.float32).at[cells].add(weight).reshape(classes, classes)


def count(label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Computes `confusion` on the host: (classes, classes) float64 counts of (n,) integers.

    Example:
      >>> count(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
      [[1.0, 1.0], [0.0, 1.0]]
    """
    return np.bincount(label * classes + predicted, minlength=classes**2).reshape(classes, classes).astype(np.float64)


def war(matrix: Array) -> Array:
    """Computes weighted average recall = accuracy = trace / n, 0 for an empty matrix: (..., c, c) → (...).

    Example:
      >>> float(war(np.array([[3, 1], [0, 4]])))
      0.875
    """
    return matrix.trace(axis1=-2, axis2=-1) / matrix.sum((-2, -1)).clip(_TINY)


def uar(matrix: Array) -> Array:
    """Computes unweighted average recall, the mean recall over classes among the labels: (..., c, c) → (...).

    Example:
      >>> float(uar(np.array([[1, 1], [0, 4]])))
      0.75
    """
    support = matrix.sum(-1)
    recall = matrix.diagonal(axis1=-2, axis2=-1) / support.clip(_TINY)
    return recall.sum(-1) / (support > 0).sum(-1).clip(1)


def f1(matrix: Array) -> dict[str, Array]:
    """Computes F1 averaged `macro` (classes among labels or predictions), `micro` and `weighted` by support.

    Example:
      >>> round(float(f1(np.array([[1, 1], [0, 4]]))["macro"]), 3)
      0.778
    """
    hit = matrix.diagonal(axis1=-2, axis2=-1)
    support, predicted = matrix.sum(-1), matrix.sum(-2)
    per_class = 2 * hit / (support + predicted).clip(_TINY)
    total = support.sum(-1).clip(_TINY)
    return {
        "macro": per_class.sum(-1) / (support + predicted > 0).sum(-1).clip(1),
        "micro": hit.sum(-1) / total,
        "weighted": (per_class * support).sum(-1) / total,
    }


def binary_confusion(label: Array, predicted: Array, weight: Array) -> Array:
    """Counts predictions of c labels, weighted: rows = truth (0, 1), columns = prediction. Add matrices to merge sets.

    Args:
      label: (..., c) bool, or 0 and 1.
      predicted: (..., c) bool, or 0 and 1.
      weight: (...), 0 for padding rows.

    Returns:
      (c, 2, 2), float32 for JAX arrays, float64 for NumPy arrays. `f1` and `war` take the stack.

    Example:
      >>> binary_confusion(np.array([[1], [0], [1]]), np.array([[1], [1], [1]]), np.ones(3)).tolist()
      [[[0.0, 1.0], [0.0, 2.0]]]
    """
    xp = predicted.__array_namespace__()
    true, positive = (xp.stack([v == 0, v != 0], -1) for v in (label, predicted))  # (..., c, 2)
    cells = true[..., :, None] & positive[..., None, :]
    return (cells * weight[..., None, None, None].astype(float)).sum(tuple(range(weight.ndim)))


def weighted_accuracy(matrices: Array) -> Array:
    """Computes the weighted accuracy of a label, the mean recall of its presence and absence: (..., 2, 2) → (...).

    That is the metric of CMU-MOSEI, (TP · N/P + TN) / 2N for P positive and N negative clips (Tong et al. 2017,
    "Combating human trafficking with multimodal deep models"). If all clips are positive, or all negative, it is the
    recall of these alone.

    Example:
      >>> float(weighted_accuracy(np.array([[1, 1], [0, 4]])))
      0.75
    """
    return uar(matrices)


def scoring_sums(label: Array, predicted: Array, weight: Array) -> Array:
    """Computes weighted sums of 1, x, y, x², y² and xy, where x is predicted and y the label. Add them to merge sets.

    For JAX arrays they are float32, accurate to a relative 1e-6 over batches of some hundred clips. That is enough to
    choose an epoch, but a spread that is small against the mean loses digits. Reported metrics are computed on the
    host, from NumPy arrays, in float64.

    Args:
      label: (..., r), r values per clip; rows of weight 0 are not read.
      predicted: (..., r), likewise.
      weight: (...), 0 for padding rows.

    Returns:
      (r, 6).

    Example:
      >>> scoring_sums(np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]]), np.ones(2)).tolist()
      [[2.0, 3.0, 4.0, 5.0, 10.0, 7.0]]
    """
    xp = predicted.__array_namespace__()
    real = weight[..., None] > 0
    x, y = (xp.moveaxis(xp.where(real, v, 0).astype(float), -1, 0) for v in (predicted, label))  # (r, ...)
    terms = xp.stack([xp.ones_like(x), x, y, x * x, y * y, x * y], 1) * weight[None, None].astype(float)
    # The copy makes clips contiguous: only then does NumPy use pairwise summation, which limits rounding.
    return terms.copy().reshape(*terms.shape[:2], -1).sum(-1)


def ccc(sums: Array) -> Array:
    """Computes the concordance correlation coefficient (Lin 1989; DE-III, Eq. 7): (..., r, 6) → (..., r).

    It is 0 for an empty set, and where predictions or labels are constant to within rounding.

    Example:
      >>> sums = scoring_sums(np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]]), np.ones(2))
      >>> ccc(sums).round(3).tolist()
      [0.667]
    """
    x, y, x_variance, y_variance, covariance = _spread(sums)
    parts = x_variance + y_variance + (x - y) ** 2
    return 2 * covariance / (parts + (parts == 0))


def pearson(sums: Array) -> Array:
    """Computes Pearson's correlation: (..., r, 6) → (..., r); 0 without clips or spread, as `ccc`.

    Example:
      >>> sums = scoring_sums(np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]]), np.ones(2))
      >>> pearson(sums).round(3).tolist()
      [1.0]
    """
    _, _, x_variance, y_variance, covariance = _spread(sums)
    parts = x_variance**0.5 * y_variance**0.5
    return (covariance / (parts + (parts == 0))).clip(-1, 1)


def rmse(sums: Array) -> Array:
    """Computes the root mean squared error: (..., r, 6) → (..., r); 0 for an empty set.

    Example:
      >>> sums = scoring_sums(np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]]), np.ones(2))
      >>> rmse(sums).round(3).tolist()
      [0.707]
    """
    total = sums[..., 3] - 2 * sums[..., 5] + sums[..., 4]
    return (total / sums[..., 0].clip(_TINY)).clip(0) ** 0.5


# What `sentiment_sums` adds up: two tables (no, yes) x (no, yes), three sums, and `scoring_sums`.
_HAS0, _NON0, _HITS5, _HITS7, _ERROR, _SCORING = slice(0, 4), slice(4, 8), 8, 9, 10, slice(11, 17)


def sentiment_sums(label: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Computes the sums for `sentiment`: (n,) sentiments, −3 to 3, → (17,) float64. Add them to merge sets.

    Example:
      >>> sentiment_sums(np.array([-1.0, 2.0]), np.array([-0.5, 2.0])).shape
      (17,)
    """
    y, x = (v.astype(np.float64) for v in (label, predicted))
    polar = y != 0
    hits = [np.sum(np.rint(y.clip(-top, top)) == np.rint(x.clip(-top, top))) for top in (2, 3)]
    return np.concatenate(
        [
            count((y >= 0).astype(int), (x >= 0).astype(int), 2).reshape(-1),
            count((y > 0)[polar].astype(int), (x > 0)[polar].astype(int), 2).reshape(-1),
            hits,
            [np.abs(x - y).sum()],
            scoring_sums(y[:, None], x[:, None], np.ones(len(y)))[0],
        ]
    )


def sentiment(sums: np.ndarray) -> dict[str, float]:
    """Computes the metrics of CMU-MOSI and CMU-MOSEI (Zadeh et al. 2018), as MMSA (Mao et al. 2022) does.

    `has0`: negative against the rest, over all clips; `non0`: negative against positive, over clips that are not 0;
    accuracy (acc2) and weighted F1 of each. acc5, acc7: accuracy of the value clipped to −2 to 2, or −3 to 3, and
    rounded; mae: mean absolute error; corr: Pearson's correlation.

    Example:
      >>> sums = sentiment_sums(np.array([-1.0, 2.0]), np.array([-0.5, 2.0]))
      >>> round(sentiment(sums)["mae"], 2)
      0.25
    """
    size = max(sums[_SCORING][0], _TINY)
    tables = {name: sums[cells].reshape(2, 2) for name, cells in (("has0", _HAS0), ("non0", _NON0))}
    return {
        **{f"acc2_{name}": float(war(table)) for name, table in tables.items()},
        **{f"f1_{name}": float(f1(table)["weighted"]) for name, table in tables.items()},
        "acc5": float(sums[_HITS5] / size),
        "acc7": float(sums[_HITS7] / size),
        "mae": float(sums[_ERROR] / size),
        "corr": float(pearson(sums[_SCORING])),
    }


def _spread(sums: Array) -> tuple[Array, ...]:
    """Computes means, variances and covariance of x and y; (co)variances are 0 if constant to within rounding."""
    x, y, xx, yy, xy = (sums[..., i] / sums[..., 0].clip(_TINY) for i in range(1, 6))
    least = _ROUNDING * float(np.finfo(sums.dtype).eps)
    x_varies, y_varies = xx - x * x > least * xx, yy - y * y > least * yy
    return x, y, (xx - x * x) * x_varies, (yy - y * y) * y_varies, (xy - x * y) * (x_varies & y_varies)

"""The kinds of tasks: their labels, losses and scores. One registry, kind → `Scoring`.

Labels are int32 (b,) for "single", float32 (b, c) that sum to 1 for "soft", bool (b, c) for "multilabel" and float32
(b, c) for "regression". Data and model both hold the kind (`Features.task`, `Resident.task`, `Model.task`). Counts are
tables that merge by addition.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from avjax.tasks import losses, metrics

Array = np.ndarray | jax.Array
ONE_CLASS = ("single", "soft")  # the kinds that predict one of the classes


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The loss, counts and scores of a kind of task.

    Attributes:
      names: score → its displayed name; runs are compared by the first, and the second is shown with it.
      picks: the score, larger is better, by which validation chooses epoch and head.
      shape: number of classes or targets → shape of a table.
      table: (label, logits (…, c), weight (…)) → table, inside jit; count: (label (n,), logits (n, c)) → table in
        float64, on the host.
      scores: table → {score: value}; tables may be stacked along leading axes.
      loss: (logits (…, c), label, weight (…)) → (…) float32, the cost of each clip; weight is 0 for clips that do not
        count.
      predict: logits (…, c) → probabilities that sum to 1, a probability for each label, or targets.
      set_loss: table → the loss of a head over the whole set, where it is not a sum over clips.
    """

    names: Mapping[str, str]
    picks: str
    shape: Callable[[int], tuple[int, ...]]
    table: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    count: Callable[[np.ndarray, np.ndarray], np.ndarray]
    scores: Callable[[Array], dict[str, Array]]
    loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    predict: Callable[[Array], Array]
    set_loss: Callable[[Array], Array] | None = None


def _concordance(logits: jax.Array, label: jax.Array, weight: jax.Array) -> jax.Array:
    """Computes 1 − CCC of the batch, averaged over targets (DE-III, section 3.4): the same loss for every clip."""
    return jnp.broadcast_to(jnp.mean(losses.concordance(logits, label, weight)), weight.shape)


def _softmax(logits: Array) -> Array:
    xp = logits.__array_namespace__()
    raised = xp.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def _sigmoid(logits: Array) -> Array:
    xp = logits.__array_namespace__()
    return xp.exp(-xp.logaddexp(xp.zeros_like(logits), -logits))


_SINGLE = Scoring(
    names={"war": "WAR", "uar": "UAR"},
    picks="uar",
    shape=lambda c: (c, c),
    table=lambda label, logits, weight: metrics.confusion(label, jnp.argmax(logits, -1), weight, logits.shape[-1]),
    count=lambda label, logits: metrics.count(label, np.argmax(logits, -1), logits.shape[-1]),
    scores=lambda table: {"war": metrics.war(table), "uar": metrics.uar(table)},
    loss=lambda logits, label, weight: losses.cross_entropy(logits, label),
    predict=_softmax,
)

SCORINGS: dict[str, Scoring] = {
    "single": _SINGLE,
    # Against the class of the largest probability, the first on ties.
    "soft": dataclasses.replace(
        _SINGLE,
        table=lambda label, logits, weight: _SINGLE.table(jnp.argmax(label, -1), logits, weight),
        count=lambda label, logits: _SINGLE.count(np.argmax(label, -1), logits),
    ),
    # Means over the targets.
    "regression": Scoring(
        names={"ccc": "CCC", "pearson": "Pearson", "rmse": "RMSE"},
        picks="ccc",
        shape=lambda c: (c, 6),
        table=metrics.scoring_sums,
        count=lambda label, logits: metrics.scoring_sums(
            label.astype(np.float64), logits.astype(np.float64), np.ones(len(label))
        ),
        scores=lambda table: {
            "ccc": metrics.ccc(table).mean(-1),
            "pearson": metrics.pearson(table).mean(-1),
            "rmse": metrics.rmse(table).mean(-1),
        },
        loss=_concordance,
        predict=lambda logits: logits,
        set_loss=lambda table: 1 - metrics.ccc(table).mean(-1),
    ),
    # Means over the labels.
    "multilabel": Scoring(
        names={"wa": "weighted accuracy", "f1": "F1"},
        picks="wa",
        shape=lambda c: (c, 2, 2),
        table=lambda label, logits, weight: metrics.binary_confusion(label, logits > 0, weight),
        count=lambda label, logits: metrics.binary_confusion(label, logits > 0, np.ones(len(label))),
        scores=lambda table: {
            "wa": metrics.weighted_accuracy(table).mean(-1),
            "f1": metrics.f1(table)["weighted"].mean(-1),
        },
        loss=lambda logits, label, weight: losses.binary_cross_entropy(logits, label),
        predict=_sigmoid,
    ),
}


def encoded(labels: list, classes: tuple[str, ...], task: str) -> np.ndarray:
    """Encodes the labels of clips (`datasets.base.Clip.label`) as an array of their kind.

    Example:
      >>> encoded(["sad", "happy"], ("happy", "sad"), "single").tolist()
      [1, 0]
    """
    if task == "single":
        return np.array([classes.index(label) for label in labels], np.int32)
    if task == "soft":
        share = np.array(labels, np.float64)
        return (share / share.sum(-1, keepdims=True)).astype(np.float32)
    return np.array(labels, np.float32 if task == "regression" else bool)


def prior(label: np.ndarray, classes: int) -> np.ndarray:
    """Computes class frequencies of training labels (n,), or the mean of each column of labels (n, c): (c,).

    Example:
      >>> prior(np.array([0, 0, 1, 0]), 2).tolist()
      [0.75, 0.25]
    """
    return np.bincount(label, minlength=classes) / len(label) if label.ndim == 1 else label.mean(0)

"""The kinds of tasks: what a label is and what answers are scored by. One registry, kind → `Scoring`.

Where arrays alone are at hand, the dtype of the labels says the kind: integers (b,) are classes, floats (b, c) are
values, booleans (b, c) are yes or no, uint32 (b, c) are shares in millionths. Everything counted is a table that merges
by addition.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from avjax.tasks import losses, metrics

Array = np.ndarray | jax.Array
ONE_CLASS = ("single", "soft")  # the kinds whose answer is one of the classes
_MILLION = 1_000_000


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How answers of a kind of task are counted and scored.

    Attributes:
      names: score → how it is called; the first is what runs are compared by, the second stands beside it.
      picks: the score, larger is better, by which validation picks epoch and head.
      shape: of a table, for c classes or values.
      table: (label, logits (…, c), weight (…)) → table, inside jit; count: (label (n,), logits (n, c)) → table in
        float64, on the host.
      scores: table → {score: value}, over leading axes of a stack of tables.
      loss: table → the loss of a head over the whole set, where no sum over clips gives it.
    """

    names: Mapping[str, str]
    picks: str
    shape: Callable[[int], tuple[int, ...]]
    table: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    count: Callable[[np.ndarray, np.ndarray], np.ndarray]
    scores: Callable[[Array], dict[str, Array]]
    loss: Callable[[Array], Array] | None = None


_SINGLE = Scoring(
    names={"war": "WAR", "uar": "UAR"},
    picks="uar",
    shape=lambda c: (c, c),
    table=lambda label, logits, weight: metrics.confusion(label, jnp.argmax(logits, -1), weight, logits.shape[-1]),
    count=lambda label, logits: metrics.count(label, np.argmax(logits, -1), logits.shape[-1]),
    scores=lambda table: {"war": metrics.war(table), "uar": metrics.uar(table)},
)

SCORINGS: dict[str, Scoring] = {
    "single": _SINGLE,
    # Against the class of the largest share, the first of equals.
    "soft": dataclasses.replace(
        _SINGLE,
        table=lambda label, logits, weight: _SINGLE.table(jnp.argmax(label, -1), logits, weight),
        count=lambda label, logits: _SINGLE.count(np.argmax(label, -1), logits),
    ),
    # Means over the values.
    "regression": Scoring(
        names={"ccc": "CCC", "pearson": "Pearson", "rmse": "RMSE"},
        picks="ccc",
        shape=lambda c: (c, 6),
        table=metrics.moments,
        count=lambda label, logits: metrics.moments(
            label.astype(np.float64), logits.astype(np.float64), np.ones(len(label))
        ),
        scores=lambda table: {
            "ccc": metrics.ccc(table).mean(-1),
            "pearson": metrics.pearson(table).mean(-1),
            "rmse": metrics.rmse(table).mean(-1),
        },
        loss=lambda table: 1 - metrics.ccc(table).mean(-1),
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
    ),
}


def kind(label: Array) -> str:
    """The kind of task whose labels these are, by their dtype."""
    if jnp.issubdtype(label.dtype, jnp.bool_):
        return "multilabel"
    if label.dtype == jnp.uint32:
        return "soft"
    return "regression" if jnp.issubdtype(label.dtype, jnp.floating) else "single"


def scoring_of(label: Array) -> Scoring:
    """The scoring of such labels."""
    return SCORINGS[kind(label)]


def loss(logits: jax.Array, label: jax.Array, weight: jax.Array) -> jax.Array:
    """What a head costs by clip: cross entropy (of shares, too), 1 − CCC, or binary cross entropy.

    CCC is that of the whole batch, the mean over the values (DE-III, section 3.4): every clip costs the same.

    Args:
      logits: (…, c); label: of one of the kinds; weight: (…), 0 for clips that do not count.
    Returns:
      (…) float32.
    """
    found = kind(label)
    if found == "single":
        return losses.cross_entropy(logits, label)
    if found == "soft":
        return losses.cross_entropy(logits, shares(label))
    if found == "multilabel":
        return losses.binary_cross_entropy(logits, label)
    return jnp.broadcast_to(jnp.mean(losses.concordance(logits, label, weight)), weight.shape)


def encoded(labels: list, classes: tuple[str, ...], task: str) -> np.ndarray:
    """Labels of clips (`datasets.base.Clip.label`) as an array of the dtype of their kind."""
    if task == "single":
        return np.array([classes.index(label) for label in labels], np.int32)
    if task == "soft":
        return np.rint(np.array(labels, np.float64) * _MILLION).astype(np.uint32)
    return np.array(labels, np.float32 if task == "regression" else bool)


def shares(label: Array) -> Array:
    """The shares (…, c) float32 of labels of the kind "soft", which add up to 1."""
    label = label.astype(jnp.float32)
    return label / label.sum(-1, keepdims=True)


def prior(label: np.ndarray, classes: int) -> np.ndarray:
    """Of training labels: the shares of classes, or the mean of each value or label, (c,)."""
    if kind(label) == "single":
        return np.bincount(label, minlength=classes) / len(label)
    return shares(label).mean(0) if kind(label) == "soft" else label.mean(0)

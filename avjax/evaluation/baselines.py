"""The yardsticks of every run: linear models on pooled features, with the same clips, folds and statistics."""

import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from avjax import tasks
from avjax.training.batches import Resident
from avjax.training.lanes import LanePlan
from avjax.training.standardise import statistics
from avjax.training.streamed_batches import Streamed

# Streams that are concatenated; combinations with a missing stream are left out.
COMBINATIONS = (("surface",), ("audio",), ("video",), ("text",), ("audio", "video"), ("audio", "video", "text"))
# Length, lead-in and loudness alone: what can be predicted without seeing or hearing anybody. Other scores should be
# compared with it.
_NAMES = {"surface": "length, lead-in, loudness"}
_MEANS_ALONE = ("surface", "text")
# Fixed, not searched: scikit-learn's default strength on standardised features.
STRENGTH = 1.0


def pooled(data: Resident | Streamed) -> dict[str, np.ndarray]:
    """Computes a vector of each clip and stream: mean and standard deviation over valid steps (text, surface: mean)."""
    parts = [_pooled(block) for _, block in data.blocks()]
    return {stream: np.concatenate([part[stream] for part in parts]) for stream in parts[0]}


def _pooled(data: Resident) -> dict[str, np.ndarray]:
    out = {}
    for stream in ("surface", "audio", "video", "text"):
        if stream not in data.streams or not jnp.issubdtype(data.streams[stream].dtype, jnp.floating):
            continue  # frames, token ids
        x, mask = data.streams[stream], data.streams[f"{stream}_mask"]
        weight = mask.astype(jnp.float32)[..., None]
        size = jnp.maximum(jnp.sum(weight, 1), 1.0)
        mean = jnp.sum(x * weight, 1) / size
        spread = jnp.sqrt(jnp.sum(jnp.square(x - mean[:, None, :]) * weight, 1) / size)
        out[stream] = np.asarray(mean if stream in _MEANS_ALONE else jnp.concatenate([mean, spread], -1))
    return out


def yardsticks(data: Resident | Streamed, plan: LanePlan) -> dict[str, dict]:
    """Trains and tests the yardsticks on every fold (on training and validation clips together: nothing is selected).

    Classification and multi-label tasks use logistic regression, regression tasks ridge regression.

    Returns:
      {"audio+video": {"mean": {war, uar}, "std": …, "folds": [{fold, war, uar}]}, …}, or the scores of other tasks.
    """
    vectors = pooled(data)
    label = np.asarray(data.label)
    scoring, fit = tasks.SCORINGS[data.task], _FITS[data.task]
    lanes = jax.device_get(plan.lanes)
    first_seed = [i for i, (_, seed) in enumerate(plan.names) if seed == plan.names[0][1]]
    out = {}
    for names in COMBINATIONS:
        if not set(names) <= set(vectors):
            continue
        x = np.concatenate([vectors[n] for n in names], -1)
        folds = []
        for i in first_seed:
            z = _standardised(x, jnp.asarray(data.group), max(data.groups, 1), lanes.counted[i])
            train = np.concatenate(
                [_real(lanes.train[i], lanes.train_weight[i]), _real(lanes.val[i], lanes.val_weight[i])]
            )
            test = _real(lanes.test[i], lanes.test_weight[i])
            prediction = fit(z[train], label[train], z[test], lanes.prior.shape[-1])
            scores = scoring.scores(scoring.count(label[test], prediction))
            folds.append({"fold": plan.names[i][0], **{name: float(score) for name, score in scores.items()}})
        out["+".join(_NAMES.get(n, n) for n in names)] = summary(folds, scoring.names)
    return out


def summary(folds: Sequence[Mapping[str, object]], names: Iterable[str]) -> dict:
    """Computes mean and (population) standard deviation of the scores `names` over `folds`, and keeps the folds."""
    scores = {k: np.array([f[k] for f in folds]) for k in names}
    return {
        "mean": {k: float(v.mean()) for k, v in scores.items()},
        "std": {k: float(v.std()) for k, v in scores.items()},
        "folds": list(folds),
    }


def _real(index: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return index[weight > 0]


def _standardised(x: np.ndarray, group: jax.Array, groups: int, counted: np.ndarray) -> np.ndarray:
    one = jnp.ones((len(x), 1), bool)
    mean, std = statistics(jnp.asarray(x)[:, None, :], one, group, jnp.asarray(counted), groups)
    return np.asarray((x - mean[group]) / std[group])


def logistic_regression(
    x: np.ndarray, label: np.ndarray, x_test: np.ndarray, classes: int, *, strength: float, balanced: bool = False
) -> np.ndarray:
    """Fits logistic regression to training clips and predicts test clips.

    Args:
      x: (n, d) training vectors.
      label: (n,) their classes.
      x_test: (m, d) test vectors.
      classes: number of classes.
      strength: inverse regularisation strength, scikit-learn's C.
      balanced: whether all classes have the same weight.

    Returns:
      log-probabilities (m, classes), at least −100.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    out = np.full((len(x_test), classes), -np.inf)
    present = np.unique(label)
    if len(present) < 2:
        out[:, present] = 0.0
    else:
        model = LogisticRegression(C=strength, max_iter=5000, class_weight="balanced" if balanced else None)
        # The matrices are small: threads that wait for each other cost a hundred times more than they save.
        # A class of probability 0 has the logarithm −inf, without a warning.
        with threadpool_limits(1), np.errstate(divide="ignore"):
            model.fit(x, label)
            out[:, model.classes_] = model.predict_log_proba(x_test)
    return np.maximum(out, -100.0)  # for classes without training clips, or of probability 0 in float32


_classes = functools.partial(logistic_regression, strength=STRENGTH, balanced=True)


def _labels(x: np.ndarray, label: np.ndarray, x_test: np.ndarray, classes: int) -> np.ndarray:
    """Fits a logistic regression for each label, and predicts its log-odds (m, classes)."""
    binary = [_classes(x, column.astype(int), x_test, 2) for column in label.T]
    return np.stack([log_p[:, 1] - log_p[:, 0] for log_p in binary], -1)


def _values(x: np.ndarray, label: np.ndarray, x_test: np.ndarray, classes: int) -> np.ndarray:
    """Fits ridge regression, and predicts values (m, classes)."""
    from sklearn.linear_model import Ridge
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        return Ridge(1 / STRENGTH).fit(x, label).predict(x_test).reshape(-1, classes)


def _soft_labels(x: np.ndarray, label: np.ndarray, x_test: np.ndarray, classes: int) -> np.ndarray:
    """Fits `_classes` to the most probable class of soft labels."""
    return _classes(x, label.argmax(-1), x_test, classes)


_FITS = {"single": _classes, "soft": _soft_labels, "multilabel": _labels, "regression": _values}

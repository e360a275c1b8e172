"""The conventional yardstick of every run: logistic regression on pooled features, same clips, folds and statistics."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from avjax import metrics
from avjax.pipeline import LanePlan, Resident, statistics

# What is joined; a combination whose streams were not given is left out.
COMBINATIONS = (("surface",), ("audio",), ("video",), ("text",), ("audio", "video"), ("audio", "video", "text"))
# Length, lead-in and loudness alone: what can be guessed without seeing or hearing anybody. Other scores are to be read
# against it.
_NAMES = {"surface": "length, lead-in, loudness"}
_MEANS_ALONE = ("surface", "text")
# Fixed, not searched: scikit-learn's default strength on standardised features.
_STRENGTH = 1.0


def pooled(data: Resident) -> dict[str, np.ndarray]:
    """One vector per clip and stream: mean and standard deviation over valid steps (text, surface: mean alone)."""
    out = {}
    for stream in ("surface", "audio", "video", "text"):
        if stream not in data.streams:
            continue
        x, mask = data.streams[stream], data.streams[f"{stream}_mask"]
        weight = mask.astype(jnp.float32)[..., None]
        size = jnp.maximum(jnp.sum(weight, 1), 1.0)
        mean = jnp.sum(x * weight, 1) / size
        spread = jnp.sqrt(jnp.sum(jnp.square(x - mean[:, None, :]) * weight, 1) / size)
        out[stream] = np.asarray(mean if stream in _MEANS_ALONE else jnp.concatenate([mean, spread], -1))
    return out


def logistic_regression(data: Resident, plan: LanePlan) -> dict[str, dict]:
    """Trains and tests on every fold (training and validation clips together: nothing is selected).

    Returns:
      {"audio+video": {"mean": {war, uar}, "std": …, "folds": [{fold, war, uar}]}, …}.
    """
    vectors = pooled(data)
    label = np.asarray(data.streams["label"])
    lanes = jax.device_get(plan.lanes)
    first_seed = [i for i, (_, seed) in enumerate(plan.names) if seed == plan.names[0][1]]
    out = {}
    for names in COMBINATIONS:
        if not set(names) <= set(vectors):
            continue
        x = np.concatenate([vectors[n] for n in names], -1)
        folds = []
        for i in first_seed:
            z = _standardised(x, data, lanes.counted[i])
            train = np.concatenate(
                [_real(lanes.train[i], lanes.train_weight[i]), _real(lanes.val[i], lanes.val_weight[i])]
            )
            test = _real(lanes.test[i], lanes.test_weight[i])
            matrix = _fit(z[train], label[train], z[test], label[test], lanes.prior.shape[-1])
            folds.append(
                {"fold": plan.names[i][0], "war": float(metrics.war(matrix)), "uar": float(metrics.uar(matrix))}
            )
        out["+".join(_NAMES.get(n, n) for n in names)] = summary(folds)
    return out


def summary(folds: Sequence[Mapping[str, object]]) -> dict:
    """Mean and (population) standard deviation of WAR and UAR over `folds`, beside the folds themselves."""
    scores = {k: np.array([f[k] for f in folds]) for k in ("war", "uar")}
    return {
        "mean": {k: float(v.mean()) for k, v in scores.items()},
        "std": {k: float(v.std()) for k, v in scores.items()},
        "folds": list(folds),
    }


def _real(index: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return index[weight > 0]


def _standardised(x: np.ndarray, data: Resident, counted: np.ndarray) -> np.ndarray:
    one = jnp.ones((len(x), 1), bool)
    mean, std = statistics(jnp.asarray(x)[:, None, :], one, data.group, jnp.asarray(counted), data.groups)
    return np.asarray((x - mean[data.group]) / std[data.group])


def _fit(x_train, y_train, x_test, y_test, classes: int) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    if len(set(y_train.tolist())) < 2:
        predicted = np.full(len(y_test), y_train[0])
    else:
        model = LogisticRegression(C=_STRENGTH, max_iter=5000, class_weight="balanced")
        # The matrices are small: threads that wait for each other cost a hundred times more than they save.
        with threadpool_limits(1):
            predicted = model.fit(x_train, y_train).predict(x_test)
    return metrics.count(y_test, predicted, classes)

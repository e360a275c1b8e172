"""Significance of comparisons: bootstrap intervals and paired tests over people, from predictions of finished runs.

The unit is the speaker where speakers are known, since clips of one person resemble each other, else the clip. Seeds
are averaged within a clip first, so that more seeds are not more evidence.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from avjax.errors import AvjaxError

_DRAWS = 2000
_PERMUTATIONS = 9999
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Units:
    """Correct predictions of a run by unit: `right (n,)` of `count (n,)` clips; `kind` is speaker or clip."""

    kind: str
    names: tuple[str, ...]
    right: np.ndarray
    count: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The evidence on a run's accuracy, between 0 and 1.

    Attributes:
      interval: 95 % interval of the accuracy over all clips.
      difference: to the first run, with its 95 % interval (mean, low, high); None for the first.
      p: of the difference, two-sided; None for the first.
    """

    interval: tuple[float, float]
    difference: tuple[float, float, float] | None = None
    p: float | None = None


def of_runs(workdirs: Mapping[str, Path]) -> dict[str, Evidence]:
    """Computes the evidence of finished runs by name, each compared with the first.

    Raises:
      AvjaxError: as `read` and `evidence`.
    """
    by_name = {name: read(workdir) for name, workdir in workdirs.items()}
    first = next(iter(by_name))
    return {name: evidence(ours, None if name == first else by_name[first]) for name, ours in by_name.items()}


def read(workdir: Path) -> Units:
    """Reads the units of a finished run.

    Raises:
      AvjaxError: it has no predictions, or those of an earlier version, without speakers.
    """
    path = workdir / "predictions.npz"
    if not path.is_file():
        raise AvjaxError(f"{workdir}: no predictions.npz; a finished run of avjax.train has one")
    with np.load(path, allow_pickle=False) as file:
        rows = dict(file)
    if "speaker" not in rows:
        raise AvjaxError(f"{path}: has no speakers, so it is of an earlier version of avjax; train again")
    return units(rows)


def units(rows: Mapping[str, np.ndarray]) -> Units:
    """Computes the units of predictions, as `results.predictions` returns them; the first head predicts."""
    logits = next(v for k, v in rows.items() if k.startswith("logits_"))
    # Of soft labels, the most probable class.
    label = rows["label"] if rows["label"].ndim == 1 else np.argmax(rows["label"], -1)
    hit = np.argmax(logits, -1) == label
    clips, first, which = np.unique(rows["clip_id"], return_index=True, return_inverse=True)
    share = np.bincount(which, hit) / np.bincount(which)
    speakers = rows["speaker"][first]
    kind = "speaker" if all(speakers) and len(set(speakers)) > 1 else "clip"
    names, unit = np.unique(speakers if kind == "speaker" else clips, return_inverse=True)
    return Units(kind, tuple(names), np.bincount(unit, share), np.bincount(unit).astype(float))


def evidence(ours: Units, first: Units | None) -> Evidence:
    """Computes the interval of a run's accuracy, and the difference to the first run over the same clips.

    Intervals are percentiles of 2,000 bootstrap draws of units; p is the proportion of 9,999 random exchanges of the
    two runs within units (all exchanges where they are fewer) whose difference is at least as large.

    Raises:
      AvjaxError: the runs were tested on different clips.
    """
    interval = _interval(ours.right, ours.count)
    if first is None:
        return Evidence(interval)
    if ours.names != first.names or not np.array_equal(ours.count, first.count):
        raise AvjaxError(f"the runs were tested on different {ours.kind}s; compare runs of one data set and protocol")
    from scipy.stats import permutation_test

    gained = ours.right - first.right
    test = permutation_test(
        (ours.right, first.right),
        lambda a, b, axis: np.sum(a - b, axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_PERMUTATIONS,
        rng=np.random.default_rng(_SEED),
    )
    mean = float(gained.sum() / ours.count.sum())
    return Evidence(interval, (mean, *_interval(gained, ours.count)), float(test.pvalue))


def _interval(right: np.ndarray, count: np.ndarray) -> tuple[float, float]:
    """Computes the 95 % interval of the sum of `right` over that of `count`; of one unit, the value itself."""
    from scipy.stats import bootstrap

    if len(count) == 1:
        return (float(right[0] / count[0]),) * 2
    interval = bootstrap(
        (right, count),
        lambda r, c, axis: np.sum(r, axis) / np.sum(c, axis),
        paired=True,
        vectorized=True,
        n_resamples=_DRAWS,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)

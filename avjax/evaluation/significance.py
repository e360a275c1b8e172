"""How sure a comparison is: bootstrap intervals and paired tests over people, from the predictions of finished runs.

The unit is the speaker where speakers are known, since clips of one person resemble each other, else the clip. Seeds
are averaged within a clip first, so that more seeds do not make more evidence.
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
    """What a run got right by unit, in one order: `right (n,)` of `count (n,)` clips; `kind` is speaker or clip."""

    kind: str
    names: tuple[str, ...]
    right: np.ndarray
    count: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Accuracies between 0 and 1.

    Attributes:
      interval: of the accuracy over all clips, 95 %.
      difference: to the first run, with its 95 % interval (mean, low, high), and p, two-sided; None for the first.
    """

    interval: tuple[float, float]
    difference: tuple[float, float, float] | None = None
    p: float | None = None


def of_runs(workdirs: Mapping[str, Path]) -> dict[str, Evidence]:
    """The evidence of finished runs by name, each compared with the first.

    Raises:
      AvjaxError: as of `read` and `evidence`.
    """
    found = {name: read(workdir) for name, workdir in workdirs.items()}
    first = next(iter(found))
    return {name: evidence(ours, None if name == first else found[first]) for name, ours in found.items()}


def read(workdir: Path) -> Units:
    """The units of a finished run.

    Raises:
      AvjaxError: it has no predictions, or those of an earlier version, without speakers.
    """
    path = workdir / "predictions.npz"
    if not path.is_file():
        raise AvjaxError(f"{workdir}: no predictions.npz; a finished run of avjax.train has one")
    with np.load(path, allow_pickle=False) as file:
        rows = dict(file)
    if "speaker" not in rows:
        raise AvjaxError(f"{path}: without speakers, so of an earlier version of avjax; train again")
    return units(rows)


def units(rows: Mapping[str, np.ndarray]) -> Units:
    """The units of predictions, as `avjax.evaluation.results.predictions` gives them; the first logits are the
    predicting ones."""
    logits = next(v for k, v in rows.items() if k.startswith("logits_"))
    label = rows["label"] if rows["label"].ndim == 1 else np.argmax(rows["label"], -1)  # of shares the largest
    hit = np.argmax(logits, -1) == label
    clips, first, which = np.unique(rows["clip_id"], return_index=True, return_inverse=True)
    share = np.bincount(which, hit) / np.bincount(which)
    speakers = rows["speaker"][first]
    kind = "speaker" if all(speakers) and len(set(speakers)) > 1 else "clip"
    names, unit = np.unique(speakers if kind == "speaker" else clips, return_inverse=True)
    return Units(kind, tuple(names), np.bincount(unit, share), np.bincount(unit).astype(float))


def evidence(ours: Units, first: Units | None) -> Evidence:
    """How sure the accuracy of a run is, and its difference to that of the first one; both over the same clips.

    Intervals are percentiles of 2,000 bootstrap draws of units; p is the share of 9,999 random exchanges of the two
    runs within units (all of them where they are fewer) whose difference is at least as large.

    Raises:
      AvjaxError: the runs predicted other clips.
    """
    interval = _interval(ours.right, ours.count)
    if first is None:
        return Evidence(interval)
    if ours.names != first.names or not np.array_equal(ours.count, first.count):
        raise AvjaxError(f"the runs predicted other {ours.kind}s; compare runs of one data set and protocol")
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
    """95 % interval of the sum of `right` over that of `count`; the value itself where there is one unit."""
    from scipy.stats import bootstrap

    if len(count) == 1:
        return (float(right[0] / count[0]),) * 2
    found = bootstrap(
        (right, count),
        lambda r, c, axis: np.sum(r, axis) / np.sum(c, axis),
        paired=True,
        vectorized=True,
        n_resamples=_DRAWS,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)

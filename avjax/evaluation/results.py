"""Turns the test logits of all lanes into `predictions.npz` and `metrics.json`. Equal runs give equal files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from avjax import tasks
from avjax.datasets import registry
from avjax.errors import AvjaxError
from avjax.evaluation.baselines import summary
from avjax.features.store import Features
from avjax.tasks import metrics
from avjax.training.lanes import LanePlan
from avjax.utils.storage import read_json, replacing


def predictions(features: Features, plan: LanePlan, logits: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the rows of `predictions.npz`, one per lane and test clip.

    Args:
      features: of the data set.
      plan: of the run.
      logits: head → (lanes, n_test, c); rows beyond a lane's own test clips are padding.

    Returns:
      clip_id, speaker ("" where unknown), fold, seed, label and logits_<head>, plain arrays of equal length.

    Raises:
      AvjaxError: a logit is not finite; names the clips.
    """
    real = np.asarray(plan.lanes.test_weight) > 0
    index = np.asarray(plan.lanes.test)[real]
    lane = np.nonzero(real)[0]
    broken = ~np.all([np.isfinite(v[real]).all(-1) for v in logits.values()], 0)
    if broken.any():
        clips = ", ".join(sorted({features.ids[i] for i in index[broken]}))
        raise AvjaxError(f"the predictions for {clips} are not finite; look at these clips' features")
    return {
        "clip_id": np.array(features.ids)[index],
        "speaker": np.array(features.speakers, np.str_)[index],
        "fold": np.array([name for name, _ in plan.names])[lane],
        "seed": np.array([seed for _, seed in plan.names], np.int64)[lane],
        "label": _plain(features.label[index], features.task),
        **{f"logits_{head}": np.asarray(v)[real] for head, v in logits.items()},
    }


def measure(
    features: Features,
    plan: LanePlan,
    rows: Mapping[str, np.ndarray],
    lanes: Mapping[str, Sequence],
    protocol: str,
    reference: Mapping[str, dict],
) -> dict[str, object]:
    """Returns the content of `metrics.json`: scores, with `mean` and (population) `std` over folds and seeds.

    Args:
      features: of the data set.
      plan: of the run.
      rows: as `predictions` returns them.
      lanes: what else is recorded of each lane: `best_epoch` and, where validation selects it, the name of `head`.
      protocol: its text.
      reference: scores of the yardsticks.
    """
    heads = [k.removeprefix("logits_") for k in rows if k.startswith("logits_")]
    scoring = tasks.SCORINGS[features.task]

    def table(head: str, chosen: np.ndarray) -> np.ndarray:
        return scoring.count(rows["label"][chosen], rows[f"logits_{head}"][chosen])

    folds = []
    for i, ((fold, seed), counts) in enumerate(zip(plan.names, plan.counts, strict=True)):
        chosen = (rows["fold"] == fold) & (rows["seed"] == seed)
        more = {key: values[i] for key, values in lanes.items()}
        folds.append({"fold": fold, "seed": seed, **counts, **_scores(scoring, table(heads[0], chosen)), **more})
    every = np.ones(len(rows["label"]), bool)
    pooled = table(heads[0], every)
    over = summary(folds, scoring.names)
    together = _together(plan, rows, heads[0], features.task)
    return {
        "dataset": registry.title(features.dataset),
        "protocol": protocol,
        "task": features.task,
        "classes": list(features.classes),
        "counts": features.counts,
        "folds": folds,
        "mean": over["mean"],
        "std": over["std"],
        "pooled": _scores(scoring, pooled),
        **({"together": together} if together else {}),
        **_particulars(features, pooled),
        **_sentiment(features, rows["label"], rows[f"logits_{heads[0]}"]),
        "heads": {h: _of_head(scoring, table(h, every), features.task) for h in heads},
        "reference": dict(reference),
    }


def _of_head(scoring: tasks.Scoring, table: np.ndarray, task: str) -> dict[str, float]:
    """Returns the pooled scores of a head, with weighted F1 for classes."""
    more = {"f1": float(metrics.f1(table)["weighted"])} if task in tasks.ONE_CLASS else {}
    return _scores(scoring, table) | more


def _particulars(features: Features, pooled: np.ndarray) -> dict[str, object]:
    """Returns F1 and the confusion matrix of classes, or the scores of each value or label."""
    if features.task in tasks.ONE_CLASS:
        return {
            "f1": {k: float(v) for k, v in metrics.f1(pooled).items()},
            "confusion": pooled.astype(int).tolist(),
        }
    scoring = tasks.SCORINGS[features.task]
    return {"values": {n: _scores(scoring, row[None]) for n, row in zip(features.classes, pooled, strict=True)}}


def _sentiment(features: Features, label: np.ndarray, prediction: np.ndarray) -> dict[str, object]:
    """Returns the `sentiment` measures over all folds and seeds, if the task is sentiment regression."""
    if features.task != "regression" or features.classes != ("sentiment",):
        return {}
    return {"sentiment": metrics.sentiment(metrics.sentiment_sums(label[:, 0], prediction[:, 0]))}


def _together(plan: LanePlan, rows: Mapping[str, np.ndarray], head: str, task: str) -> dict | None:
    """Computes scores of the mean prediction of all seeds (of classes, mean probability) by fold; None for one seed.

    Seeds of a fold test the same clips in the same order.
    """
    if len({seed for _, seed in plan.names}) < 2:
        return None
    from scipy.special import softmax

    scoring, folds = tasks.SCORINGS[task], []
    for fold in dict.fromkeys(name for name, _ in plan.names):
        seeds = [(rows["fold"] == fold) & (rows["seed"] == seed) for name, seed in plan.names if name == fold]
        predicted = [rows[f"logits_{head}"][chosen].astype(np.float64) for chosen in seeds]
        mean = np.mean([softmax(a, -1) if task in tasks.ONE_CLASS else a for a in predicted], 0)
        folds.append({"fold": fold, **_scores(scoring, scoring.count(rows["label"][seeds[0]], mean))})
    return summary(folds, scoring.names)


def _plain(label: np.ndarray, task: str) -> np.ndarray:
    return label.astype(np.int64) if task == "single" else label


def attention(features: Features, by_clip: Sequence[tuple[int, Mapping[str, np.ndarray]]]) -> list[dict[str, object]]:
    """Adds clip and label as `name` to what `loop.attention` returns, for `plots.attention_figure`."""
    return [{"name": f"{features.ids[i]} ({features.clips[i].label})"} | dict(maps) for i, maps in by_clip]


def examples(features: Features, rows: Mapping[str, np.ndarray], source: str, count: int = 12) -> list[dict[str, str]]:
    """Returns `count` test clips, evenly spaced in the set, with sentence, label and prediction, for the report."""
    if source not in features.sentences or features.task not in tasks.ONE_CLASS:
        return []
    label = features.label if features.task == "single" else features.label.argmax(-1)
    head = next(k for k in rows if k.startswith("logits_"))
    first = {clip: at for at, clip in reversed(list(enumerate(rows["clip_id"].tolist())))}
    tested = [i for i, clip in enumerate(features.ids) if clip in first]
    out = []
    for i in tested[:: max(1, len(tested) // count)][:count]:
        at = first[features.ids[i]]
        predicted = int(np.argmax(rows[head][at]))
        out.append(
            {
                "clip_id": features.ids[i],
                "label": features.classes[label[i]],
                "predicted": features.classes[predicted],
                "sentence": features.sentences[source][i],
            }
        )
    return out


def write_predictions(path: Path, rows: Mapping[str, np.ndarray]) -> None:
    """Writes `predictions.npz` atomically."""
    with replacing(path, "wb") as file:
        np.savez(file, **rows)


def read(workdir: Path) -> dict:
    """Reads `metrics.json` of a finished run."""
    return read_json(workdir / "metrics.json")


def _scores(scoring: tasks.Scoring, table: np.ndarray) -> dict[str, float]:
    return {name: float(score) for name, score in scoring.scores(table).items()}

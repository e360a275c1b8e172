"""From the test logits of all lanes to `predictions.npz` and `metrics.json`. Equal runs give equal files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from avjax import datasets, metrics
from avjax.datasets.store import Features
from avjax.errors import AvjaxError
from avjax.files import replacing
from avjax.pipeline import LanePlan
from avjax.reference import summary

_STANDARDISED = {
    "train": "features standardised on the training clips",
    "speaker": "features standardised per speaker over the speaker's own unlabelled clips (transductive)",
    "enrol": "features standardised per speaker on unlabelled enrolment clips",
}


def protocol_name(folds: str, plan: LanePlan, config, random: bool = False) -> str:
    """One line that says how the figures came about; it stands beside every figure.

    Args:
      folds: the name of the division; config: the `protocol` part of a configuration; random: whether the features
        come from weights drawn at random.
    """
    held_out = {c["n_val"] > 0 for c in plan.counts} if config.select == "val" else {False}
    ways = {True: "best validation UAR", False: "last epoch"}
    select = " or, where nothing is held out, ".join(ways[h] for h in sorted(held_out, reverse=True))
    warning = ["RANDOM WEIGHTS in the encoders: the figures mean nothing"] if random else []
    return "; ".join([*warning, folds, *plan.notes, f"epoch: {select}", _STANDARDISED[config.standardise]])


def predictions(features: Features, plan: LanePlan, logits: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of `predictions.npz`, one per lane and test clip.

    Args:
      logits: head → (lanes, n_test, c), rows beyond a lane's own test clips are padding.
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
        raise AvjaxError(f"the answers to {clips} are not finite numbers; look at these clips' features")
    return {
        "clip_id": np.array(features.ids)[index],
        "speaker": np.array(features.speakers, np.str_)[index],
        "fold": np.array([name for name, _ in plan.names])[lane],
        "seed": np.array([seed for _, seed in plan.names], np.int64)[lane],
        "label": features.label[index].astype(np.int64),
        **{f"logits_{head}": np.asarray(v)[real] for head, v in logits.items()},
    }


def measure(
    features: Features,
    plan: LanePlan,
    rows: Mapping[str, np.ndarray],
    best_epoch: Sequence[int],
    protocol: str,
    reference: Mapping[str, dict],
) -> dict[str, object]:
    """The content of `metrics.json`; scores in 0–1, `mean` and (population) `std` over folds and seeds."""
    heads = [k.removeprefix("logits_") for k in rows if k.startswith("logits_")]
    classes = len(features.classes)

    def matrix(head: str, chosen) -> np.ndarray:
        answer = np.argmax(rows[f"logits_{head}"][chosen], -1)
        label = rows["label"][chosen]
        return metrics.count(label, answer, classes)

    folds = []
    for (fold, seed), counts, epoch in zip(plan.names, plan.counts, best_epoch, strict=True):
        chosen = (rows["fold"] == fold) & (rows["seed"] == seed)
        scores = _scores(matrix(heads[0], chosen))
        folds.append({"fold": fold, "seed": seed, **counts, **scores, "best_epoch": int(epoch)})
    every = np.ones(len(rows["label"]), bool)
    pooled = matrix(heads[0], every)
    over = summary(folds)
    together = _together(plan, rows, heads[0], classes)
    return {
        "dataset": datasets.title(features.dataset),
        "protocol": protocol,
        "task": "single",
        "classes": list(features.classes),
        "counts": features.counts,
        "folds": folds,
        "mean": over["mean"],
        "std": over["std"],
        "pooled": _scores(pooled),
        **({"together": together} if together else {}),
        "f1": {k: float(v) for k, v in metrics.f1(pooled).items()},
        "confusion": pooled.astype(int).tolist(),
        "heads": {h: _scores(matrix(h, every)) for h in heads},
        "reference": dict(reference),
    }


def _together(plan: LanePlan, rows: Mapping[str, np.ndarray], head: str, classes: int) -> dict | None:
    """Scores of the mean of all seeds' probabilities, fold by fold; None where there is one seed.

    Seeds of a fold test the same clips in the same order.
    """
    if len({seed for _, seed in plan.names}) < 2:
        return None
    from scipy.special import softmax

    folds = []
    for fold in dict.fromkeys(name for name, _ in plan.names):
        seeds = [(rows["fold"] == fold) & (rows["seed"] == seed) for name, seed in plan.names if name == fold]
        share = np.mean([softmax(rows[f"logits_{head}"][chosen].astype(np.float64), -1) for chosen in seeds], 0)
        matrix = metrics.count(rows["label"][seeds[0]], share.argmax(-1), classes)
        folds.append({"fold": fold, **_scores(matrix)})
    return summary(folds)


def examples(features: Features, rows: Mapping[str, np.ndarray], source: str, count: int = 12) -> list[dict[str, str]]:
    """Test clips with their sentence, label and answer, for the report: `count` of them, evenly spaced in the set."""
    if source not in features.sentences:
        return []
    head = next(k for k in rows if k.startswith("logits_"))
    first = {clip: at for at, clip in reversed(list(enumerate(rows["clip_id"].tolist())))}
    tested = [i for i, clip in enumerate(features.ids) if clip in first]
    out = []
    for i in tested[:: max(1, len(tested) // count)][:count]:
        at = first[features.ids[i]]
        answer = int(np.argmax(rows[head][at]))
        out.append(
            {
                "clip_id": features.ids[i],
                "label": features.classes[features.label[i]],
                "predicted": features.classes[answer],
                "sentence": features.sentences[source][i],
            }
        )
    return out


def write_predictions(path: Path, rows: Mapping[str, np.ndarray]) -> None:
    with replacing(path, "wb") as file:
        np.savez(file, **rows)


def read(workdir: Path) -> dict:
    """`metrics.json` of a finished run."""
    return json.loads((workdir / "metrics.json").read_text())


def _scores(matrix: np.ndarray) -> dict[str, float]:
    return {"war": float(metrics.war(matrix)), "uar": float(metrics.uar(matrix))}

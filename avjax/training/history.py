"""Turns the sums of a call of `loop.Trainer.epochs` into rows of `metrics.jsonl`, and checks that they are finite."""

import jax
import numpy as np

from avjax import tasks
from avjax.errors import AvjaxError
from avjax.models.base import Model
from avjax.training import loop
from avjax.training.lanes import LanePlan

_VALIDATION = "the validation loss"


def epoch_rows(sums: dict, names: list[tuple[str, int]], first: int, model: Model) -> list[dict[str, object]]:
    """Returns rows of losses and validation scores from the sums of one call, for each epoch and lane in training.

    Scores are those of the best of the heads that may predict (`loop.candidates`).
    """
    sums, scoring = jax.device_get(sums), tasks.SCORINGS[model.task]
    scores = scoring.scores(sums["val_tables"][:, :, np.array(loop.candidates(model))])  # (lanes, epochs, heads)
    best = np.argmax(scores[scoring.picks], -1)[..., None]
    scores = {name: np.take_along_axis(np.asarray(score), best, -1)[..., 0] for name, score in scores.items()}
    terms = {f"train_{k}": v.sum(-1) / sums["train_size"] for k, v in sums["train_terms"].items()}  # (lanes, epochs)
    rows = []
    for epoch in range(sums["live"].shape[1]):
        for lane, (fold, seed) in enumerate(names):
            if not sums["live"][lane, epoch]:
                continue
            losses = {k: float(v[lane, epoch]) for k, v in terms.items()}
            row = {"epoch": first + epoch, "fold": fold, "seed": seed, "train_loss": sum(losses.values()), **losses}
            if size := sums["val_size"][lane, epoch]:
                row["val_loss"] = float(sums["val_loss"][lane, epoch] / size)
                row |= {f"val_{name}": float(score[lane, epoch]) for name, score in scores.items()}
            rows.append(row)
    return rows


def check_finite(sums: dict, plan: LanePlan, ids: list[str], first: int, batch_size: int) -> None:
    """Checks that all losses and gradients are finite.

    Args:
      sums: as `loop.Trainer.epochs` returns them.
      plan: of the run.
      ids: of all resident clips.
      first: the first epoch of the call.
      batch_size: of training.

    Raises:
      AvjaxError: one is not; names fold, seed, epoch, step, term and the clips of the first such batch.
    """
    values = _not_finite(jax.device_get(sums))
    if not values:
        return
    epoch, step, at, term = min(values)
    lane = jax.tree.map(lambda v: v[at], plan.lanes)
    if term == _VALIDATION:
        where, (index, weight) = "", (lane.val, lane.val_weight)
    else:
        where, (index, weight) = f", step {step}", (v[step] for v in loop.epoch_order(lane, first + epoch, batch_size))
    clips = [ids[i] for i in np.asarray(index)[np.asarray(weight) > 0]]
    fold, seed = plan.names[at]
    raise AvjaxError(
        f"{term} is not finite at fold {fold}, seed {seed}, epoch {first + epoch}{where}; clips: {', '.join(clips)}. "
        "Lower train.learning_rate, or look at these clips' features"
    )


def _not_finite(sums: dict) -> list[tuple[int, float, int, str]]:
    """Returns (epoch, step, lane, term) of each value that is not finite; validation comes after the last step."""
    steps = {f"loss {k!r}": v for k, v in sums["train_terms"].items()} | {"the gradient": sums["train_gradient"]}
    training = [
        (epoch, step, lane, term)
        for term, values in steps.items()  # (lanes, epochs, steps)
        for lane, epoch, step in np.argwhere(~np.isfinite(values)).tolist()
    ]
    val = np.argwhere(~np.isfinite(sums["val_loss"])).tolist()  # (lanes, epochs)
    return training + [(epoch, np.inf, lane, _VALIDATION) for lane, epoch in val]

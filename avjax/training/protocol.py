"""The protocol of a run: which clips it trains, selects and tests on, checked before training, and its record.

Nothing is selected on test clips: the parts of a fold must be disjoint, and `protocol.select` offers validation alone.
"""

from collections.abc import Sequence

from avjax import tasks
from avjax.datasets.base import Fold
from avjax.datasets.folds import natural_folds, overlaps, repeated
from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from avjax.features.store import Features
from avjax.models.base import Model
from avjax.settings import ProtocolSettings
from avjax.training.lanes import LanePlan

_STANDARDISED = {
    "train": "features standardised on the training clips",
    "speaker": "features standardised per speaker over the speaker's own unlabelled clips (transductive)",
    "enrol": "features standardised per speaker on unlabelled enrolment clips",
    "none": "features not standardised",
}


def folds(features: Features, settings: ProtocolSettings) -> tuple[list[Fold], str]:
    """Returns the folds of `features` and the name of the division.

    Raises:
      AvjaxError: the data do not allow the folds requested (`natural_folds`); two parts of a fold share a clip; several
        folds test the same clips, or none is called `only`; or a division other than the data set's own has a speaker
        in both training and test, and `allow_speaker_overlap` is not set.
    """
    made, name = natural_folds(features.clips, features.folds, settings.folds, settings.fold_count)
    for fold in made:
        _check_disjoint(fold)
    chosen = [f for f in made if f.name == settings.only] if settings.only else made
    if not chosen:
        raise AvjaxError(f"protocol.only is {settings.only!r}; the folds are {', '.join(f.name for f in made)}")
    _check_tested_once(chosen)
    shared = max(len(_shared(features, f)) for f in chosen)
    if shared and made != list(features.folds) and not settings.allow_speaker_overlap:
        raise AvjaxError(
            f"protocol.folds={settings.folds}: {name}: up to {shared} speakers of a fold are in training and in test, "
            "which makes results look better than they are; use --config.protocol.folds=speaker, or "
            "--config.protocol.allow_speaker_overlap=True, which marks every result with it"
        )
    return chosen, f"fold {settings.only} alone of {name}" if settings.only else name


def _check_disjoint(fold: Fold) -> None:
    for one, other, both in overlaps(fold.parts):
        raise AvjaxError(
            f"fold {fold.name}: {len(both)} clips are in both {one} and {other}, such as {both[0]}; clips used for "
            "training or selection must not be tested on: fix the lists (python -m avjax.doctor data finds them)"
        )


def _check_tested_once(made: Sequence[Fold]) -> None:
    if again := repeated(clip for fold in made for clip in fold.test):
        raise AvjaxError(
            f"{len(again)} clips are tested in more than one of the folds {', '.join(f.name for f in made)}: these are "
            f"reported one by one and never pooled; choose one with --config.protocol.only={made[0].name}"
        )


def _shared(features: Features, fold: Fold) -> set[str]:
    """Returns the known speakers that are in both training and test of a fold."""
    speaker = {c.id: c.speaker for c in features.clips if c.speaker}
    return {speaker.get(i) for i in (*fold.train, *fold.val)} & {speaker.get(i) for i in fold.test} - {None}


def protocol_text(name: str, plan: LanePlan, settings: ProtocolSettings, model: Model, random: bool = False) -> str:
    """Describes in one line how the scores of a run were obtained; it accompanies every table and plot.

    Args:
      name: of the division.
      plan: of the run.
      settings: of the protocol.
      model: whose heads may be selected.
      random: whether the features come from encoders with random weights.
    """
    task = model.task
    warning = ["RANDOM WEIGHTS in the encoders: the figures mean nothing"] if random else []
    shared = max(c["speaker_overlap"] or 0 for c in plan.counts)
    overlap = [f"SPEAKERS OVERLAP: up to {shared} speakers of a fold are in training and in test"] if shared else []
    heads = [f"head: {_selection(plan, settings, task, model.heads[0])}"] if len(model.candidates) > 1 else []
    epoch = f"epoch: {_selection(plan, settings, task, 'last epoch')}"
    return "; ".join([*warning, *overlap, name, *plan.notes, epoch, *heads, _STANDARDISED[settings.standardise]])


def _selection(plan: LanePlan, settings: ProtocolSettings, task: str, without: str) -> str:
    """Describes how the epoch or head is selected; `without`: what is used where no clip is held out."""
    held_out = {c["n_val"] > 0 for c in plan.counts} if settings.select == "val" else {False}
    scoring = tasks.SCORINGS[task]
    ways = {True: f"best validation {scoring.names[scoring.picks]}", False: without}
    return " or, where nothing is held out, ".join(ways[h] for h in sorted(held_out, reverse=True))


def record(features: Features, plan: LanePlan, settings: ProtocolSettings, protocol_text: str) -> dict[str, object]:
    """Returns the content of `protocol.json`: clips used and dropped with reasons, folds, and the selection.

    `protocol_text` is the text that the function of this name returns.
    """
    published = metadata(features.dataset)
    used = len(features.ids)
    return {
        "protocol": protocol_text,
        "dataset": features.dataset,
        "task": features.task,
        "classes": list(features.classes),
        "features": features.content,
        "clips": {
            "used": used,
            "dropped": len(features.rejected),
            "published": (published.clips or None) if published else None,
        },
        "dropped": [{"clip_id": i, "reason": reason} for i, reason in features.rejected],
        "selection": _selection(plan, settings, features.task, "last epoch"),
        "standardise": settings.standardise,
        "folds": [
            {"fold": fold, "seed": seed, **counts} for (fold, seed), counts in zip(plan.names, plan.counts, strict=True)
        ],
    }

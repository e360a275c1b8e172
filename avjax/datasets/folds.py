"""Makes the folds of a protocol, holds out validation clips, and finds overlaps between the parts of folds."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from avjax.datasets.base import Fold
from avjax.errors import AvjaxError

# The most severe first: test clips must be used neither for training nor for model selection.
_PAIRS = (("train", "test"), ("val", "test"), ("train", "val"))
_NAMED = 3


def overlaps(parts: Mapping[str, Iterable[str]]) -> list[tuple[str, str, list[str]]]:
    """Finds overlaps: (part, other part, sorted names that are in both).

    Args:
      parts: "train", "val" and "test", where they exist → clip ids, or names of speakers.
    """
    sets = {part: set(names) for part, names in parts.items()}
    pairs = [(one, other) for one, other in _PAIRS if sets.keys() >= {one, other}]
    return [(one, other, sorted(both)) for one, other in pairs if (both := sets[one] & sets[other])]


def repeated(names: Iterable[str]) -> list[str]:
    """Returns the names that occur more than once, in order, such as clips that several folds test."""
    return [name for name, count in Counter(names).items() if count > 1]


def some(names: Sequence[str]) -> str:
    """Formats the first few names and the number of the others."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def natural_folds(
    clips: Sequence, official: Sequence[Fold], kind: str = "auto", count: int = 5, seed: int = 0
) -> tuple[list[Fold], str]:
    """Makes the folds of a protocol.

    Args:
      clips: objects with `id, label, speaker, split, fold`.
      official: the data set's own folds, which "auto" and "given" use if there are any.
      kind: "given" (official folds, a fold column or a split column), "speaker" (leave one speaker out, or `count`
        groups of speakers if there are more than `count`), "stratified" (`count` folds balanced over classes), or
        "auto": the first of these that the data allow.
      count: number of folds of "speaker" and "stratified".
      seed: of the random division.

    Returns:
      The folds and the name of the protocol.

    Raises:
      AvjaxError: the data do not allow the requested folds, or only some of their clips have a split or fold.
    """
    makers = {
        "given": lambda: _given(clips, official),
        "speaker": lambda: _by_speaker(clips, count, seed),
        "stratified": lambda: _stratified(clips, count, seed),
    }
    for name in makers if kind == "auto" else (kind,):
        made = makers[name]()
        if made is not None:
            return made
    needs = {
        "given": "official folds, or a split or fold for every clip",
        "speaker": "a speaker for every clip and at least two speakers",
        "stratified": f"at least {count} clips",
    }
    raise AvjaxError(f"protocol.folds={kind} needs {needs.get(kind, needs['stratified'])}; these data lack that")


def _given(clips: Sequence, official: Sequence[Fold]) -> tuple[list[Fold], str] | None:
    if official:
        return list(official), f"{len(official)} folds of the data set"
    folds, splits = {c.fold for c in clips}, {c.split for c in clips}
    if folds == {None} and splits == {None}:
        return None
    if None not in folds and len(folds) > 1:
        return [_leaving(clips, n, lambda c, n=n: c.fold == n) for n in sorted(folds)], f"{len(folds)} given folds"
    if None not in splits and {"train", "test"} <= splits:
        part = {s: tuple(c.id for c in clips if c.split == s) for s in ("train", "val", "test")}
        return [Fold("split", part["train"], part["test"], part["val"])], "given train/test split"
    # A partial division is a mistake in the data; replacing it by other folds would train on what it sets aside.
    raise AvjaxError(
        f"{sum(c.split is None for c in clips)} of {len(clips)} clips have no split and "
        f"{sum(c.fold is None for c in clips)} no fold (splits: {_names(splits)}; folds: {_names(folds)}); expected "
        "train and test, or two folds or more, for every clip; complete them, or set protocol.folds to speaker or "
        "stratified"
    )


def _names(values: set[str | None]) -> str:
    return ", ".join(sorted(values - {None})) or "none"


def _by_speaker(clips: Sequence, count: int, seed: int) -> tuple[list[Fold], str] | None:
    speakers = sorted({c.speaker for c in clips if c.speaker})
    if len(speakers) < 2 or not all(c.speaker for c in clips):
        return None
    if len(speakers) <= count:
        folds = [_leaving(clips, s, lambda c, s=s: c.speaker == s) for s in speakers]
        return folds, f"leave one speaker out ({len(speakers)} speakers)"
    order = np.random.default_rng(seed).permutation(len(speakers))
    groups = [{speakers[i] for i in order[g::count]} for g in range(count)]
    folds = [_leaving(clips, str(g + 1), lambda c, s=s: c.speaker in s) for g, s in enumerate(groups)]
    return folds, f"{count} folds of disjoint speakers ({len(speakers)} speakers)"


def _stratified(clips: Sequence, count: int, seed: int) -> tuple[list[Fold], str] | None:
    if len(clips) < count:
        return None
    # Assigned class by class with one running counter, so that folds have equal sizes and class proportions.
    order = np.random.default_rng(seed).permutation(len(clips))
    # Regression targets are sorted by the first of them.
    dealt = sorted(order.tolist(), key=lambda i: clips[i].label)
    fold_of = {clips[i].id: position % count for position, i in enumerate(dealt)}
    folds = [_leaving(clips, str(f + 1), lambda c, f=f: fold_of[c.id] == f) for f in range(count)]
    unknown = "" if all(c.speaker for c in clips) else " (speakers unknown: the same person may be on both sides)"
    return folds, f"{count} stratified folds{unknown}"


def _leaving(clips: Sequence, name: str, tested: Callable) -> Fold:
    return Fold(name, tuple(c.id for c in clips if not tested(c)), tuple(c.id for c in clips if tested(c)))


def hold_out(clips: Sequence, share: float, seed: int) -> tuple[list[str], list[str], str]:
    """Splits training clips into (train ids, validation ids, how): by speaker where known, else stratified.

    Args:
      clips: the training clips of a fold, with `id, label, speaker`.
      share: proportion to hold out, 0 <= share < 1; at least one speaker, or one clip of a class that has two, and
        never all of a class or all speakers. 0 holds out nothing.
      seed: of the random division.

    Raises:
      AvjaxError: `share` is out of range.
    """
    if not 0 <= share < 1:
        raise AvjaxError(f"protocol.validation is {share}; expected a share of the training clips, 0 <= share < 1")
    ids = [c.id for c in clips]
    if not share:
        return ids, [], "no validation part"
    rng = np.random.default_rng(seed)
    speakers = sorted({c.speaker for c in clips if c.speaker})
    if len(speakers) > 1 and all(c.speaker for c in clips):
        count = min(max(1, round(share * len(speakers))), len(speakers) - 1)
        held = {speakers[i] for i in rng.permutation(len(speakers))[:count]}
        taken = {c.id for c in clips if c.speaker in held}
        how = "whole training speakers held out"
    else:
        taken = _share_of_classes(clips, share, rng)
        how = "stratified part of the training clips held out" if taken else "no validation part (too few clips)"
    return [i for i in ids if i not in taken], [i for i in ids if i in taken], how


def _share_of_classes(clips: Sequence, share: float, rng: np.random.Generator) -> set[str]:
    """Draws ids of each class, never all of one; at least one of the largest class, if it has two."""
    groups: dict[str, list[str]] = {}
    for c in clips:
        groups.setdefault(c.label if isinstance(c.label, str) else "", []).append(c.id)
    largest = max(groups, key=lambda g: len(groups[g]), default=None)
    taken = set()
    for label in sorted(groups):
        wanted = max(round(share * len(groups[label])), label == largest)
        taken.update(rng.permutation(groups[label])[: min(wanted, len(groups[label]) - 1)].tolist())
    return taken

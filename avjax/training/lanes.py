"""Folds and seeds as lanes: the clips that each trains on, validates on and tests on."""

from collections.abc import Sequence

import flax.struct
import jax
import numpy as np

from avjax import tasks
from avjax.datasets.base import Fold
from avjax.datasets.folds import hold_out
from avjax.errors import AvjaxError
from avjax.features.store import Features
from avjax.settings import ProtocolSettings


@flax.struct.dataclass
class Lane:
    """One fold with one seed; `vmap` adds a leading lane axis to every leaf.

    Attributes:
      train, val, test: (n,) indices of clips, padded to the largest lane with the lane's first training clip; the
        `*_weight` are 0 for padding, else 1. Models that read conversations have (n, u): the clips of a conversation
        in the order of their turns, padded with the number of clips; weights are 0 for turns outside the part, too.
      counted: (clips,) 1 for the clips that the standardisation statistics are computed on; without standardisation,
        those that the yardsticks use.
      prior: (c,) class proportions of the training clips; of other tasks, see `tasks.prior`.
      seed: () uint32, from which all random draws of the lane come.
    """

    train: jax.Array
    train_weight: jax.Array
    val: jax.Array
    val_weight: jax.Array
    test: jax.Array
    test_weight: jax.Array
    counted: jax.Array
    prior: jax.Array
    seed: jax.Array


@flax.struct.dataclass
class LanePlan:
    """The lanes of a protocol, stacked, with their names, counts and notes.

    Attributes:
      lanes: a `Lane` with a leading axis over fold x seed.
      names: (fold, seed) of each lane.
      counts: n_train, n_val, n_test and speaker_overlap of each lane.
      notes: how validation clips were chosen and which clips are not scored, for the protocol's text.
    """

    lanes: Lane
    names: list[tuple[str, int]] = flax.struct.field(pytree_node=False)
    counts: list[dict[str, int | None]] = flax.struct.field(pytree_node=False)
    notes: list[str] = flax.struct.field(pytree_node=False)


def plan(
    features: Features, folds: Sequence[Fold], seeds: Sequence[int], settings: ProtocolSettings, turns: bool = False
) -> LanePlan:
    """Turns folds and seeds into lanes.

    Validation clips are held out of the training clips, unless the fold has an official part. With `enrol`, the
    statistics of each speaker are computed on `enrol_clips` of the speaker's clips, which are then not scored. With
    `turns` the rows are conversations; turns outside the part are read, but neither trained on nor scored.

    Raises:
      AvjaxError: a fold has no clip left to train on or to test on.
    """
    clips = dict(zip(features.ids, features.clips, strict=True))
    where = {clip_id: i for i, clip_id in enumerate(features.ids)}
    enrolled = _enrolled(features, settings.enrol_clips) if settings.standardise == "enrol" else set()
    parts, counts, names, notes = [], [], [], []
    for fold in folds:
        for seed in seeds:
            val, train = [i for i in fold.val if i in where], [i for i in fold.train if i in where]
            how = "official validation part"
            if not val:
                train, val, how = hold_out([clips[i] for i in train], settings.validation, seed)
            test = [i for i in fold.test if i in where and i not in enrolled]
            if not train or not test:
                raise AvjaxError(f"fold {fold.name}: {len(train)} clips to train on, {len(test)} to test on; need both")
            parts.append([np.array([where[i] for i in part], np.int32) for part in (train, val, test)])
            counts.append(_count(features, *parts[-1]))
            names.append((fold.name, int(seed)))
            notes.append(how)
    notes = sorted(set(notes))
    if enrolled:
        notes.append(f"{settings.enrol_clips} enrolment clips per speaker not scored")
    talks = conversations(features) if turns else None
    if talks is not None and talks.shape[1] > 1:
        notes.append("each clip with the other turns of its conversation before it, without their labels")
    lanes = _stack(features, parts, [seed for _, seed in names], settings.standardise, enrolled, talks)
    return LanePlan(lanes, names, counts, notes)


def _enrolled(features: Features, count: int) -> set[str]:
    """Returns the first `count` clips of each speaker, in an order independent of label, fold and seed."""
    order = np.random.default_rng(0).permutation(len(features.ids))
    taken: dict[str, list[str]] = {}
    for i in order:
        taken.setdefault(features.speakers[i], []).append(features.ids[i])
    return {i for ids in taken.values() for i in ids[:count]}


def _count(features: Features, train: np.ndarray, val: np.ndarray, test: np.ndarray) -> dict[str, int | None]:
    seen = {features.speakers[i] for i in np.concatenate([train, val])}
    tested = {features.speakers[i] for i in test}
    overlap = len(seen & tested) if all(features.speakers) else None
    return {"n_train": len(train), "n_val": len(val), "n_test": len(test), "speaker_overlap": overlap}


def conversations(features: Features) -> np.ndarray:
    """Returns the clips of each conversation by their turns, (conversations, u), padded with the number of clips.

    A clip outside any conversation is one of its own.
    """
    talks: dict[tuple[str | None, str], list[int]] = {}
    for i, clip in enumerate(features.clips):
        talks.setdefault((clip.dialogue, "" if clip.dialogue else clip.id), []).append(i)
    rows = [sorted(talk, key=lambda i: features.clips[i].turn or 0) for talk in talks.values()]
    out = np.full((len(rows), max(map(len, rows))), len(features.ids), np.int32)
    for row, talk in zip(out, rows, strict=True):
        row[: len(talk)] = talk
    return out


def _stack(
    features: Features,
    parts: Sequence[Sequence[np.ndarray]],
    seeds: Sequence[int],
    standardise: str,
    enrolled: set[str],
    talks: np.ndarray | None,
) -> Lane:
    fields: dict[str, np.ndarray] = {"seed": np.array(seeds, np.uint32)}
    fill = [_rows(p[0], talks)[0][0] for p in parts]
    for at, part in enumerate(("train", "val", "test")):
        fields[part], fields[f"{part}_weight"] = _pad([_rows(p[at], talks) for p in parts], fill)
    classes = len(features.classes)
    fields["prior"] = np.stack([tasks.prior(features.label[p[0]], classes) for p in parts])
    counted = np.zeros((len(parts), len(features.ids)), np.float32)
    for row, (train, _, _) in zip(counted, parts, strict=True):
        if standardise in ("train", "none"):
            row[train] = 1
        else:
            row[:] = [not enrolled or i in enrolled for i in features.ids]
    fields["counted"] = counted
    return jax.device_put(Lane(**fields))


def _rows(part: np.ndarray, talks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the clips of a part, or the conversations with any of them, and weights: 1 for the clips of the part."""
    if talks is None:
        return part, np.ones(len(part), np.float32)
    held = np.isin(talks, part)
    some = held.any(-1)
    return talks[some], held[some].astype(np.float32)


def _pad(lanes: Sequence[tuple[np.ndarray, np.ndarray]], fill: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Stacks indices and weights of parts of unequal length into (lanes, longest, …) each.

    Padding is a training row of the same lane: weight 0 would not silence a clip of another lane whose loss overflows,
    as 0 · inf is not 0.
    """
    shape = len(lanes), max(max(len(index) for index, _ in lanes), 1), *np.shape(fill[0])
    out, weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for i, (index, counts) in enumerate(lanes):
        out[i], out[i, : len(index)], weight[i, : len(index)] = fill[i], index, counts
    return out, weight

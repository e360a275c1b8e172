"""From features to batches: resident arrays, lanes as index arrays, standardisation, shuffling.

A *lane* is one run of a protocol (a fold with a seed). All lanes read the same resident arrays; a lane itself is a
small pytree of indices and weights, so that `vmap` over lanes runs a whole protocol as one program.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from avjax import tasks
from avjax.datasets.base import Fold, hold_out
from avjax.datasets.store import Features
from avjax.errors import AvjaxError

STANDARDISED = ("video", "flow", "audio")  # text enters as its encoder gives it
STANDARDISE = ("train", "speaker", "enrol", "none")
# A dimension that hardly moves is not blown up to unit variance: features are kept at a natural scale of order 1.
STD_FLOOR = 1e-2


@flax.struct.dataclass
class Lane:
    """One fold with one seed; `vmap` adds a leading lane axis to every leaf.

    Attributes:
      train, val, test: (n,) indices of clips, padded to the largest lane with the lane's first training clip; the
        `*_weight` are 0 for padding, else 1. Or (n, u) for models that read conversations: the clips of one in the
        order of their turns, then the number of clips, which stands for no turn; the weights are 0 for what the part
        does not hold, too.
      counted: (clips,) 1 for the clips whose features make the standardisation statistics; without any, those of the
        yardsticks.
      prior: (c,) class shares of the training clips; of other tasks, see `tasks.prior`.
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
class Resident:
    """All clips on the device.

    Attributes:
      streams: batch key → (clips, …): `video`, `video_mask`, …, `label`.
      group: (clips,) the standardisation group of each clip (its speaker, or 0).
      groups: number of groups.
      constants: batch key → what every batch has whole and all lanes share (`Features.constants`, `Model.constants`).
    """

    streams: dict[str, jax.Array]
    group: jax.Array
    groups: int = flax.struct.field(pytree_node=False)
    constants: dict[str, Any] = flax.struct.field(default_factory=dict)

    @property
    def label(self) -> jax.Array:
        """The labels of all clips."""
        return self.streams["label"]

    def resident(self, index: jax.Array) -> "Resident":
        """The clips `index (m,)` alone, numbered from 0."""
        return self.replace(streams={k: v[index] for k, v in self.streams.items()}, group=self.group[index])

    def blocks(self) -> Iterator[tuple[np.ndarray, "Resident"]]:
        """All clips as one block, as `streams.Streamed.blocks`."""
        yield np.arange(len(self.group)), self


def resident(
    features: Features,
    text_source: str,
    standardise: str,
    constants: Mapping[str, Any] = MappingProxyType({}),
    put: Callable[[Any], Any] = jax.device_put,
) -> Resident:
    """Puts all streams on the device, `text` being that of `text_source` ("" = none). What no model reads is unused.

    Args:
      constants: those of the model; those of the features stand beside them.
      put: puts arrays on the device or devices.
    Raises:
      AvjaxError: the text source is not in the store, or speakers are needed and unknown.
    """
    arrays = {"label": features.label} | streams_of(features, text_source)
    group, count = groups(features, standardise)
    return Resident(put(arrays), put(group), count, put({**features.constants, **constants}))


def streams_of(features: Features, text_source: str) -> dict[str, np.ndarray]:
    """Batch key → (clips, …), `text` being that of `text_source` ("" = none); raises as `resident`."""
    if text_source and f"text_{text_source}" not in features.arrays:
        there = ", ".join(n.removeprefix("text_") for n in features.arrays if n.startswith("text_"))
        raise AvjaxError(f"model.text_source is {text_source!r}; the feature store has {there}")
    arrays: dict[str, np.ndarray] = {}
    for name, values in features.arrays.items():
        if name == f"text_{text_source}" or not name.startswith("text_"):
            stream = name.partition("_")[0]
            arrays[stream], arrays[f"{stream}_mask"] = values, features.masks[name]
    return arrays


def groups(features: Features, standardise: str) -> tuple[np.ndarray, int]:
    """The standardisation group of each clip, (clips,), and their number, 0 for "none"; raises as `resident`."""
    if standardise not in STANDARDISE:
        raise AvjaxError(f"protocol.standardise is {standardise!r}; choose one of {', '.join(STANDARDISE)}")
    if standardise in ("train", "none"):
        return np.zeros(len(features.ids), np.int32), int(standardise == "train")
    if not all(features.speakers):
        raise AvjaxError(f"protocol.standardise={standardise} needs a speaker for every clip; use 'train' without them")
    names, group = np.unique(np.array(features.speakers), return_inverse=True)
    return group.astype(np.int32), len(names)


@flax.struct.dataclass
class LanePlan:
    """The lanes of a protocol, stacked, and what is said about them.

    Attributes:
      lanes: a `Lane` with a leading axis over fold x seed.
      names: (fold, seed) of each lane.
      counts: n_train, n_val, n_test and speaker_overlap of each lane.
      notes: how validation was made and which clips are not scored, for the protocol's name.
    """

    lanes: Lane
    names: list[tuple[str, int]] = flax.struct.field(pytree_node=False)
    counts: list[dict[str, int | None]] = flax.struct.field(pytree_node=False)
    notes: list[str] = flax.struct.field(pytree_node=False)


def plan(features: Features, folds: Sequence[Fold], seeds: Sequence[int], config, turns: bool = False) -> LanePlan:
    """Turns folds and seeds into lanes, as `config` (the `protocol` part of a configuration) says.

    Validation clips come out of the training clips, unless the fold has an official part. With `enrol`, statistics of
    every speaker come from `enrol_clips` of the speaker's clips, which are then not scored. With `turns` the rows are
    conversations, whose turns outside the part are seen and neither trained on nor scored.

    Raises:
      AvjaxError: a fold has no clip left to train on or to test on, or a seed comes twice.
    """
    if len(set(seeds)) < len(seeds):
        raise AvjaxError(f"train.seeds is {tuple(seeds)}; expected each seed once")
    clips = dict(zip(features.ids, features.clips, strict=True))
    where = {clip_id: i for i, clip_id in enumerate(features.ids)}
    enrolled = _enrolled(features, config.enrol_clips) if config.standardise == "enrol" else set()
    parts, counts, names, notes = [], [], [], []
    for fold in folds:
        for seed in seeds:
            val, train = [i for i in fold.val if i in where], [i for i in fold.train if i in where]
            how = "official validation part"
            if not val:
                train, val, how = hold_out([clips[i] for i in train], config.validation, seed)
            test = [i for i in fold.test if i in where and i not in enrolled]
            if not train or not test:
                raise AvjaxError(f"fold {fold.name}: {len(train)} clips to train on, {len(test)} to test on; need both")
            parts.append([np.array([where[i] for i in part], np.int32) for part in (train, val, test)])
            counts.append(_count(features, *parts[-1]))
            names.append((fold.name, int(seed)))
            notes.append(how)
    notes = sorted(set(notes))
    if enrolled:
        notes.append(f"{config.enrol_clips} enrolment clips per speaker not scored")
    talks = conversations(features) if turns else None
    if talks is not None and talks.shape[1] > 1:
        notes.append("each clip with the other turns of its conversation before it, without their labels")
    lanes = _stack(features, parts, [seed for _, seed in names], config.standardise, enrolled, talks)
    return LanePlan(lanes, names, counts, notes)


def _enrolled(features: Features, count: int) -> set[str]:
    """The first `count` clips of each speaker in an order that does not depend on label, fold or seed."""
    order = np.random.default_rng(0).permutation(len(features.ids))
    taken: dict[str, list[str]] = {}
    for i in order:
        taken.setdefault(features.speakers[i], []).append(features.ids[i])
    return {i for ids in taken.values() for i in ids[:count]}


def _count(features: Features, train: np.ndarray, val: np.ndarray, test: np.ndarray) -> dict[str, int | None]:
    seen = {features.speakers[i] for i in np.concatenate([train, val])}
    known = all(features.speakers)
    overlap = len(seen & {features.speakers[i] for i in test}) if known else None
    return {"n_train": len(train), "n_val": len(val), "n_test": len(test), "speaker_overlap": overlap}


def conversations(features: Features) -> np.ndarray:
    """The clips of each conversation by their turns, (conversations, u); the number of clips where there is none.

    A clip of no conversation is one of its own.
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
    features: Features, parts, seeds: Sequence[int], standardise: str, enrolled: set[str], talks: np.ndarray | None
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
    """A part's clips, or the conversations that have some of them, and the weights: 1 for the clips of the part."""
    if talks is None:
        return part, np.ones(len(part), np.float32)
    held = np.isin(talks, part)
    some = held.any(-1)
    return talks[some], held[some].astype(np.float32)


def _pad(lanes: Sequence[tuple[np.ndarray, np.ndarray]], fill: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights of parts of unequal length, (lanes, longest, …) each.

    A part is filled up with one of its own lane's training rows: weight 0 does not silence another lane's clip whose
    loss overflows, as 0 · inf is not 0.
    """
    shape = len(lanes), max(max(len(index) for index, _ in lanes), 1), *np.shape(fill[0])
    out, weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for i, (index, counts) in enumerate(lanes):
        out[i], out[i, : len(index)], weight[i, : len(index)] = fill[i], index, counts
    return out, weight


def statistics(
    x: jax.Array, mask: jax.Array, group: jax.Array, counted: jax.Array, groups: int
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation over the valid steps of the counted clips, by group.

    A step with a value that is not finite is left out, so that it spoils its own clip's loss, which names it, alone.

    Args:
      x: (clips, n, d); mask: (clips, n); group: (clips,) integers; counted: (clips,), above 0 for clips that count.
    Returns:
      mean and std, (groups, d); a group without a valid step has mean 0 and std 1.
    """
    total, added = sums(x, mask, group, counted, groups)
    mean = average(total, added)
    # Two passes: the one-pass formula loses all digits where the mean is large against the spread.
    return moments(total, mean, sums(x, mask, group, counted, groups, mean)[1])


def average(total: jax.Array, added: jax.Array) -> jax.Array:
    """The mean of `total (groups, 1)` steps whose sum is `added (groups, d)`; 0 of none."""
    return added / jnp.maximum(total, 1.0)


def moments(total: jax.Array, mean: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `statistics` gives, out of the sums of both passes."""
    std = jnp.maximum(jnp.sqrt(average(total, squares)), STD_FLOOR)
    return jnp.where(total > 0, mean, 0.0), jnp.where(total > 0, std, 1.0)


def sums(
    x: jax.Array, mask: jax.Array, group: jax.Array, counted: jax.Array, groups: int, mean: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sums over the steps that count in `statistics`, by group: their number (groups, 1), and their values (groups, d).

    Given their `mean (groups, d)`, the squares about it in the place of the values.
    """
    counts = mask & (counted > 0)[:, None] & jnp.all(jnp.isfinite(x), -1)  # (clips, n)
    weight = counts.astype(jnp.float32)
    x = jnp.where(counts[..., None], x, 0)  # a square that overflows is not silenced by a weight of 0
    if mean is not None:
        x = jnp.square(x - mean[group][:, None, :])
    add = lambda v: jax.ops.segment_sum(v, group, groups)  # noqa: E731
    return add(jnp.sum(weight, -1))[:, None], add(jnp.einsum("cnd,cn->cd", x, weight))


Statistics = Mapping[str, tuple[jax.Array, jax.Array]]


def lane_statistics(data: Resident, counted: jax.Array) -> Statistics:
    """The standardisation statistics of one lane: stream → (mean, std), each (groups, d); pictures have none."""
    streams = data.streams
    return {
        s: statistics(streams[s], streams[f"{s}_mask"], data.group, counted, data.groups) for s in standardised(data)
    }


def standardised(data: Resident) -> list[str]:
    """The streams that are standardised: of feature sequences, and none where there are no groups."""
    there = [s for s in STANDARDISED if s in data.streams and data.groups]
    return [s for s in there if jnp.issubdtype(data.streams[s].dtype, jnp.floating)]


def gather(data: Resident, stats: Statistics, index: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """The batch of the clips `index (b,)`, standardised, with `weight (b,)` 0 on padding rows, where nothing is real.

    Of conversations, `index (b, u)`, every turn is there and `turn_mask (b, u)` says which exist, whatever they weigh.
    """
    count = data.group.shape[0]
    rows = jnp.minimum(index, count - 1)
    batch = {key: array[rows] for key, array in data.streams.items()}
    there = index < count if index.ndim > 1 else weight > 0
    return prepared(batch, data.group[rows], stats, there, weight) | data.constants


def prepared(
    rows: Mapping[str, jax.Array],
    group: jax.Array,
    stats: Statistics,
    there: jax.Array,
    weight: jax.Array,
) -> dict[str, jax.Array]:
    """`gather` of streams that are at hand as rows with their standardisation `group`; `there` says which exist."""
    batch = dict(rows)
    for key in [k for k in batch if k.endswith("_mask")]:
        batch[key] &= there[..., None]
    for stream, (mean, std) in stats.items():
        scaled = (batch[stream] - mean[group][..., None, :]) / std[group][..., None, :]
        batch[stream] = jnp.where(batch[f"{stream}_mask"][..., None], scaled, 0)
    return batch | {"weight": weight} | ({"turn_mask": there} if there.ndim > 1 else {})


def alive(weight: jax.Array) -> jax.Array:
    """Which rows (n,) of weights (n,) or (n, u) count at all."""
    return jnp.any((weight > 0).reshape(weight.shape[0], -1), -1)


def shuffled(key: jax.Array, index: jax.Array, weight: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """An epoch's order: (steps, batch) indices and weights; padding comes last, so a padded lane sees the same batches.

    Each place draws its own number from `key`, and these do not depend on how many places there are.
    """
    draw = jnp.where(alive(weight), jax.random.uniform(key, weight.shape[:1]), jnp.inf)
    order = jnp.argsort(draw)
    return batches(index[order], weight[order], batch_size)


def batches(index: jax.Array, weight: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Cuts (n, …) indices and weights into (steps, batch, …), the last step filled with its last row at weight 0."""
    steps = -(-index.shape[0] // batch_size)
    fill = ((0, steps * batch_size - index.shape[0]), *[(0, 0)] * (index.ndim - 1))
    full = jnp.pad(index, fill, mode="edge"), jnp.pad(weight, fill)
    return tuple(v.reshape(steps, batch_size, *v.shape[1:]) for v in full)

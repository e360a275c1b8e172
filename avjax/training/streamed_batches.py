"""Features that do not fit on the device, read batch by batch through Grain; those that fit are `batches.Resident`.

The order of clips is the one that resident training draws, so both see the same batches, whatever the number of reading
threads; reading can start at any step.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avjax.features import tfds
from avjax.features.packed import Packed
from avjax.features.store import Features
from avjax.settings import Settings
from avjax.training import batches as batching
from avjax.training import standardise as feature_statistics
from avjax.training.sharding import ALONE, Placement
from avjax.utils import multihost

# Fraction of the memory that resident data may take.
_SHARE = 0.4
# Padding and decoding enlarge a packed view at most about this many times.
_GROWS = 2
_BLOCK = 64  # clips read at a time when all are read
_THREADS = 4
_AHEAD = 4  # batches


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Clips on disk, or in the memory of the host.

    Attributes:
      clips: clip number → {batch key: array} without a batch axis, padded to the longest clip.
      label, group: (n,) or (n, c), and (n,), as in `batches.Resident`.
      groups: number of standardisation groups; 0 = nothing is standardised.
      constants, task: as in `batches.Resident`.
    """

    clips: Sequence[Mapping[str, np.ndarray]]
    label: np.ndarray
    group: np.ndarray
    groups: int
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: str = "single"

    def rows(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Reads the streams of the clips `index (…)`, of any shape: key → (…, …); repeated clips are read once."""
        index = np.minimum(index, len(self.label) - 1)
        wanted, where = np.unique(index, return_inverse=True)
        read = [self.clips[i] for i in wanted.tolist()]
        out = {key: np.stack([clip[key] for clip in read])[where.reshape(index.shape)] for key in read[0]}
        return out | {"label": self.label[index], "group": self.group[index]}

    def resident(self, index: np.ndarray) -> batching.Resident:
        """Puts the clips `index (m,)` on the device, numbered from 0."""
        rows = self.rows(np.asarray(index))
        group = rows.pop("group")
        streams = {k: jnp.asarray(v) for k, v in rows.items()}
        return batching.Resident(streams, jnp.asarray(group), self.groups, dict(self.constants), self.task)

    def blocks(self, part: int = 0, parts: int = 1) -> Iterator[tuple[np.ndarray, batching.Resident]]:
        """Yields the clips of all blocks, or of one of `parts` of the blocks, with their numbers."""
        for index in np.array_split(np.arange(len(self.label)), range(_BLOCK, len(self.label), _BLOCK))[part::parts]:
            yield index, self.resident(index)


@dataclasses.dataclass(frozen=True)
class _WithHeld:
    """Clips on disk, joined with streams of theirs that are held in memory."""

    disk: Packed
    held: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.disk)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return self.disk[i] | {key: array[i] for key, array in self.held.items()}


class _Batches:
    """A random-access source for Grain: element k is `index[k] (…)` with its clips."""

    def __init__(self, data: Streamed, index: np.ndarray) -> None:
        self._data, self._index = data, index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, k: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return self._index[k], self._data.rows(self._index[k])


def batches(data: Streamed, index: np.ndarray, first: int = 0) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Iterates over the clips of each step of `index (steps, …)` from step `first`, read ahead by several threads."""
    if first >= len(index):
        return iter(())
    import grain  # imported late: resident data do not need it

    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
    return iter(grain.MapDataset.source(_Batches(data, index[first:])).to_iter_dataset(options))


def choose(
    features: Features,
    settings: Settings,
    constants: Mapping[str, Any] = MappingProxyType({}),
    placement: Placement = ALONE,
) -> batching.Resident | Streamed:
    """Returns the data of a run: on the device, or streamed where `data.mode` asks for it or memory is too small.

    Args:
      features: of the data set.
      settings: of the run.
      constants: of the model, as for `batches.resident`.
      placement: where arrays live. Resident clips are replicated on every device; of those left on disk each process
        reads its part.

    Raises:
      AvjaxError: as `batches.resident`.
    """
    mode, source, standardise = settings.data.mode, settings.model.text_source, settings.protocol.standardise
    size = sum(v.nbytes for v in features.arrays.values())
    if features.packed is None and (mode == "resident" or (mode == "auto" and size <= room())):
        return batching.resident(features, source, standardise, constants, placement.put)
    group, groups = batching.groups(features, standardise)
    shared = placement.put({**features.constants, **constants})
    streamed = Streamed(_clips(features, source), features.label, group, groups, shared, features.task)
    root_dataset_preset = features.packed
    if root_dataset_preset and not too_large(*root_dataset_preset, mode):
        return _read_together(streamed, placement)
    return streamed


def _read_together(data: Streamed, placement: Placement) -> batching.Resident:
    """Makes clips resident, of which each process reads an equal part from disk."""
    count, processes = len(data.label), jax.process_count()
    each = -(-count // (processes * jax.local_device_count())) * jax.local_device_count()
    mine = np.minimum(np.arange(each) + each * jax.process_index(), count - 1)
    rows = placement.gather_rows(data.rows(mine), count)
    group = rows.pop("group")
    return batching.Resident(rows, group, data.groups, dict(data.constants), data.task)


def on_one_device(data: batching.Resident | Streamed) -> batching.Resident | Streamed:
    """Returns the clips as one device of this process has them, for work that other processes take no part in."""
    first = lambda tree: jax.tree.map(lambda array: array.addressable_data(0), tree)  # noqa: E731
    if isinstance(data, Streamed):
        return dataclasses.replace(data, constants=first(dict(data.constants)))
    return first(data)


def too_large(root: Path, dataset: str, preset: str, mode: str) -> bool:
    """Returns whether a packed view is to be left on disk."""
    if mode != "auto":
        return mode == "streamed"
    files = tfds.readable(root, dataset, preset).glob("*.array_record*")
    return _GROWS * sum(f.stat().st_size for f in files) > room()


def room() -> float:
    """Returns the bytes that resident data may take: a fraction of the memory of the accelerator, or of the machine."""
    device = jax.local_devices()[0]
    limits = device.memory_stats() if device.platform != "cpu" else None
    memory = limits["bytes_limit"] if limits else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _SHARE * memory


def _clips(features: Features, text_source: str) -> Sequence[Mapping[str, np.ndarray]]:
    if features.packed:
        in_memory = f"text_{text_source}" in features.arrays
        disk = Packed(*features.packed, features.clips, "" if in_memory else text_source)
        held = batching.streams_of(features, text_source if in_memory else "")
        return _WithHeld(disk, held) if held else disk
    host = batching.streams_of(features, text_source)
    return [{key: array[i] for key, array in host.items()} for i in range(len(features.ids))]


def statistics(data: Streamed, counted: np.ndarray) -> feature_statistics.Statistics:
    """Computes the standardisation statistics of lanes, as `batches.lane_statistics`, in two passes over the clips.

    Args:
      data: the clips.
      counted: (lanes, clips), above 0 for clips that count.

    Returns:
      stream → (mean, std), each (lanes, groups, d).
    """
    if not data.groups:
        return {}
    totals = _summed(data, counted, None)
    means = {s: feature_statistics.average(total, added) for s, (total, added) in totals.items()}
    spreads = _summed(data, counted, means)
    return {s: feature_statistics.mean_and_std(total, means[s], squares) for s, (total, squares) in spreads.items()}


def _summed(
    data: Streamed, counted: np.ndarray, means: Mapping[str, jax.Array] | None
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums by stream: counted steps (lanes, groups, 1), and values, or squared deviations from `means`."""
    sums: dict[str, tuple[jax.Array, jax.Array]] = {}
    for index, block in data.blocks(jax.process_index(), jax.process_count()):
        added = _block_sums(block, jnp.asarray(counted[:, index]), means)
        sums = jax.tree.map(jnp.add, sums, added) if sums else added
    if not sums:  # more processes than blocks
        index, block = next(data.blocks())
        sums = _block_sums(block, jnp.zeros((len(counted), len(index))), means)
    return multihost.summed(sums)


@jax.jit
def _block_sums(block: batching.Resident, counted: jax.Array, means: Mapping[str, jax.Array] | None) -> dict[str, Any]:
    streams = batching.standardised(block)

    def one(counted: jax.Array, means: Mapping[str, jax.Array] | None) -> dict[str, Any]:
        return {
            s: feature_statistics.sums(
                block.streams[s],
                block.streams[f"{s}_mask"],
                block.group,
                counted,
                block.groups,
                None if means is None else means[s],
            )
            for s in streams
        }

    return jax.vmap(one, (0, None if means is None else 0))(counted, means)

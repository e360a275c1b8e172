"""Features on the device, and batches gathered from them."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from avjax.errors import AvjaxError
from avjax.features.store import Features
from avjax.training.standardise import Statistics, statistics

STANDARDISED = ("video", "flow", "audio")  # text features stay as their encoder gives them


@flax.struct.dataclass
class Resident:
    """All clips on the device.

    Attributes:
      streams: batch key → (clips, …): `video`, `video_mask`, …, `label`.
      group: (clips,) the standardisation group of each clip (its speaker, or 0).
      groups: number of groups.
      constants: batch key → array shared by all batches and lanes (`Features.constants`, `Model.constants`).
      task: the kind of task of `label` (`avjax.tasks.SCORINGS`).
    """

    streams: dict[str, jax.Array]
    group: jax.Array
    groups: int = flax.struct.field(pytree_node=False)
    constants: dict[str, Any] = flax.struct.field(default_factory=dict)
    task: str = flax.struct.field(pytree_node=False, default="single")

    @property
    def label(self) -> jax.Array:
        """Returns the labels of all clips."""
        return self.streams["label"]

    def resident(self, index: jax.Array) -> "Resident":
        """Returns only the clips `index (m,)`, numbered from 0."""
        return self.replace(streams={k: v[index] for k, v in self.streams.items()}, group=self.group[index])

    def blocks(self) -> Iterator[tuple[np.ndarray, "Resident"]]:
        """Yields all clips as one block, as `streamed_batches.Streamed.blocks`."""
        yield np.arange(len(self.group)), self


def resident(
    features: Features,
    text_source: str,
    standardise: str,
    constants: Mapping[str, Any] = MappingProxyType({}),
    put: Callable[[Any], Any] = jax.device_put,
) -> Resident:
    """Puts all streams on the device.

    Args:
      features: of the data set.
      text_source: whose text becomes the stream `text`; "" = none.
      standardise: `protocol.standardise`, which gives the groups.
      constants: of the model; those of the features are added.
      put: puts arrays on the device or devices.

    Raises:
      AvjaxError: the text source is not in the store, or speakers are needed and unknown.
    """
    arrays = {"label": features.label} | streams_of(features, text_source)
    group, count = groups(features, standardise)
    return Resident(put(arrays), put(group), count, put({**features.constants, **constants}), features.task)


def streams_of(features: Features, text_source: str) -> dict[str, np.ndarray]:
    """Returns batch key → (clips, …), with the text of `text_source` ("" = none) as `text`; raises as `resident`."""
    if text_source and f"text_{text_source}" not in features.arrays:
        sources = ", ".join(n.removeprefix("text_") for n in features.arrays if n.startswith("text_"))
        raise AvjaxError(f"model.text_source is {text_source!r}; the feature store has {sources}")
    arrays: dict[str, np.ndarray] = {}
    for name, values in features.arrays.items():
        if name == f"text_{text_source}" or not name.startswith("text_"):
            stream = name.partition("_")[0]
            arrays[stream], arrays[f"{stream}_mask"] = values, features.masks[name]
    return arrays


def groups(features: Features, standardise: str) -> tuple[np.ndarray, int]:
    """Returns the standardisation group of each clip, (clips,), and the number of groups (0 for "none").

    Raises:
      AvjaxError: groups are speakers, and not all are known.
    """
    if standardise in ("train", "none"):
        return np.zeros(len(features.ids), np.int32), int(standardise == "train")
    if not all(features.speakers):
        raise AvjaxError(f"protocol.standardise={standardise} needs a speaker for every clip; use 'train' without them")
    names, group = np.unique(np.array(features.speakers), return_inverse=True)
    return group.astype(np.int32), len(names)


def lane_statistics(data: Resident, counted: jax.Array) -> Statistics:
    """Computes the standardisation statistics of one lane: stream → (mean, std), each (groups, d); frames have none."""
    streams = data.streams
    return {
        s: statistics(streams[s], streams[f"{s}_mask"], data.group, counted, data.groups) for s in standardised(data)
    }


def standardised(data: Resident) -> list[str]:
    """Returns the streams that are standardised: those of features, and none where present are no groups."""
    streams = [s for s in STANDARDISED if s in data.streams and data.groups]
    return [s for s in streams if jnp.issubdtype(data.streams[s].dtype, jnp.floating)]


def gather(data: Resident, stats: Statistics, index: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    """Returns the standardised batch of the clips `index (b,)`; rows of `weight (b,)` 0 are padding and masked.

    Of conversations, `index (b, u)`, all turns are read, and `turn_mask (b, u)` marks those that exist, whatever their
    weight.
    """
    count = data.group.shape[0]
    rows = jnp.minimum(index, count - 1)
    batch = {key: array[rows] for key, array in data.streams.items()}
    present = index < count if index.ndim > 1 else weight > 0
    return prepared(batch, data.group[rows], stats, present, weight) | data.constants


def prepared(
    rows: Mapping[str, jax.Array],
    group: jax.Array,
    stats: Statistics,
    present: jax.Array,
    weight: jax.Array,
) -> dict[str, jax.Array]:
    """Prepares rows of streams as `gather` does; `group`: their standardisation groups, `present`: which exist."""
    batch = dict(rows)
    for key in [k for k in batch if k.endswith("_mask")]:
        batch[key] &= present[..., None]
    for stream, (mean, std) in stats.items():
        scaled = (batch[stream] - mean[group][..., None, :]) / std[group][..., None, :]
        batch[stream] = jnp.where(batch[f"{stream}_mask"][..., None], scaled, 0)
    return batch | {"weight": weight} | ({"turn_mask": present} if present.ndim > 1 else {})


def alive(weight: jax.Array) -> jax.Array:
    """Returns which rows (n,) of weights (n,) or (n, u) have any weight."""
    return jnp.any((weight > 0).reshape(weight.shape[0], -1), -1)


def shuffled(key: jax.Array, index: jax.Array, weight: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Shuffles an epoch into (steps, batch) indices and weights; padding comes last and so changes no batch.

    Each position draws its own number from `key`, whatever the number of positions.
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

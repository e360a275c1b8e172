"""Pretrained encoders over many clips: inputs collected into batches, features staged clip by clip in half precision.

On a CPU a clip is a batch; on accelerators clips share one. The shapes of batches are fixed, so that what a clip gets
does not depend on which others came with it, and a resumed extraction gives what an uninterrupted one gives.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from avjax import encoders, features
from avjax.datasets.store import Store
from avjax.progress import Stopwatch

# Clips in a batch, for each accelerator.
CLIPS = 16


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A clip on its way: the key of what will be staged, its inputs with their mask, and what makes of the features
    (rows, …) and their mask what is staged."""

    clip_id: str
    key: str
    inputs: np.ndarray
    mask: np.ndarray
    finish: Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]]


class Stage:
    """One encoder of a preset, and the clips that wait for it.

    Args:
      feature: "image" or "sound"; settings: the preset; weights: further provenance.
      rows: of one clip, at most.
    Attributes:
      key: of the provenance record of what it stages.
    """

    def __init__(
        self, feature: str, settings: features.Preset, store: Store, clock: Stopwatch, rows: int, **weights: str
    ):
        wanted = features.encodings(settings)[feature]
        self._load = lambda **options: encoders.load(wanted.source, layer=wanted.layer, pool=wanted.pool, **options)
        self._encoder = self._load()
        made_by = self._encoder.provenance | weights
        self.key = store.record(features.provenance(feature, settings, **made_by))
        self._name, self._feature, self._store, self._clock = wanted.source, feature, store, clock
        accelerated = jax.default_backend() != "cpu"
        self._clips = CLIPS * jax.local_device_count() if accelerated else 1
        self._rows = rows * self._clips if accelerated else 0
        self._waiting: dict[tuple[int, ...], list[Waiting]] = {}

    def add(self, clip_id: str, key: str, raw: Any, finish: Callable) -> None:
        """Takes a clip's raw inputs; when a batch is full, it is encoded and staged."""
        with self._clock(self._name):
            inputs, mask = self._encoder.padded(*self._encoder.prepare(raw))
        group = self._waiting.setdefault(inputs.shape[1:], [])
        group.append(Waiting(clip_id, key, inputs, mask, finish))
        if len(group) == self._clips:
            self._run(group)

    def nothing(self, clip_id: str, key: str, finish: Callable) -> None:
        """Stages a clip that has nothing to encode."""
        width = self._encoder.width
        self._store.put(clip_id, self._feature, key, finish(np.zeros((0, width)), np.zeros(0, bool)))

    def close(self) -> None:
        """Encodes what still waits."""
        for group in self._waiting.values():
            if group:
                self._run(group)

    def _run(self, group: list[Waiting]) -> None:
        with self._clock(self._name):
            inputs, mask = _joined(group, self._rows)
            encoded, real = self._encoder(inputs, mask)
        note_precision(self._store, self.key, self._encoder, encoded[real], lambda: self._exact(inputs, mask)[real])
        with self._clock("writing"):
            first = 0
            for clip in group:
                rows = slice(first, first + len(clip.inputs))
                made = clip.finish(encoded[rows], real[rows])
                self._store.put(clip.clip_id, self._feature, clip.key, made)
                first = rows.stop
        group.clear()

    def _exact(self, inputs: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self._load(dtype="float32")(inputs, mask)[0]


def note_precision(
    store: Store, key: str, encoder: encoders.Encoder, encoded: np.ndarray, exact: Callable[[], np.ndarray]
) -> None:
    """Adds to a provenance record, once, how far what is stored is from float32 all the way.

    Args:
      encoded: features (n, d) of the first batch, as `encoder` gives them; exact: computes them in float32, which is
        asked for only where the encoder computes in another precision.
    """
    if not len(encoded) or store.noted(key):
        return
    a = encoded.astype(features.ENCODED).astype(np.float64)
    b = (encoded if encoder.provenance["dtype"] == "float32" else exact()).astype(np.float64)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    spread = {"least": float(cosine.min()), "mean": float(cosine.mean()), "vectors": len(cosine)}
    store.note(key, {"stored": np.dtype(features.ENCODED).name, "cosine_to_float32": spread})


def stages(settings: features.Preset, store: Store, clock: Stopwatch, face_landmarker: str) -> dict[str, Stage]:
    """The encoders of picture and sound that a preset has: feature → stage.

    Raises:
      AvjaxError: weights cannot be had.
    """
    wanted = features.encodings(settings)
    pictures = -(-settings.frames // features.every(settings))
    more = {"image": {"rows": pictures, "face_landmarker": face_landmarker}, "sound": {"rows": 1}}
    return {feature: Stage(feature, settings, store, clock, **more[feature]) for feature in wanted}


def _joined(group: list[Waiting], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and masks of a group, whose shapes agree, as one batch with at least `rows` rows."""
    inputs = np.concatenate([clip.inputs for clip in group])
    mask = np.concatenate([clip.mask for clip in group])
    more = max(0, rows - len(inputs))
    return tuple(np.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) for x in (inputs, mask))

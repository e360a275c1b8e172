"""Pretrained encoders over many clips: inputs collected into batches, features staged clip by clip in half precision.

On a CPU a clip is a batch; on accelerators short clips share one. The shapes of batches are fixed, so that what a clip
gets does not depend on which others came with it, and a resumed extraction gives what an uninterrupted one gives. Of a
long clip memory holds a block of pictures at a time. Where the preset is raw, the inputs themselves are staged.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from avjax import encoders
from avjax.encoders import images, perceiver
from avjax.features import clip as clip_features
from avjax.features.presets import Encoding, Preset, encodings, every
from avjax.features.spool import Spool
from avjax.features.store import Store
from avjax.media import flow
from avjax.utils.progress import Stopwatch

# Clips in a batch, for each accelerator, where clips have few frames.
CLIPS = 16
# Pictures in a batch, where clips have many.
BLOCK = 32
# Pairs in a batch for each accelerator that computes flow; a CPU gains nothing from more than one.
PAIRS = 8


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
      feature: "image", "flow" or "sound"; settings: the preset; weights: further provenance.
      rows: of one clip, at most; 0 = any number, and clips do not share a batch.
    Attributes:
      key: of the provenance record of what it stages.
    """

    def __init__(
        self, feature: str, settings: Preset, store: Store, clock: Stopwatch, rows: int, load: "Loader", **weights: str
    ):
        self._encoding = encodings(settings)[feature]
        self._load, self._encoder = load, load(self._encoding)
        made_by = self._encoder.provenance | weights
        self.key = store.record(clip_features.provenance(feature, settings, **made_by))
        self._name, self._feature, self._store, self._clock = self._encoding.source, feature, store, clock
        shared = rows and jax.default_backend() != "cpu"
        self._clips = CLIPS * jax.local_device_count() if shared else 1
        self._rows = rows * self._clips if shared else 0
        self._waiting: dict[tuple[int, ...], list[Waiting]] = {}

    def add(self, clip_id: str, key: str, raw: Any, finish: Callable) -> None:
        """Takes a clip's raw inputs, None where it has none; when a batch is full, it is encoded and staged."""
        if raw is None:
            self._put(clip_id, key, finish, np.zeros((0, self._encoder.width)), np.zeros(0, bool))
            return
        with self._clock(self._name):
            inputs, mask = self._encoder.padded(*self._encoder.prepare(raw))
        group = self._waiting.setdefault(inputs.shape[1:], [])
        group.append(Waiting(clip_id, key, inputs, mask, finish))
        if len(group) == self._clips:
            self._run(group)

    def close(self) -> None:
        """Encodes what still waits."""
        for group in self._waiting.values():
            if group:
                self._run(group)

    def _run(self, group: list[Waiting]) -> None:
        encoded, real = self._encode(*_joined(group, self._rows))
        first = 0
        for clip in group:
            rows = slice(first, first + len(clip.inputs))
            self._put(clip.clip_id, clip.key, clip.finish, encoded[rows], real[rows])
            first = rows.stop
        group.clear()

    def _encode(self, inputs: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with self._clock(self._name):
            encoded, real = self._encoder(inputs, mask)

        def exact() -> np.ndarray:
            return self._load(self._encoding, "float32")(inputs, mask)[0][real]

        note_precision(self._store, self.key, self._encoder, encoded[real], exact)
        return encoded, real

    def _put(self, clip_id: str, key: str, finish: Callable, encoded: np.ndarray, real: np.ndarray) -> None:
        with self._clock("writing"):
            self._store.put(clip_id, self._feature, key, finish(encoded, real))


class Pictures(Stage):
    """A stage whose raw inputs are a pile of pictures (n, h, w, 3) uint8, which it discards."""

    def add(self, clip_id: str, key: str, raw: Spool | None, finish: Callable) -> None:
        if raw is None or self._clips > 1:
            super().add(clip_id, key, raw and np.concatenate(list(raw.blocks(BLOCK))), finish)
        else:
            encoded = np.concatenate([self._seen(block) for block in raw.blocks(BLOCK)])
            self._put(clip_id, key, finish, encoded, np.ones(len(encoded), bool))
        if raw:
            raw.discard()

    def _seen(self, pictures: np.ndarray) -> np.ndarray:
        with self._clock(self._name):
            inputs, mask = self._encoder.prepare(pictures)
        return self._encode(inputs, mask)[0]


class Flows(Pictures):
    """A stage whose raw inputs are a pile of flows (n, h, w, 2), or of the pairs of frames (n, 2, h, w, 3) uint8 that
    they are computed of; it sees them drawn, after a picture of no motion, which is all that a clip without any has.

    Args:
      room: a folder for piles; mover: computes flows of pairs, None where they come computed.
    """

    def __init__(self, *arguments: Any, room: Path, mover: encoders.Encoder | None, **weights: Any):
        super().__init__(*arguments, **weights)
        self._room, self._mover = room, mover
        self._still: np.ndarray | None = None

    def add(self, clip_id: str, key: str, raw: Spool | None, finish: Callable) -> None:
        if self._still is None:
            side = self._encoding.side
            self._still = self._seen(flow.draw(np.zeros((1, side, side, 2)), 0.0))
        parts = [self._still]
        if raw:
            moved = self._moved(raw) if self._mover else raw
            with self._clock("flow"):
                spread = flow.spread(moved.blocks(BLOCK))
            parts += [self._seen(pictures) for pictures in self._drawn(moved, spread)]
            moved.discard()
        encoded = np.concatenate(parts)
        self._put(clip_id, key, finish, encoded, np.ones(len(encoded), bool))

    def _moved(self, pairs: Spool) -> Spool:
        batch = 1 if jax.default_backend() == "cpu" else PAIRS * jax.local_device_count()
        flows = Spool.begun(self._room, (*pairs.shape[1:3], 2), np.dtype(clip_features.ENCODED).name)
        for block in pairs.blocks(BLOCK):
            with self._clock("flow"):
                flows.add(perceiver.optical_flow(self._mover, block[:, 0], block[:, 1], batch=batch))
        pairs.discard()
        return flows

    def _drawn(self, flows: Spool, spread: float) -> Iterator[np.ndarray]:
        for block in flows.blocks(BLOCK):
            with self._clock("flow"):
                pictures = flow.draw(block, spread)
            yield pictures


class FlowGrid:
    """What stands in the place of `Flows` where flow is not drawn and encoded but averaged over a grid (`flow.grid`).

    Its raw inputs are piles of computed flows (n, h, w, 2).

    Attributes:
      key: as of a `Stage`.
    """

    def __init__(self, settings: Preset, store: Store, clock: Stopwatch, **weights: str):
        self.key = store.record(clip_features.provenance("flow", settings, **weights))
        self._store, self._clock, self._side = store, clock, settings.flow.side

    def add(self, clip_id: str, key: str, raw: Spool | None, finish: Callable) -> None:
        """Takes a clip's flows, None where it has none, and stages what becomes of them, after that of no motion."""
        with self._clock("flow"):
            still = np.zeros((1, self._side, self._side, 2), clip_features.ENCODED)
            spread = flow.spread(raw.blocks(BLOCK)) if raw else 0.0
            blocks = [still, *(raw.blocks(BLOCK) if raw else ())]
            steps = np.concatenate([flow.grid(block, spread) for block in blocks])
        with self._clock("writing"):
            self._store.put(clip_id, "flow", key, finish(steps, np.ones(len(steps), bool)))
        if raw:
            raw.discard()

    def close(self) -> None:
        """Nothing waits."""


class Inputs:
    """What stands in the place of a `Stage` where the preset is raw: it stages the inputs of an encoder, and runs none.

    Args: as of a `Stage`; its raw inputs are a pile of pictures (n, h, w, 3) uint8, which it discards, or one waveform.
    Attributes:
      key: as of a `Stage`.
    """

    def __init__(self, feature: str, settings: Preset, store: Store, clock: Stopwatch, load: "Loader", **weights: str):
        encoding = encodings(settings)[feature]
        self._encoder, self._side = load(encoding, precision(settings)), encoding.side
        self.key = store.record(clip_features.provenance(feature, settings, **self._encoder.provenance | weights))
        self._name, self._feature, self._store, self._clock = encoding.source, feature, store, clock

    def add(self, clip_id: str, key: str, raw: Any, finish: Callable) -> None:
        """Takes a clip's raw inputs, None where it has none, and stages what the encoder would be given."""
        with self._clock(self._name):
            inputs = self._framed(raw) if self._feature == "image" else self._heard(raw)
        with self._clock("writing"):
            self._store.put(clip_id, self._feature, key, finish(inputs, np.ones(len(inputs), bool)))

    def close(self) -> None:
        """Nothing waits."""

    def _framed(self, pile: Spool | None) -> np.ndarray:
        """Pictures (n, h, w, 3) uint8 of the size that the encoder takes."""
        if pile is None:
            blank = np.zeros((1, self._side, self._side, 3), np.uint8)
            return images.framed(blank, self._encoder.settings)[:0]
        pictures = [images.framed(block, self._encoder.settings) for block in pile.blocks(BLOCK)]
        pile.discard()
        return np.concatenate(pictures)

    def _heard(self, waveforms: list[np.ndarray] | None) -> np.ndarray:
        """Prepared sound with its length first: samples (n, 1), spectra (n, bins)."""
        inputs, _ = self._encoder.prepare(waveforms or [np.zeros(0, np.float32)])
        steps = inputs[0].T  # a spectrum's length comes last
        return steps if steps.ndim > 1 else steps[:, None]


class Loader:
    """Loads the encoders of a preset, each once. `random`: see `encoders.load`."""

    def __init__(self, random: bool):
        self._random = random
        self._loaded: dict[tuple[Encoding, str | None], encoders.Encoder] = {}

    def __call__(self, wanted: Encoding, dtype: str | None = None) -> encoders.Encoder:
        if (wanted, dtype) not in self._loaded:
            self._loaded[wanted, dtype] = encoders.load(
                wanted.source,
                tower=wanted.tower,
                layer=wanted.layer,
                pool=wanted.pool,
                dtype=dtype,
                random=self._random,
            )
        return self._loaded[wanted, dtype]


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
    a = encoded.astype(clip_features.ENCODED).astype(np.float64)
    b = (encoded if encoder.provenance["dtype"] == "float32" else exact()).astype(np.float64)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    spread = {"least": float(cosine.min()), "mean": float(cosine.mean()), "vectors": len(cosine)}
    store.note(key, {"stored": np.dtype(clip_features.ENCODED).name, "cosine_to_float32": spread})


def precision(settings: Preset) -> str | None:
    """What to load a preset's encoders in, None for their default: their inputs are the same whatever they compute in,
    and so is the provenance of these."""
    return "float32" if settings.raw else None


def stages(
    settings: Preset, store: Store, clock: Stopwatch, face_landmarker: str
) -> dict[str, Stage | FlowGrid | Inputs]:
    """The encoders of picture, flow and sound that a preset has: feature → stage.

    Raises:
      AvjaxError: weights cannot be had.
    """
    common = (settings, store, clock)
    load, made = Loader(settings.random), {}
    faces = {"face_landmarker": face_landmarker}
    if settings.raw:
        return {f: Inputs(f, *common, load, **(faces if f == "image" else {})) for f in encodings(settings)}
    if settings.image:
        pictures = -(-settings.frames // every(settings))
        made["image"] = Pictures("image", *common, pictures, load, **faces)
    if settings.flow and not settings.flow.image:
        made["flow"] = FlowGrid(*common, **faces)
    elif settings.flow:
        mover = None
        if settings.flow.source != "dis":
            mover = load(Encoding(settings.flow.source))
            faces |= {f"flow_{what}": value for what, value in mover.provenance.items()}
        made["flow"] = Flows("flow", *common, 0, load, room=store.scratch, mover=mover, **faces)
    if settings.sound:
        made["sound"] = Stage("sound", *common, 1, load)
    return made


def _joined(group: list[Waiting], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and masks of a group, whose shapes agree, as one batch with at least `rows` rows."""
    inputs = np.concatenate([clip.inputs for clip in group])
    mask = np.concatenate([clip.mask for clip in group])
    more = max(0, rows - len(inputs))
    return tuple(np.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) for x in (inputs, mask))

"""Pretrained encoders over many clips: inputs collected into batches, features staged clip by clip in half precision.

On a CPU a clip is a batch; on accelerators short clips share one. The shapes of batches are fixed, so that what a clip
gets does not depend on which others came with it, and a resumed extraction gives what an uninterrupted one gives. Of a
long clip memory holds a block of pictures at a time. Where the preset is raw, the inputs themselves are staged.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from avjax import encoders
from avjax.encoders import images, perceiver
from avjax.features import provenance
from avjax.features.face_video import ENCODED, Raw, flow_ends, seen
from avjax.features.presets import Encoding, Preset, encodings, every
from avjax.features.provenance import Key
from avjax.features.spool import Spool
from avjax.features.store import Store
from avjax.media import flow
from avjax.media.audio import SAMPLE_RATE
from avjax.utils.progress import Stopwatch

if TYPE_CHECKING:
    from avjax.encoders import Encoder

# Clips in a batch, for each accelerator, where clips have few frames.
CLIPS = 16
# Pictures in a batch, where clips have many.
BLOCK = 32
# Pairs in a batch for each accelerator that computes flow; a CPU gains nothing from more than one.
PAIRS = 8


@dataclasses.dataclass(frozen=True)
class Unencoded:
    """A measured clip that an encoder is to see.

    Attributes:
      key: of what will be staged; raw: its inputs; found (t,): which of its frames show the face.
    """

    clip_id: str
    key: Key
    raw: Raw
    found: np.ndarray


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A clip on its way, and its prepared inputs with their mask."""

    clip: Unencoded
    inputs: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Context:
    """What the stages of an extraction share: the preset, the feature store, the clock and the encoders."""

    settings: Preset
    store: Store
    clock: Stopwatch
    load: "Loader"

    def record(self, feature: str, weights: Mapping[str, str]) -> str:
        """Keeps the provenance record of a feature and gives its key."""
        return self.store.record(provenance.described(feature, self.settings, **weights))

    def put(self, feature: str, clip: Unencoded, arrays: Mapping[str, np.ndarray]) -> None:
        """Stages a feature of a clip."""
        with self.clock("writing"):
            self.store.put(clip.clip_id, feature, clip.key, arrays)


class Stage:
    """One encoder of a preset, and the clips that wait for it.

    Args:
      feature: "image", "flow" or "speech"; weights: further provenance.
      rows: of one clip, at most; 0 = any number, and clips do not share a batch.
    Attributes:
      key: of the provenance record of what it stages.
    """

    def __init__(self, feature: str, context: Context, rows: int, **weights: str) -> None:
        self._context, self._feature = context, feature
        self._clock, self._encoding = context.clock, encodings(context.settings)[feature]
        self._encoder = context.load(self._encoding)
        self._name = self._encoding.source
        self.key = context.record(feature, self._encoder.provenance | weights)
        shared = rows and jax.default_backend() != "cpu"
        self._clips = CLIPS * jax.local_device_count() if shared else 1
        self._rows = rows * self._clips if shared else 0
        self._waiting: dict[tuple[int, ...], list[Waiting]] = {}

    def add(self, clip: Unencoded) -> None:
        """Takes a clip; when a batch is full, it is encoded and staged."""
        raw = self._raw(clip)
        if raw is None:
            self._put(clip, np.zeros((0, self._encoder.width)), np.zeros(0, bool))
            return
        with self._clock(self._name):
            inputs, mask = self._encoder.padded(*self._encoder.prepare(raw))
        group = self._waiting.setdefault(inputs.shape[1:], [])
        group.append(Waiting(clip, inputs, mask))
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
            self._put(clip.clip, encoded[rows], real[rows])
            first = rows.stop
        group.clear()

    def _encode(self, inputs: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with self._clock(self._name):
            encoded, real = self._encoder(inputs, mask)

        def exact() -> np.ndarray:
            return self._context.load(self._encoding, "float32")(inputs, mask)[0][real]

        note_precision(self._context.store, self.key, self._encoder, encoded[real], exact)
        return encoded, real

    def _put(self, clip: Unencoded, encoded: np.ndarray, real: np.ndarray) -> None:
        self._context.put(self._feature, clip, self._staged(clip, encoded, real))

    def _raw(self, clip: Unencoded) -> Sequence[np.ndarray] | None:
        """What the encoder prepares of a clip; None where it has nothing."""
        raise NotImplementedError

    def _staged(self, clip: Unencoded, encoded: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
        """What is staged of a clip whose features are `encoded` (rows, …), of which `real` (rows, …) are no padding."""
        raise NotImplementedError


class Speech(Stage):
    """A stage whose raw inputs are the samples of clips."""

    def _raw(self, clip: Unencoded) -> Sequence[np.ndarray] | None:
        return None if clip.raw.samples is None else [clip.raw.samples]

    def _staged(self, clip: Unencoded, encoded: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
        seconds = 0.0 if clip.raw.samples is None else len(clip.raw.samples) / SAMPLE_RATE
        return of_speech(encoded[real], seconds, self._encoding.per_second)


class Pictures(Stage):
    """A stage whose raw inputs are a spool of images (n, h, w, 3) uint8, which it discards."""

    def add(self, clip: Unencoded) -> None:
        if clip.raw.pictures is None or self._clips > 1:
            super().add(clip)
        else:
            encoded = np.concatenate([self._seen(block) for block in clip.raw.pictures.blocks(BLOCK)])
            self._put(clip, encoded, np.ones(len(encoded), bool))
        if clip.raw.pictures:
            clip.raw.pictures.discard()

    def _raw(self, clip: Unencoded) -> Sequence[np.ndarray] | None:
        return clip.raw.pictures and np.concatenate(list(clip.raw.pictures.blocks(BLOCK)))

    def _staged(self, clip: Unencoded, encoded: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
        return of_frames(encoded, seen(clip.found, self._context.settings))

    def _seen(self, pictures: np.ndarray) -> np.ndarray:
        with self._clock(self._name):
            inputs, mask = self._encoder.prepare(pictures)
        return self._encode(inputs, mask)[0]


class Flows(Pictures):
    """A stage whose raw inputs are a spool of flows (n, h, w, 2), or of the pairs of frames (n, 2, h, w, 3) uint8 that
    they are computed of; it sees them drawn, after an image of no motion, which is all that a clip without any has.

    Args:
      mover: computes flows of pairs, None where they come computed.
    """

    def __init__(self, context: Context, mover: encoders.Encoder | None, **weights: str) -> None:
        super().__init__("flow", context, 0, **weights)
        self._mover = mover
        self._still: np.ndarray | None = None

    def add(self, clip: Unencoded) -> None:
        if self._still is None:
            side = self._encoding.side
            self._still = self._seen(flow.draw(np.zeros((1, side, side, 2)), 0.0))
        parts = [self._still]
        if clip.raw.flows:
            moved = self._moved(clip.raw.flows) if self._mover else clip.raw.flows
            with self._clock("flow"):
                spread = flow.spread(moved.blocks(BLOCK))
            parts += [self._seen(pictures) for pictures in self._drawn(moved, spread)]
            moved.discard()
        encoded = np.concatenate(parts)
        self._put(clip, encoded, np.ones(len(encoded), bool))

    def _staged(self, clip: Unencoded, encoded: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
        return of_flow(encoded, clip.found, flow_ends(clip.found, self._context.settings))

    def _moved(self, pairs: Spool) -> Spool:
        batch = 1 if jax.default_backend() == "cpu" else PAIRS * jax.local_device_count()
        flows = Spool.begun(self._context.store.scratch, (*pairs.shape[1:3], 2), np.dtype(ENCODED).name)
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

    Its raw inputs are spools of computed flows (n, h, w, 2).

    Attributes:
      key: as of a `Stage`.
    """

    def __init__(self, context: Context, **weights: str) -> None:
        self.key = context.record("flow", weights)
        self._context, self._settings = context, context.settings

    def add(self, clip: Unencoded) -> None:
        """Takes a clip and stages what becomes of its flows, after that of no motion."""
        raw, side = clip.raw.flows, self._settings.flow.side
        with self._context.clock("flow"):
            still = np.zeros((1, side, side, 2), ENCODED)
            spread = flow.spread(raw.blocks(BLOCK)) if raw else 0.0
            blocks = [still, *(raw.blocks(BLOCK) if raw else ())]
            steps = np.concatenate([flow.grid(block, spread) for block in blocks])
        ends = flow_ends(clip.found, self._settings)
        self._context.put("flow", clip, of_flow(steps, clip.found, ends))
        if raw:
            raw.discard()

    def close(self) -> None:
        """Nothing waits."""


class Inputs:
    """What stands in the place of a `Stage` where the preset is raw: it stages the inputs of an encoder, and runs none.

    Its raw inputs are a spool of images (n, h, w, 3) uint8, which it discards, or samples.

    Attributes:
      key: as of a `Stage`.
    """

    def __init__(self, feature: str, context: Context, **weights: str) -> None:
        encoding = encodings(context.settings)[feature]
        self._encoder, self._side = context.load(encoding, precision(context.settings)), encoding.side
        self.key = context.record(feature, self._encoder.provenance | weights)
        self._name, self._feature, self._context = encoding.source, feature, context

    def add(self, clip: Unencoded) -> None:
        """Takes a clip and stages what the encoder would be given."""
        with self._context.clock(self._name):
            staged = self._images(clip) if self._feature == "image" else {"steps": self._heard(clip.raw.samples)}
        self._context.put(self._feature, clip, staged)

    def _images(self, clip: Unencoded) -> dict[str, np.ndarray]:
        return of_frames(self._framed(clip.raw.pictures), seen(clip.found, self._context.settings))

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

    def _heard(self, samples: np.ndarray | None) -> np.ndarray:
        """Prepared sound with its length first: samples (n, 1), spectra (n, bins)."""
        inputs, _ = self._encoder.prepare([np.zeros(0, np.float32) if samples is None else samples])
        steps = inputs[0].T  # a spectrum's length comes last
        return steps if steps.ndim > 1 else steps[:, None]


class Loader:
    """Loads the encoders of a preset, each once. `random`: see `encoders.load`."""

    def __init__(self, random: bool) -> None:
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
    a = encoded.astype(ENCODED).astype(np.float64)
    b = (encoded if encoder.provenance["dtype"] == "float32" else exact()).astype(np.float64)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    spread = {"least": float(cosine.min()), "mean": float(cosine.mean()), "vectors": len(cosine)}
    store.note(key, {"stored": np.dtype(ENCODED).name, "cosine_to_float32": spread})


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
    load, made = Loader(settings.random), {}
    context, faces = Context(settings, store, clock, load), {"face_landmarker": face_landmarker}
    if settings.raw:
        return {f: Inputs(f, context, **(faces if f == "image" else {})) for f in encodings(settings)}
    if settings.image:
        made["image"] = Pictures("image", context, -(-settings.frames // every(settings)), **faces)
    if settings.flow and not settings.flow.image:
        made["flow"] = FlowGrid(context, **faces)
    elif settings.flow:
        mover = None
        if settings.flow.source != "dis":
            mover = load(Encoding(settings.flow.source))
            faces |= {f"flow_{what}": value for what, value in mover.provenance.items()}
        made["flow"] = Flows(context, mover, **faces)
    if settings.speech:
        made["speech"] = Speech("speech", context, 1)
    return made


def of_frames(encoded: np.ndarray, shown: np.ndarray) -> dict[str, np.ndarray]:
    """What is staged of encoded pictures (k, d): `steps (t, d)`, zeros where `shown (t,)` is False.

    Pictures themselves, (k, h, w, 3) uint8, stay what they are.
    """
    dtype = np.uint8 if encoded.dtype == np.uint8 else ENCODED
    steps = np.zeros((len(shown), *encoded.shape[1:]), dtype)
    steps[shown] = encoded
    return {"steps": steps}


def of_flow(encoded: np.ndarray, found: np.ndarray, ends: np.ndarray) -> dict[str, np.ndarray]:
    """What is staged of encoded flow: `steps (t, d)`, each frame's last flow, zeros where `found (t,)` is False.

    Args:
      encoded: (1 + k, d), first that of no motion, which frames before any flow have.
      ends: (k,), see `flow.ends`.
    """
    steps = encoded[1 + flow.held(ends, len(found))]
    return {"steps": np.where(found[:, None], steps, 0).astype(ENCODED)}


def of_speech(steps: np.ndarray, seconds: float, per_second: int) -> dict[str, np.ndarray]:
    """What is staged of encoded sound: `steps (s, d)`.

    Args:
      steps: (s, d), evenly spaced over `seconds`.
      per_second: averaged to so many a second, the last one over what is left; 0 = as they are.
    """
    if per_second and len(steps):
        each = max(1, round(len(steps) / seconds / per_second))
        starts = np.arange(0, len(steps), each)
        sums = np.add.reduceat(steps, starts, dtype=np.float32)
        steps = sums / np.diff(starts, append=len(steps))[:, None]
    return {"steps": steps.astype(ENCODED)}


def encode_texts(encoder: "Encoder", texts: Sequence[str], max_tokens: int) -> list[np.ndarray]:
    """Token features of each text, (l, d) float32, or (1, d) of an encoder that pools; (0, d) for an empty one.

    Equal texts are encoded once.
    """
    wanted = sorted({t for t in texts if t}, key=lambda t: (len(t), t))
    known = {"": np.zeros((0, encoder.width), np.float32)}
    if wanted:
        tokens, mask = encoder(*encoder.tokenize(wanted, max_tokens))
        if tokens.ndim == 2:  # one vector for each text
            tokens, mask = tokens[:, None], mask[:, None]
        known |= {t: x[m] for t, x, m in zip(wanted, tokens, mask, strict=True)}
    return [known[t] for t in texts]


def tokenize_texts(encoder: "Encoder", texts: Sequence[str], max_tokens: int) -> list[np.ndarray]:
    """Token ids of each text, (l, 1) int32; (0, 1) for an empty one."""
    rows = zip(texts, *encoder.tokenize(texts, max_tokens), strict=True)
    return [ids[mask & bool(text), None] for text, ids, mask in rows]


def _joined(group: list[Waiting], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and masks of a group, whose shapes agree, as one batch with at least `rows` rows."""
    inputs = np.concatenate([clip.inputs for clip in group])
    mask = np.concatenate([clip.mask for clip in group])
    more = max(0, rows - len(inputs))
    return tuple(np.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) for x in (inputs, mask))

"""Pretrained encoders over many clips: inputs collected into batches, features staged clip by clip in half precision.

On a CPU each clip is a batch; on accelerators short clips share one. The shapes of batches are fixed, so that the
features of a clip do not depend on the other clips of its batch, and a resumed extraction equals an uninterrupted one.
Of a long clip, memory holds one block of images at a time. With a raw preset, the inputs themselves are staged.
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

# Clips per batch and accelerator if clips have few frames.
CLIPS = 16
# Images per batch if clips have many.
BLOCK = 32
# Pairs of frames per batch and accelerator for flow; a CPU gains nothing from more than one.
PAIRS = 8


@dataclasses.dataclass(frozen=True)
class Unencoded:
    """A measured clip that is to be encoded.

    Attributes:
      key: of the feature to be staged.
      raw: its inputs.
      present: (t,) bool, which of its frames show the face.
    """

    clip_id: str
    key: Key
    raw: Raw
    present: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A clip that waits for its batch, and its prepared inputs with their mask."""

    clip: Unencoded
    inputs: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Context:
    """The shared objects of all stages of an extraction: preset, feature store, clock and encoders."""

    settings: Preset
    store: Store
    clock: Stopwatch
    load: "Loader"

    def record(self, feature: str, weights: Mapping[str, str]) -> str:
        """Stores the provenance record of a feature and returns its key."""
        return self.store.record(provenance.described(feature, self.settings, **weights))

    def put(self, feature: str, clip: Unencoded, arrays: Mapping[str, np.ndarray]) -> None:
        """Stages a feature of a clip."""
        with self.clock("writing"):
            self.store.put(clip.clip_id, feature, clip.key, arrays)


class Stage:
    """One encoder of a preset, and the clips that wait for it.

    Args:
      feature: "image", "flow" or "speech".
      context: the shared objects of the extraction.
      rows: maximum number of inputs of one clip; 0 = any number, and clips do not share a batch.
      **weights: further provenance.

    Attributes:
      key: of the provenance record of the staged feature.
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
        self._waiting: dict[tuple[int, ...], list[Prepared]] = {}

    def add(self, clip: Unencoded) -> None:
        """Adds a clip; a full batch is encoded and staged."""
        raw = self._raw(clip)
        if raw is None:
            self._put(clip, np.zeros((0, self._encoder.width)), np.zeros(0, bool))
            return
        with self._clock(self._name):
            inputs, mask = self._encoder.padded(*self._encoder.prepare(raw))
        group = self._waiting.setdefault(inputs.shape[1:], [])
        group.append(Prepared(clip, inputs, mask))
        if len(group) == self._clips:
            self._run(group)

    def close(self) -> None:
        """Encodes the clips that still wait."""
        for group in self._waiting.values():
            if group:
                self._run(group)

    def _run(self, group: list[Prepared]) -> None:
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
        """Returns the raw inputs of the encoder for a clip; None if there are none."""
        raise NotImplementedError

    def _staged(self, clip: Unencoded, encoded: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays to stage for features `encoded` (rows, …) of a clip; `real` (rows, …) is no padding."""
        raise NotImplementedError


class Speech(Stage):
    """A stage whose raw inputs are the samples of clips."""

    def _raw(self, clip: Unencoded) -> Sequence[np.ndarray] | None:
        return None if clip.raw.samples is None else [clip.raw.samples]

    def _staged(self, clip: Unencoded, encoded: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
        seconds = 0.0 if clip.raw.samples is None else len(clip.raw.samples) / SAMPLE_RATE
        return of_speech(encoded[real], seconds, self._encoding.per_second)


class Images(Stage):
    """A stage whose raw inputs are a spool of images (n, h, w, 3) uint8, which it discards."""

    def add(self, clip: Unencoded) -> None:
        """Adds a clip, or encodes a clip of any length block by block."""
        if clip.raw.images is None or self._clips > 1:
            super().add(clip)
        else:
            encoded = np.concatenate([self._encode_images(block) for block in clip.raw.images.blocks(BLOCK)])
            self._put(clip, encoded, np.ones(len(encoded), bool))
        if clip.raw.images:
            clip.raw.images.discard()

    def _raw(self, clip: Unencoded) -> Sequence[np.ndarray] | None:
        return clip.raw.images and np.concatenate(list(clip.raw.images.blocks(BLOCK)))

    def _staged(self, clip: Unencoded, encoded: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
        return of_frames(encoded, seen(clip.present, self._context.settings))

    def _encode_images(self, block: np.ndarray) -> np.ndarray:
        with self._clock(self._name):
            inputs, mask = self._encoder.prepare(block)
        return self._encode(inputs, mask)[0]


class Flows(Images):
    """A stage that encodes rendered flows, after an image without motion, which is the only one of a clip without flow.

    Its raw inputs are a spool of flows (n, h, w, 2), or of pairs of frames (n, 2, h, w, 3) uint8, from which
    `flow_encoder` computes them.
    """

    def __init__(self, context: Context, flow_encoder: encoders.Encoder | None, **weights: str) -> None:
        super().__init__("flow", context, 0, **weights)
        self._flow_encoder = flow_encoder
        self._no_motion: np.ndarray | None = None

    def add(self, clip: Unencoded) -> None:
        """Encodes and stages the flows of a clip."""
        if self._no_motion is None:
            side = self._encoding.side
            self._no_motion = self._encode_images(flow.draw(np.zeros((1, side, side, 2)), 0.0))
        parts = [self._no_motion]
        if clip.raw.flows:
            flows = self._computed_flows(clip.raw.flows) if self._flow_encoder else clip.raw.flows
            with self._clock("flow"):
                spread = flow.spread(flows.blocks(BLOCK))
            parts += [self._encode_images(block) for block in self._rendered(flows, spread)]
            flows.discard()
        encoded = np.concatenate(parts)
        self._put(clip, encoded, np.ones(len(encoded), bool))

    def _staged(self, clip: Unencoded, encoded: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
        return of_flow(encoded, clip.present, flow_ends(clip.present, self._context.settings))

    def _computed_flows(self, pairs: Spool) -> Spool:
        batch = 1 if jax.default_backend() == "cpu" else PAIRS * jax.local_device_count()
        flows = Spool.create(self._context.store.scratch, (*pairs.shape[1:3], 2), np.dtype(ENCODED).name)
        for block in pairs.blocks(BLOCK):
            with self._clock("flow"):
                flows.add(perceiver.optical_flow(self._flow_encoder, block[:, 0], block[:, 1], batch=batch))
        pairs.discard()
        return flows

    def _rendered(self, flows: Spool, spread: float) -> Iterator[np.ndarray]:
        for block in flows.blocks(BLOCK):
            with self._clock("flow"):
                rendered = flow.draw(block, spread)
            yield rendered


class FlowGrid:
    """The counterpart of `Flows` that averages flow over a grid (`flow.grid`) instead of rendering and encoding it.

    Its raw inputs are spools of computed flows (n, h, w, 2).

    Attributes:
      key: as of a `Stage`.
    """

    def __init__(self, context: Context, **weights: str) -> None:
        self.key = context.record("flow", weights)
        self._context, self._settings = context, context.settings

    def add(self, clip: Unencoded) -> None:
        """Stages the averaged flows of a clip, after one without motion."""
        raw, side = clip.raw.flows, self._settings.flow.side
        with self._context.clock("flow"):
            no_motion = np.zeros((1, side, side, 2), ENCODED)
            spread = flow.spread(raw.blocks(BLOCK)) if raw else 0.0
            blocks = [no_motion, *(raw.blocks(BLOCK) if raw else ())]
            steps = np.concatenate([flow.grid(block, spread) for block in blocks])
        ends = flow_ends(clip.present, self._settings)
        self._context.put("flow", clip, of_flow(steps, clip.present, ends))
        if raw:
            raw.discard()

    def close(self) -> None:
        """Does nothing: no clip waits."""


class Inputs:
    """The counterpart of a `Stage` for raw presets: it stages the inputs of an encoder and runs none.

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
        """Stages the inputs of the encoder for a clip."""
        with self._context.clock(self._name):
            staged = (
                self._images(clip) if self._feature == "image" else {"steps": self._prepared_audio(clip.raw.samples)}
            )
        self._context.put(self._feature, clip, staged)

    def _images(self, clip: Unencoded) -> dict[str, np.ndarray]:
        return of_frames(self._framed(clip.raw.images), seen(clip.present, self._context.settings))

    def close(self) -> None:
        """Does nothing: no clip waits."""

    def _framed(self, spool: Spool | None) -> np.ndarray:
        """Resizes and crops images to the input size of the encoder, (n, h, w, 3) uint8."""
        if spool is None:
            blank = np.zeros((1, self._side, self._side, 3), np.uint8)
            return images.framed(blank, self._encoder.settings)[:0]
        blocks = [images.framed(block, self._encoder.settings) for block in spool.blocks(BLOCK)]
        spool.discard()
        return np.concatenate(blocks)

    def _prepared_audio(self, samples: np.ndarray | None) -> np.ndarray:
        """Returns prepared audio with time as first axis: samples (n, 1) or spectra (n, bins)."""
        inputs, _ = self._encoder.prepare([np.zeros(0, np.float32) if samples is None else samples])
        steps = inputs[0].T  # the time axis of a spectrum is its last
        return steps if steps.ndim > 1 else steps[:, None]


class Loader:
    """Loads the encoders of a preset, each once; `random` as in `encoders.load`."""

    def __init__(self, random: bool) -> None:
        self._random = random
        self._loaded: dict[tuple[Encoding, str | None], encoders.Encoder] = {}

    def __call__(self, wanted: Encoding, dtype: str | None = None) -> encoders.Encoder:
        """Returns an encoder that computes in `dtype`, by default its own."""
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
    """Adds the deviation of stored features from full float32 to the provenance record `key`, once.

    `encoded` (n, d) are the features of the first batch from `encoder`; `exact` computes them in float32 and is called
    only if the encoder computes in another precision.
    """
    if not len(encoded) or store.noted(key):
        return
    a = encoded.astype(ENCODED).astype(np.float64)
    b = (encoded if encoder.provenance["dtype"] == "float32" else exact()).astype(np.float64)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    spread = {"least": float(cosine.min()), "mean": float(cosine.mean()), "vectors": len(cosine)}
    store.note(key, {"stored": np.dtype(ENCODED).name, "cosine_to_float32": spread})


def precision(settings: Preset) -> str | None:
    """Returns the dtype in which to load a preset's encoders, None for their default.

    Inputs of encoders, and so their provenance, do not depend on the precision.
    """
    return "float32" if settings.raw else None


def stages(
    settings: Preset, store: Store, clock: Stopwatch, face_landmarker: str
) -> dict[str, Stage | FlowGrid | Inputs]:
    """Makes the stages of images, flow and audio that a preset has: feature → stage.

    Raises:
      AvjaxError: weights are not available.
    """
    load, made = Loader(settings.random), {}
    context, faces = Context(settings, store, clock, load), {"face_landmarker": face_landmarker}
    if settings.raw:
        return {f: Inputs(f, context, **(faces if f == "image" else {})) for f in encodings(settings)}
    if settings.image:
        made["image"] = Images("image", context, -(-settings.frames // every(settings)), **faces)
    if settings.flow and not settings.flow.image:
        made["flow"] = FlowGrid(context, **faces)
    elif settings.flow:
        flow_encoder = None
        if settings.flow.source != "dis":
            flow_encoder = load(Encoding(settings.flow.source))
            faces |= {f"flow_{what}": value for what, value in flow_encoder.provenance.items()}
        made["flow"] = Flows(context, flow_encoder, **faces)
    if settings.speech:
        made["speech"] = Speech("speech", context, 1)
    return made


def of_frames(encoded: np.ndarray, shown: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the arrays to stage for encoded images (k, d): `steps (t, d)`, zeros where `shown (t,)` is False.

    Images themselves, (k, h, w, 3) uint8, stay as they are.
    """
    dtype = np.uint8 if encoded.dtype == np.uint8 else ENCODED
    steps = np.zeros((len(shown), *encoded.shape[1:]), dtype)
    steps[shown] = encoded
    return {"steps": steps}


def of_flow(encoded: np.ndarray, present: np.ndarray, ends: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the arrays to stage for encoded flow: `steps (t, d)`, the last flow at each frame.

    Args:
      encoded: (1 + k, d), the first without motion, for frames before any flow.
      present: (t,) bool, which frames show the face; the others get zeros.
      ends: (k,), see `flow.ends`.
    """
    steps = encoded[1 + flow.held(ends, len(present))]
    return {"steps": np.where(present[:, None], steps, 0).astype(ENCODED)}


def of_speech(steps: np.ndarray, seconds: float, per_second: int) -> dict[str, np.ndarray]:
    """Returns the arrays to stage for encoded audio: `steps (s, d)`.

    Args:
      steps: (s, d), evenly spaced over `seconds`.
      seconds: duration of the audio.
      per_second: the rate to which steps are averaged, the last one over the remainder; 0 = their own.
    """
    if per_second and len(steps):
        each = max(1, round(len(steps) / seconds / per_second))
        starts = np.arange(0, len(steps), each)
        sums = np.add.reduceat(steps, starts, dtype=np.float32)
        steps = sums / np.diff(starts, append=len(steps))[:, None]
    return {"steps": steps.astype(ENCODED)}


def encode_texts(encoder: "Encoder", texts: Sequence[str], max_tokens: int) -> list[np.ndarray]:
    """Computes token features of each text, (l, d) float32, or (1, d) if the encoder pools; (0, d) for an empty text.

    Equal texts are encoded once.
    """
    wanted = sorted({t for t in texts if t}, key=lambda t: (len(t), t))
    features = {"": np.zeros((0, encoder.width), np.float32)}
    if wanted:
        tokens, mask = encoder(*encoder.tokenize(wanted, max_tokens))
        if tokens.ndim == 2:  # one vector for each text
            tokens, mask = tokens[:, None], mask[:, None]
        features |= {t: x[m] for t, x, m in zip(wanted, tokens, mask, strict=True)}
    return [features[t] for t in texts]


def tokenize_texts(encoder: "Encoder", texts: Sequence[str], max_tokens: int) -> list[np.ndarray]:
    """Returns the token ids of each text, (l, 1) int32; (0, 1) for an empty one."""
    rows = zip(texts, *encoder.tokenize(texts, max_tokens), strict=True)
    return [ids[mask & bool(text), None] for text, ids, mask in rows]


def _joined(group: list[Prepared], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Joins the inputs and masks of a group, of equal shapes, into one batch of at least `rows` rows."""
    inputs = np.concatenate([clip.inputs for clip in group])
    mask = np.concatenate([clip.mask for clip in group])
    more = max(0, rows - len(inputs))
    return tuple(np.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) for x in (inputs, mask))

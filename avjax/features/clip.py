"""One clip → its features: the only path, shared by everything that turns clips into arrays.

A preset (`avjax.features.presets`) says what is measured. Video and audio are measured clip by clip (`measure`), each
decoded once for all that is made of it; the sentence needs, beside its clip, the speaker's usual pitch
(`speaker_pitch`), so sentences are made when all clips were measured (`describe`).
"""

import dataclasses
import hashlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from avjax.datasets.base import Clip
from avjax.errors import UnusableMedia
from avjax.features import avtca_window
from avjax.features.presets import Preset, every
from avjax.features.spool import Spool
from avjax.media import audio, faces, flow, video
from avjax.text import action_units, prosody, template
from avjax.utils.progress import Stopwatch

# Raised when a change of code changes what is measured: part of every staged file's key.
CODE_VERSION = {"video": 2, "audio": 3, "image": 2, "flow": 1, "sound": 1, "window": 1, "text": 2}
# Sources of the `text` feature: the three of the template, and one fixed sentence for the "w/o ETG" ablation.
TEXTS = (*template.SOURCES, "constant")
# Below so many of a speaker's clips with voice, the median says nothing about what is usual; fixed bounds then.
_ENOUGH_CLIPS = 3
# What encoders give is stored in half precision; what is measured stays in single precision.
ENCODED = np.float16
# The features that are, of a preset that is `raw`, the inputs of an encoder.
_INPUTS = ("image", "sound", "text")


def provenance(feature: str, settings: Preset, **weights: str) -> dict[str, object]:
    """What a `feature` (a key of CODE_VERSION) of a clip depends on beside the clip itself."""
    used = {
        "video": ("frames",) if settings.frames else ("frames", "max_seconds"),
        "audio": ("steps_per_second", "max_seconds"),
        "image": ("frames", "image") if settings.frames else ("frames", "max_seconds", "image"),
        "flow": ("frames", "max_seconds", "flow"),
        "sound": ("max_seconds", "sound"),
        "window": ("window",),
        "text": ("text", "max_tokens"),
    }[feature]
    everything = dataclasses.asdict(settings)
    if settings.raw and feature in _INPUTS:
        used += ("raw",)
    return {
        "feature": feature,
        "code": CODE_VERSION[feature],
        "settings": {k: everything[k] for k in used},
        "weights": weights,
    }


def source_key(clip: Clip) -> str:
    """A short hash that changes when another file, or another part of it, becomes the clip.

    A file is told from another by name, size and time of change, as `make` and `rsync` do.

    Raises:
      OSError: a file of the clip is not there.
    """
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in (clip.path, clip.audio) if p]
    return hashlib.sha256(repr([files, clip.start, clip.end]).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Raw:
    """What encoders are given of a clip; None where there is nothing.

    `pictures` (k, h, w, 3) uint8: the frames that are `seen`, or the faces in them. `flows` (n, side, side, 2) float16,
    or the pairs of frames (n, 2, side, side, 3) uint8 that flow is to be computed of: those that lead to `flow_ends`.
    `samples` (n,) float32 at 16 kHz: the sound without the digital silence before and after it.
    """

    pictures: Spool | None = None
    flows: Spool | None = None
    samples: np.ndarray | None = None

    def discard(self) -> None:
        """Removes the spools."""
        for spool in filter(None, (self.pictures, self.flows)):
            spool.discard()


@dataclasses.dataclass(frozen=True)
class Instruments:
    """What clips are measured with.

    Attributes:
      settings: the preset; tracker: finds faces; clock: counts the seconds of decoding, faces, flow and acoustics.
      scratch: a folder for the spools of `Raw`, which whoever takes them is to discard.
    """

    settings: Preset
    tracker: faces.FaceTracker
    clock: Stopwatch
    scratch: Path


def measure(
    clip: Clip,
    instruments: Instruments,
    staged: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    wanted: Container[str] = (),
) -> tuple[dict[str, dict[str, np.ndarray]], Raw]:
    """Measures video and audio of a clip. What it lacks has no steps, and its `why` says so.

    Args:
      staged: "video", "audio", "window" → what was measured before, which is not measured again.
      wanted: "image", "flow", "sound": what is to be encoded, and so is handed out as `Raw`.
    Returns:
      video: `video (t, d)`, `video_mask (t,)`, `au (t, a)`, `boxes (t, 4)` of the faces in pixels, `times (t,)` seconds
      from the clip's start; audio: `audio (s, d)`, `audio_mask (s,)`, `seconds ()`, `inside (2,)`, where sound begins
      and ends in samples, `prosody (3,)` = median F0 in Hz, syllables per second, stress in dB, 0 where not measurable,
      `surface (2,)` as `audio.surface`; both: `why ()`, "" where nothing is lacking; window, where the preset has one:
      as `avtca_window.Cut.measured`. And what encoders need.
    Raises:
      UnusableMedia: neither video nor audio.
    """
    staged, lacking, raw = staged or {}, [], Raw()
    settings = instruments.settings
    cut = None
    if settings.window and "window" not in staged:
        cut = avtca_window.Cut(settings.window, clip.start or 0.0)
    try:
        picture, raw = _picture(clip, instruments, staged.get("video"), wanted, cut)
    except UnusableMedia as error:
        lacking.append(str(error))
        picture = _no_picture(str(error))
    try:
        sound, samples = _sound(clip, instruments, staged.get("audio"), "sound" in wanted, cut)
    except UnusableMedia as error:
        lacking.append(str(error))
        sound, samples = _no_sound(str(error)), None
    if len(lacking) == 2:
        raise UnusableMedia("; ".join(dict.fromkeys(lacking)))
    made = {"video": picture, "audio": sound}
    if settings.window:
        made["window"] = staged.get("window") or cut.measured(
            instruments.tracker, instruments.clock, _sounding(sound, settings)
        )
    return made, dataclasses.replace(raw, samples=samples)


def _sounding(sound: Mapping[str, np.ndarray], settings: Preset) -> tuple[float, float]:
    """When sound begins and ends, in seconds; without an end where no more of it was measured."""
    first, last = sound["inside"] / audio.SAMPLE_RATE
    return first, last if last < settings.max_seconds else np.inf


def _picture(
    clip: Clip,
    instruments: Instruments,
    staged: Mapping[str, np.ndarray] | None,
    wanted: Container[str],
    cut: avtca_window.Cut | None,
) -> tuple[Mapping[str, np.ndarray], Raw]:
    """Face measurements of the frames, those without a face masked; and pictures and flows, if wanted.

    The frames are decoded once, block by block, and shared with the window `cut`.
    """
    viewers = {"faces": _FaceVideo(clip, instruments, staged, wanted)}
    if staged and not viewers["faces"].needs(staged["video_mask"]):
        del viewers["faces"]
    if cut:
        viewers["window"] = cut
    try:
        _look(clip, instruments, viewers)
    except UnusableMedia:
        if cut:
            cut.lose()
        if "faces" in viewers:
            raise
    return viewers["faces"].measured() if "faces" in viewers else (staged, Raw())


def _look(clip: Clip, instruments: Instruments, viewers: Mapping[str, object]) -> None:
    """Shows the viewers the frames that they choose."""
    if not viewers:
        return
    choices = {name: viewer.choose for name, viewer in viewers.items()}
    span = {"start": clip.start or 0.0, "end": _end(clip, instruments.settings)}
    for blocks in _timed(video.passes(clip.path, choices, **span), instruments.clock):
        for name, frames in _timed(blocks, instruments.clock):
            viewers[name].take(frames)


def _end(clip: Clip, settings: Preset) -> float | None:
    """Where a clip ends on its clock; long ones are cut where every frame is taken."""
    if settings.frames:
        return clip.end
    return min(filter(None, (clip.end, (clip.start or 0.0) + settings.max_seconds)))


def _timed(items: Iterator, clock: Stopwatch) -> Iterator:
    """Passes on what decoding gives."""
    while True:
        with clock("decoding"):
            item = next(items, None)
        if item is None:
            return
        yield item


class _FaceVideo:
    """Measures the face in the frames of a clip, and collects what encoders are to see of them; see `measure`."""

    def __init__(
        self,
        clip: Clip,
        instruments: Instruments,
        staged: Mapping[str, np.ndarray] | None,
        wanted: Container[str],
    ):
        self._begin, self._staged = clip.start or 0.0, staged
        self._instruments, self._wanted = instruments, wanted
        self._show = _Show(instruments, wanted)

    def needs(self, found: np.ndarray) -> bool:
        """Whether encoders have anything to see in frames of which `found` show the face."""
        return self._show.needs(found)

    def choose(self, times: np.ndarray, over: float) -> np.ndarray:
        """Begins anew: a `video.Choice`."""
        self._show.raw().discard()
        self._show = _Show(self._instruments, self._wanted)
        self._found, self._times, self._count = [], [], 0
        count = self._instruments.settings.frames
        return (video.spread(count) if count else video.every_frame)(times, over)

    def take(self, frames: video.Frames) -> None:
        part = slice(self._count, self._count + len(frames.times))
        self._count = part.stop
        if self._staged:
            mask, boxes = self._staged["video_mask"][part], self._staged["boxes"][part]
        else:
            with self._instruments.clock("faces"):
                before = self._found[-1] if self._found else None
                self._found.append(self._instruments.tracker.track(frames, before))
            mask, boxes = self._found[-1].found, self._found[-1].boxes
            self._times.append(frames.times - self._begin)
        self._show.take(frames, mask, boxes)

    def measured(self) -> tuple[Mapping[str, np.ndarray], Raw]:
        if self._staged:
            return self._staged, self._show.raw()
        return _face_measurements(faces.joined(self._found), np.concatenate(self._times)), self._show.raw()


class _Show:
    """Collects, block by block, what the encoders of picture and flow are to see of a clip's frames."""

    def __init__(self, instruments: Instruments, wanted: Container[str]):
        self._settings, self._clock, self._scratch = instruments.settings, instruments.clock, instruments.scratch
        self._image = self._settings.image if "image" in wanted else None
        self._flow = self._settings.flow if "flow" in wanted else None
        self._pictures = self._flows = None
        self._count, self._before = 0, None

    def needs(self, found: np.ndarray) -> bool:
        """Whether there is anything to see in frames of which `found` show the face."""
        return bool((self._image and seen(found, self._settings).any()) or (self._flow and found.any()))

    def take(self, frames: video.Frames, found: np.ndarray, boxes: np.ndarray) -> None:
        """The next frames, which of them show the face, and where."""
        if self._image:
            with self._clock("faces"):
                self._see(frames, found, boxes)
        if self._flow:
            with self._clock("flow"):
                self._move(frames, found, boxes)
        self._count += len(found)

    def raw(self) -> Raw:
        return Raw(self._pictures, self._flows)

    def _see(self, frames: video.Frames, found: np.ndarray, boxes: np.ndarray) -> None:
        turn = (np.arange(len(found)) + self._count) % self._image.every == 0
        if self._image.sees == "frame":
            pictures = video.shrunk(frames.images[turn], self._image.side)
        else:
            pictures = faces.crops(frames, turn & found, boxes, self._image.side)[turn & found]
        self._pictures = self._piled(self._pictures, pictures)

    def _move(self, frames: video.Frames, found: np.ndarray, boxes: np.ndarray) -> None:
        f = self._flow
        before = frames.images[:0] if self._before is None else self._before
        images = np.concatenate([before, frames.images])
        self._before = images[-f.window :]
        # Of these frames, those that a flow leads to; earlier ones have had theirs.
        at = flow.ends(np.concatenate([np.zeros(self._count, bool), found]), f.window, f.stride) - self._count
        every_one = np.ones(len(at), bool)
        earlier, later = (
            faces.crops(video.Frames(images[len(before) + at - back], frames.times[at]), every_one, boxes[at], f.side)
            for back in (f.window, 0)
        )
        made = flow.dis(earlier, later).astype(ENCODED) if f.source == "dis" else np.stack([earlier, later], 1)
        self._flows = self._piled(self._flows, made)

    def _piled(self, pile: Spool | None, arrays: np.ndarray) -> Spool | None:
        if pile is None and len(arrays):
            pile = Spool.begun(self._scratch, arrays.shape[1:], arrays.dtype.name)
        if pile is not None:
            pile.add(arrays)
        return pile


def seen(found: np.ndarray, settings: Preset) -> np.ndarray:
    """Which steps of the stream `video` show what its encoder is to see; `found (t,)`: which frames show the face."""
    found = found[:: every(settings)]
    return np.ones_like(found) if settings.image and settings.image.sees == "frame" else found


def flow_ends(found: np.ndarray, settings: Preset) -> np.ndarray:
    """The frames that flows lead to (`flow.ends`); none where the preset has no flow."""
    return flow.ends(found, settings.flow.window, settings.flow.stride) if settings.flow else np.zeros(0, int)


def _face_measurements(found: faces.Faces, times: np.ndarray) -> dict[str, np.ndarray]:
    """Blendshapes, action units and head pose."""
    units = faces.action_units(found.blendshapes, found.found)
    return {
        "video": np.concatenate([found.blendshapes, units, found.pose], -1).astype(np.float32),
        "video_mask": found.found,
        "au": units,
        "boxes": found.boxes,
        "times": times,
        "why": np.array("" if found.found.any() else "no face in any frame"),
    }


def _sound(
    clip: Clip,
    instruments: Instruments,
    staged: Mapping[str, np.ndarray] | None,
    wanted: bool,
    cut: avtca_window.Cut | None,
) -> tuple[Mapping[str, np.ndarray], np.ndarray | None]:
    """Acoustic measurements and prosody; and the samples, if wanted, without silence before and after the sound.

    The audio is decoded once and shared with the window `cut`.
    """
    settings, samples = instruments.settings, None
    if not staged or (wanted and staged["audio_mask"].any()):
        samples = audio.Sampling(max_seconds=settings.max_seconds)
    try:
        heard = _listen(clip, instruments.clock, samples, cut)
    except UnusableMedia:
        if samples:
            raise
    if not samples:
        return staged, None
    with instruments.clock("acoustics"):
        sound = staged or _acoustic_measurements(heard, settings)
    first, last = sound["inside"]
    return sound, heard[first:last] if wanted and first < last else None


def _listen(
    clip: Clip, clock: Stopwatch, sampling: audio.Sampling | None, cut: avtca_window.Cut | None
) -> np.ndarray | None:
    """The samples (n,) of a clip, if asked for; the window gets its own."""
    start, samplings = clip.start or 0.0, [s for s in (sampling, cut and cut.sampling) if s]
    if not samplings:
        return None
    with clock("decoding"):
        heard = audio.read_sounds(clip.audio or clip.path, samplings, start=start, end=clip.end)
    if cut:
        cut.samples = heard[-1]
    if sampling and not heard[0].size:
        raise UnusableMedia(audio.nothing_decoded(start, clip.end))
    return heard[0]


def _acoustic_measurements(samples: np.ndarray, settings: Preset) -> dict[str, np.ndarray]:
    """Acoustic features at a low rate, and prosody; digital silence before and after the sound is masked."""
    analysis = audio.analyse(samples)
    steps = audio.acoustic(analysis, settings.steps_per_second)
    spoken = audio.prosody(analysis)
    numbers = (spoken.f0_median_hz, spoken.syllables_per_second, spoken.stress_db)
    hops = np.flatnonzero(analysis.inside)
    inside = (hops[0], hops[-1] + 1) if hops.size else (0, 0)
    return {
        "audio": steps.features,
        "audio_mask": steps.mask,
        "prosody": np.array([n or 0.0 for n in numbers], np.float32),
        "surface": np.array(audio.surface(analysis), np.float32),
        "seconds": np.array(len(samples) / audio.SAMPLE_RATE),
        "inside": np.minimum(np.array(inside) * audio.SAMPLE_RATE // audio.HOPS_PER_SECOND, len(samples)),
        "why": np.array("" if steps.mask.any() else "digital silence"),
    }


def _no_picture(why: str) -> dict[str, np.ndarray]:
    units = len(faces.AU_NAMES)
    return {
        "video": np.zeros((0, len(faces.BLENDSHAPES) + units + 6), np.float32),
        "video_mask": np.zeros(0, bool),
        "au": np.zeros((0, units), np.float32),
        "boxes": np.zeros((0, 4), np.float32),
        "times": np.zeros(0),
        "why": np.array(why),
    }


def _no_sound(why: str) -> dict[str, np.ndarray]:
    width = len(audio.ACOUSTIC_NAMES)
    return {
        "audio": np.zeros((0, width), np.float32),
        "audio_mask": np.zeros(0, bool),
        "prosody": np.zeros(3, np.float32),
        "surface": np.array((0.0, audio.FLOOR_DB), np.float32),
        "seconds": np.array(0.0),
        "inside": np.zeros(2, int),
        "why": np.array(why),
    }


def speaker_pitch(clips: Iterable[tuple[str | None, float]]) -> dict[str, float]:
    """The usual pitch of each speaker: the median over clips of their median F0, without any label.

    Args:
      clips: (speaker or None, median F0 in Hz or 0) of every clip.
    """
    pitches: dict[str, list[float]] = {}
    for speaker, f0 in clips:
        if speaker and f0 > 0:
            pitches.setdefault(speaker, []).append(f0)
    return {s: float(np.median(v)) for s, v in pitches.items() if len(v) >= _ENOUGH_CLIPS}


def describe(
    picture: Mapping[str, np.ndarray],
    sound: Mapping[str, np.ndarray],
    transcript: str | None,
    usual_pitch: float | None,
) -> dict[str, str]:
    """The sentence of a clip for every source of the template; "" where a source knows nothing."""
    f0, rate, stress = (float(v) or None for v in sound["prosody"])
    parts = template.Parts(
        face=action_units.describe(picture["au"], picture["video_mask"], faces.AU_NAMES),
        transcript=transcript,
        rate=prosody.rate_word(rate),
        pitch=prosody.pitch_word(f0, usual_pitch),
        stress=prosody.stress_word(stress),
    )
    return {source: template.sentence(parts, source) for source in template.SOURCES}


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


def of_sound(steps: np.ndarray, seconds: float, per_second: int) -> dict[str, np.ndarray]:
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


def encode_texts(encoder, texts: Sequence[str], max_tokens: int) -> list[np.ndarray]:
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


def tokenize_texts(encoder, texts: Sequence[str], max_tokens: int) -> list[np.ndarray]:
    """Token ids of each text, (l, 1) int32; (0, 1) for an empty one."""
    rows = zip(texts, *encoder.tokenize(texts, max_tokens), strict=True)
    return [ids[mask & bool(text), None] for text, ids, mask in rows]


def example(
    clip: Clip,
    settings: Preset,
    staged: Mapping[str, Mapping[str, np.ndarray]],
    sentences: Mapping[str, str],
) -> dict[str, object]:
    """The record of a clip in the packed view.

    Args:
      staged: "video", "audio", "text" and, where the preset has them, "image", "flow", "sound" and "window".
    Returns:
      The streams `video`, `audio` and, where there is one, `flow` with their masks, `text` and `sentence` by source,
      and what was measured: `prosody` as in `measure`, `duration` in seconds; `surface (3,)` = duration, lead-in,
      loudness: what a model could guess from without seeing or hearing anybody.
    """
    picture, sound = staged["video"], staged["audio"]
    duration = np.float32(max(picture["times"].max(initial=0.0), sound["seconds"]))
    shown = slice(None, None, every(settings))
    return {
        "clip_id": clip.id,
        "label": clip.label if isinstance(clip.label, str) else np.array(clip.label, np.float32),
        "speaker": clip.speaker or "",
        "duration": duration,
        **_streams(settings, staged, shown),
        "au": picture["au"][shown],
        "times": picture["times"][shown],
        "prosody": sound["prosody"],
        "surface": np.array([duration, *sound["surface"]], np.float32),
        "sentence": {s: sentences[s] for s in TEXTS},
        "text": {s: staged["text"][s] for s in TEXTS},
    }


def _streams(settings: Preset, staged: Mapping[str, Mapping[str, np.ndarray]], shown: slice) -> dict[str, np.ndarray]:
    if settings.window:
        return avtca_window.streams(staged["window"])
    found = staged["video"]["video_mask"]
    steps, mask = _audio_stream(staged)
    streams = {
        "video": _video_stream(staged, shown, settings.face),
        "video_mask": seen(found, settings),
        "audio": steps,
        "audio_mask": mask,
    }
    if settings.flow:
        # On the time base of `video`: the two are weighed against each other step by step.
        streams |= {"flow": staged["flow"]["steps"][shown], "flow_mask": found[shown]}
    return streams


def _video_stream(staged: Mapping[str, Mapping[str, np.ndarray]], shown: slice, face: bool) -> np.ndarray:
    """(t, d): the image encoder's features, the face measurements, or both side by side; or the encoder's pictures."""
    measured = staged["video"]["video"][shown]
    if "image" not in staged:
        return measured
    steps = staged["image"]["steps"]
    return np.concatenate([steps, measured.astype(ENCODED)], -1) if face else steps


def _audio_stream(staged: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(s, d) and its mask (s,)."""
    if "sound" not in staged:
        return staged["audio"]["audio"], staged["audio"]["audio_mask"]
    steps = staged["sound"]["steps"]
    return steps, np.ones(len(steps), bool)


def landmarker() -> Path:
    """The face landmarker's file, fetched once."""
    from avjax.encoders import weights

    return weights.fetch("face_landmarker")

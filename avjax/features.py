"""One clip → its features: the only path, shared by everything that turns clips into arrays.

A preset says what is measured. Picture and sound are measured clip by clip (`measure`); the sentence needs, beside its
clip, the speaker's usual pitch (`speaker_pitch`), so sentences are made when all clips were measured (`describe`).
"""

import dataclasses
import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from avjax.datasets.base import Clip
from avjax.errors import AvjaxError, UnusableMedia
from avjax.media import audio, faces, video
from avjax.progress import Stopwatch
from avjax.text import action_units, prosody, template

# Raised when a change of code changes what is measured: part of every staged file's key.
CODE_VERSION = {"video": 2, "audio": 3, "image": 1, "sound": 1, "text": 2}
# Sources of the `text` feature: the three of the template, and one fixed sentence for the "w/o ETG" ablation.
TEXTS = (*template.SOURCES, "constant")
# Below so many of a speaker's clips with voice, the median says nothing about what is usual; fixed bounds then.
_ENOUGH_CLIPS = 3
# Pixels of a side of the face crops that image encoders are given; their own preprocessing goes on from there.
CROP = 256
# What encoders give is stored in half precision; what is measured stays in single precision.
ENCODED = np.float16


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A pretrained encoder and what is kept of it.

    Attributes:
      source, layer, pool: see `encoders.load`.
      every: of the frames, each so many-th is encoded.
      per_second: steps of sound are averaged to so many a second; 0 = as the encoder gives them.
    """

    source: str
    layer: int | None = None
    pool: str | None = None
    every: int = 1
    per_second: int = 0


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is extracted.

    Attributes:
      frames: at most so many evenly spaced video frames.
      steps_per_second: steps of the acoustic measurements; max_seconds: longer sound is cut there.
      image: encoder of the face in each frame, the stream `video`; None = the face measurements alone.
      face: whether face measurements (blendshapes, action units, pose) stand beside the image encoder's features.
      sound: encoder of the sound, the stream `audio`; None = acoustic measurements.
      text: encoder of the sentences; max_tokens: longer ones are cut.
    """

    frames: int = 16
    steps_per_second: int = 10
    max_seconds: float = 60.0
    image: Encoding | None = None
    face: bool = True
    sound: Encoding | None = None
    text: Encoding = Encoding("minilm")
    max_tokens: int = 128


PRESETS = {
    # Blendshapes, action units and head pose; `audio.acoustic`; MiniLM's tokens.
    "lite": Preset(),
    # Encoders that can be had without the hub. Layers chosen on held-out training speakers (README): Whisper's middle
    # is .13 above its end; for the picture layers 9 to 12 are alike, the tenth spares two, and half the frames do.
    "open": Preset(
        image=Encoding("vit_s14", layer=10, pool="first", every=2),
        sound=Encoding("whisper_base", layer=3, per_second=10),
    ),
    # The paper's (specification of the systems, section 1, "Features").
    "etg": Preset(
        frames=8,
        image=Encoding("vit_b16", pool="first"),
        face=False,
        sound=Encoding("data2vec_audio"),
        text=Encoding("distilbert"),
    ),
}


def preset(name: str) -> Preset:
    """Looks a preset up.

    Raises:
      AvjaxError: no preset has that name.
    """
    if name not in PRESETS:
        raise AvjaxError(f"preset is {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def encodings(settings: Preset) -> dict[str, Encoding]:
    """The encoders of picture and sound that a preset has: feature → encoder."""
    both = {"image": settings.image, "sound": settings.sound}
    return {feature: encoding for feature, encoding in both.items() if encoding}


def every(settings: Preset) -> int:
    """Of the measured frames each so many-th is a step of the stream `video`."""
    return settings.image.every if settings.image else 1


def provenance(feature: str, settings: Preset, **weights: str) -> dict[str, object]:
    """What a `feature` (a key of CODE_VERSION) of a clip depends on beside the clip itself."""
    used = {
        "video": ("frames",),
        "audio": ("steps_per_second", "max_seconds"),
        "image": ("frames", "image"),
        "sound": ("max_seconds", "sound"),
        "text": ("text", "max_tokens"),
    }[feature]
    everything = dataclasses.asdict(settings)
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
    """What encoders are given of a clip.

    `crops` (k, CROP, CROP, 3) uint8: the face in those of the frames to encode that show one; `samples` (n,) float32 at
    16 kHz: the sound without the digital silence before and after it. None where there is nothing.
    """

    crops: np.ndarray | None
    samples: np.ndarray | None


def measure(
    clip: Clip,
    settings: Preset,
    tracker: faces.FaceTracker,
    clock: Stopwatch,
    staged: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    wanted: Container[str] = (),
) -> tuple[dict[str, dict[str, np.ndarray]], Raw]:
    """Measures picture and sound of a clip. What it lacks has no steps, and its `why` says so.

    Args:
      clock: is told how long decoding, faces and acoustics take.
      staged: "video", "audio" → what was measured before, which is not measured again.
      wanted: "image", "sound": what is to be encoded, and so is handed out as `Raw`.
    Returns:
      video: `video (t, d)`, `video_mask (t,)`, `au (t, a)`, `boxes (t, 4)` of the faces in pixels, `times (t,)` seconds
      from the clip's start; audio: `audio (s, d)`, `audio_mask (s,)`, `seconds ()`, `inside (2,)`, where sound begins
      and ends in samples, `prosody (3,)` = median F0 in Hz, syllables per second, stress in dB, 0 where not measurable,
      `surface (2,)` as `audio.surface`; both: `why ()`, "" where nothing is lacking. And what encoders need.
    Raises:
      UnusableMedia: neither picture nor sound.
    """
    staged, lacking = staged or {}, []
    try:
        picture, crops = _picture(clip, settings, tracker, clock, staged.get("video"), "image" in wanted)
    except UnusableMedia as error:
        lacking.append(str(error))
        picture, crops = _no_picture(str(error)), None
    try:
        sound, samples = _sound(clip, settings, clock, staged.get("audio"), "sound" in wanted)
    except UnusableMedia as error:
        lacking.append(str(error))
        sound, samples = _no_sound(str(error)), None
    if len(lacking) == 2:
        raise UnusableMedia("; ".join(dict.fromkeys(lacking)))
    return {"video": picture, "audio": sound}, Raw(crops, samples)


def _picture(
    clip, settings, tracker, clock, staged, wanted: bool
) -> tuple[Mapping[str, np.ndarray], np.ndarray | None]:
    """Face measurements of evenly spaced frames, those without a face masked; and crops of the others, if wanted."""
    if staged and not (wanted and staged["video_mask"].any()):
        return staged, None
    with clock("decoding"):
        frames = video.read_frames(clip.path, count=settings.frames, start=clip.start or 0.0, end=clip.end)
    with clock("faces"):
        picture = staged or _face_measurements(clip, frames, tracker)
        shown = picture["video_mask"] & (np.arange(len(frames.times)) % every(settings) == 0)
        crops = faces.crops(frames, shown, picture["boxes"], CROP)[shown] if wanted and shown.any() else None
    return picture, crops


def _face_measurements(clip: Clip, frames: video.Frames, tracker: faces.FaceTracker) -> dict[str, np.ndarray]:
    """Blendshapes, action units and head pose."""
    found = tracker.track(frames)
    units = faces.action_units(found.blendshapes, found.found)
    return {
        "video": np.concatenate([found.blendshapes, units, found.pose], -1).astype(np.float32),
        "video_mask": found.found,
        "au": units,
        "boxes": found.boxes,
        "times": frames.times - (clip.start or 0.0),
        "why": np.array("" if found.found.any() else "no face in any frame"),
    }


def _sound(clip, settings, clock, staged, wanted: bool) -> tuple[Mapping[str, np.ndarray], np.ndarray | None]:
    """Acoustic measurements and prosody; and the samples, if wanted, without silence before and after the sound."""
    if staged and not (wanted and staged["audio_mask"].any()):
        return staged, None
    with clock("decoding"):
        samples = audio.read_sound(
            clip.audio or clip.path, start=clip.start or 0.0, end=clip.end, max_seconds=settings.max_seconds
        )
    with clock("acoustics"):
        sound = staged or _acoustic_measurements(samples, settings)
    first, last = sound["inside"]
    return sound, samples[first:last] if wanted and first < last else None


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


def of_frames(crops: np.ndarray, found: np.ndarray) -> dict[str, np.ndarray]:
    """What is staged of encoded crops: `steps (t, d)`, zeros where `found (t,)` is False; `crops` are (k, d)."""
    steps = np.zeros((len(found), crops.shape[-1]), ENCODED)
    steps[found] = crops
    return {"steps": steps}


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
    """Token features of each text, (l, d) float32; (0, d) for an empty one. Equal texts are encoded once."""
    wanted = sorted({t for t in texts if t}, key=lambda t: (len(t), t))
    known = {"": np.zeros((0, encoder.width), np.float32)}
    if wanted:
        ids, mask = encoder.tokenize(wanted, max_tokens)
        tokens, _ = encoder(ids, mask)
        known |= {t: x[m] for t, x, m in zip(wanted, tokens, mask, strict=True)}
    return [known[t] for t in texts]


def example(
    clip: Clip,
    settings: Preset,
    staged: Mapping[str, Mapping[str, np.ndarray]],
    sentences: Mapping[str, str],
) -> dict[str, object]:
    """The record of a clip in the packed view.

    Args:
      staged: "video", "audio", "text" and, where the preset has encoders for them, "image" and "sound".
    Returns:
      The streams `video` and `audio` with their masks, `text` and `sentence` by source, and what was measured:
      `prosody` as in `measure`, `duration` in seconds; `surface (3,)` = duration, lead-in, loudness: what a model could
      guess from without seeing or hearing anybody.
    """
    picture, sound = staged["video"], staged["audio"]
    duration = np.float32(max(picture["times"].max(initial=0.0), sound["seconds"]))
    steps, mask = _audio_stream(staged)
    shown = slice(None, None, every(settings))
    return {
        "clip_id": clip.id,
        "label": clip.label,
        "speaker": clip.speaker or "",
        "duration": duration,
        "video": _video_stream(staged, shown, settings.face),
        "video_mask": picture["video_mask"][shown],
        "au": picture["au"][shown],
        "times": picture["times"][shown],
        "audio": steps,
        "audio_mask": mask,
        "prosody": sound["prosody"],
        "surface": np.array([duration, *sound["surface"]], np.float32),
        "sentence": {s: sentences[s] for s in TEXTS},
        "text": {s: staged["text"][s] for s in TEXTS},
    }


def _video_stream(staged: Mapping[str, Mapping[str, np.ndarray]], shown: slice, face: bool) -> np.ndarray:
    """(t, d): the image encoder's features, the face measurements, or both side by side."""
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

"""One clip → its features: the only path, shared by everything that turns clips into arrays.

A preset says what is measured. Picture and sound are measured clip by clip (`measure`); the sentence needs, beside its
clip, the speaker's usual pitch (`speaker_pitch`), so sentences are made when all clips were measured (`describe`).
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from avjax.datasets.base import Clip
from avjax.errors import AvjaxError, UnusableMedia
from avjax.media import audio, faces, video
from avjax.text import action_units, prosody, template

# Raised when a change of code changes what is measured: part of every staged file's key.
CODE_VERSION = {"video": 1, "audio": 2, "text": 1}
# Sources of the `text` feature: the three of the template, and one fixed sentence for the "w/o ETG" ablation.
TEXTS = (*template.SOURCES, "constant")
# Below so many of a speaker's clips with voice, the median says nothing about what is usual; fixed bounds then.
_ENOUGH_CLIPS = 3


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is extracted.

    Attributes:
      frames: at most so many evenly spaced video frames.
      steps_per_second: audio steps; max_seconds: longer sound is cut there.
      text_encoder: name in the weights' registry; max_tokens: longer sentences are cut.
    """

    frames: int = 16
    steps_per_second: int = 10
    max_seconds: float = 60.0
    text_encoder: str = "minilm"
    max_tokens: int = 128


# lite: video = blendshapes + action units + head pose, audio = `audio.acoustic`, text = MiniLM tokens.
PRESETS = {"lite": Preset()}


def preset(name: str) -> Preset:
    """Looks a preset up.

    Raises:
      AvjaxError: no preset has that name.
    """
    if name not in PRESETS:
        raise AvjaxError(f"preset is {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def provenance(feature: str, settings: Preset, **weights: str) -> dict[str, object]:
    """What `feature` ("video", "audio" or "text") of a clip depends on beside the clip itself."""
    used = {
        "video": ("frames",),
        "audio": ("steps_per_second", "max_seconds"),
        "text": ("text_encoder", "max_tokens"),
    }[feature]
    return {
        "feature": feature,
        "code": CODE_VERSION[feature],
        "settings": {k: getattr(settings, k) for k in used},
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


def measure(clip: Clip, settings: Preset, tracker: faces.FaceTracker) -> dict[str, dict[str, np.ndarray]]:
    """Measures picture and sound of a clip. What it lacks has no steps, and its `why` says so.

    Returns:
      video: `video (t, d)`, `video_mask (t,)`, `au (t, a)`, `times (t,)` seconds from the clip's start; audio:
      `audio (s, d)`, `audio_mask (s,)`, `seconds ()`, `prosody (3,)` = median F0 in Hz, syllables per second, stress
      in dB, 0 where not measurable, `surface (2,)` as `audio.surface`; both: `why ()`, "" where nothing is lacking.
    Raises:
      UnusableMedia: neither picture nor sound.
    """
    lacking = []
    try:
        picture = measure_picture(clip, settings, tracker)
    except UnusableMedia as error:
        lacking.append(str(error))
        picture = _no_picture(str(error))
    try:
        sound = measure_sound(clip, settings)
    except UnusableMedia as error:
        lacking.append(str(error))
        sound = _no_sound(str(error))
    if len(lacking) == 2:
        raise UnusableMedia("; ".join(dict.fromkeys(lacking)))
    return {"video": picture, "audio": sound}


def measure_picture(clip: Clip, settings: Preset, tracker: faces.FaceTracker) -> dict[str, np.ndarray]:
    """Blendshapes, action units and head pose of evenly spaced frames; frames without a face are masked."""
    frames = video.read_frames(clip.path, count=settings.frames, start=clip.start or 0.0, end=clip.end)
    found = tracker.track(frames)
    units = faces.action_units(found.blendshapes, found.found)
    return {
        "video": np.concatenate([found.blendshapes, units, found.pose], -1).astype(np.float32),
        "video_mask": found.found,
        "au": units,
        "times": frames.times - (clip.start or 0.0),
        "why": np.array("no face in any frame" if found.fallback else ""),
    }


def measure_sound(clip: Clip, settings: Preset) -> dict[str, np.ndarray]:
    """Acoustic features at a low frame rate, and prosody; digital silence before and after the sound is masked."""
    samples = audio.read_sound(
        clip.audio or clip.path, start=clip.start or 0.0, end=clip.end, max_seconds=settings.max_seconds
    )
    analysis = audio.analyse(samples)
    steps = audio.acoustic(analysis, settings.steps_per_second)
    spoken = audio.prosody(analysis)
    numbers = (spoken.f0_median_hz, spoken.syllables_per_second, spoken.stress_db)
    return {
        "audio": steps.features,
        "audio_mask": steps.mask,
        "prosody": np.array([n or 0.0 for n in numbers], np.float32),
        "surface": np.array(audio.surface(analysis), np.float32),
        "seconds": np.array(len(samples) / audio.SAMPLE_RATE),
        "why": np.array("" if steps.mask.any() else "digital silence"),
    }


def _no_picture(why: str) -> dict[str, np.ndarray]:
    units = len(faces.AU_NAMES)
    return {
        "video": np.zeros((0, len(faces.BLENDSHAPES) + units + 6), np.float32),
        "video_mask": np.zeros(0, bool),
        "au": np.zeros((0, units), np.float32),
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
    picture: Mapping[str, np.ndarray],
    sound: Mapping[str, np.ndarray],
    text: Mapping[str, np.ndarray],
    sentences: Mapping[str, str],
) -> dict[str, object]:
    """The record of a clip in the packed view; `prosody` as in `measure`, `duration` in seconds.

    `surface (3,)` = duration, lead-in, loudness: what a model could guess from without seeing or hearing anybody.
    """
    duration = np.float32(max(picture["times"].max(initial=0.0), sound["seconds"]))
    return {
        "clip_id": clip.id,
        "label": clip.label,
        "speaker": clip.speaker or "",
        "duration": duration,
        "video": picture["video"],
        "video_mask": picture["video_mask"],
        "au": picture["au"],
        "times": picture["times"],
        "audio": sound["audio"],
        "audio_mask": sound["audio_mask"],
        "prosody": sound["prosody"],
        "surface": np.array([duration, *sound["surface"]], np.float32),
        "sentence": {s: sentences[s] for s in TEXTS},
        "text": {s: text[s] for s in TEXTS},
    }


def landmarker() -> Path:
    """The face landmarker's file, fetched once."""
    from avjax.encoders import weights

    return weights.fetch("face_landmarker")

"""One clip → its features: the only path, shared by everything that turns clips into arrays.

A preset (`avjax.features.presets`) says what is measured. Video and audio are measured clip by clip (`measure`), each
decoded once for all that is made of it; the sentence needs, beside its clip, the speaker's usual pitch
(`speaker_pitch`), so sentences are made when all clips were measured (`describe`).
"""

import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from avjax.datasets.base import Clip
from avjax.errors import UnusableMedia
from avjax.features import avtca_window
from avjax.features.face_video import ENCODED, FaceVideo, Instruments, Raw, nothing_seen, seen
from avjax.features.presets import Preset, every
from avjax.media import audio, faces, video
from avjax.text import action_units, prosody, template
from avjax.utils.progress import Stopwatch

# Sources of the `text` feature: the three of the template, and one fixed sentence for the "w/o ETG" ablation.
TEXTS = (*template.SOURCES, "constant")
# Below so many of a speaker's clips with voice, the median says nothing about what is usual; fixed bounds then.
_ENOUGH_CLIPS = 3


def measure(
    clip: Clip,
    instruments: Instruments,
    staged: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    wanted: Container[str] = (),
) -> tuple[dict[str, dict[str, np.ndarray]], Raw]:
    """Measures video and audio of a clip. What it lacks has no steps, and its `why` says so.

    Args:
      staged: "video", "audio", "window" → what was measured before, which is not measured again.
      wanted: "image", "flow", "speech": what is to be encoded, and so is handed out as `Raw`.
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
        picture = nothing_seen(str(error))
    try:
        sound, samples = _sound(clip, instruments, staged.get("audio"), "speech" in wanted, cut)
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
    viewers = {"faces": FaceVideo(clip, instruments, staged, wanted)}
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
        heard = audio.read_audios(clip.audio or clip.path, samplings, start=start, end=clip.end)
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


@dataclasses.dataclass(frozen=True)
class Facts:
    """The little that is kept in memory of each measured clip: what sentences and reports need.

    Attributes:
      face: words for the face, as `action_units.describe`; prosody (3,): see `measure`; seconds: of sound.
      why: "video", "audio" → what is lacking there, "" where nothing is.
    """

    face: object
    prosody: np.ndarray
    seconds: float
    why: Mapping[str, str]


def facts(picture: Mapping[str, np.ndarray], sound: Mapping[str, np.ndarray]) -> Facts:
    """The facts of a clip, of what `measure` found."""
    return Facts(
        face=action_units.describe(picture["au"], picture["video_mask"], faces.AU_NAMES),
        prosody=sound["prosody"],
        seconds=float(sound["seconds"]),
        why={"video": str(picture["why"]), "audio": str(sound["why"])},
    )


# The arrays of "video" and "audio" that `facts` takes.
FACTS_OF = {"video": ("au", "video_mask", "why"), "audio": ("prosody", "seconds", "why")}


def describe(known: Facts, transcript: str | None, usual_pitch: float | None) -> dict[str, str]:
    """The sentence of a clip for every source of the template; "" where a source knows nothing."""
    f0, rate, stress = (float(v) or None for v in known.prosody)
    parts = template.Parts(
        face=known.face,
        transcript=transcript,
        rate=prosody.rate_word(rate),
        pitch=prosody.pitch_word(f0, usual_pitch),
        stress=prosody.stress_word(stress),
    )
    return {source: template.sentence(parts, source) for source in template.SOURCES}


def example(
    clip: Clip,
    settings: Preset,
    staged: Mapping[str, Mapping[str, np.ndarray]],
    sentences: Mapping[str, str],
) -> dict[str, object]:
    """The record of a clip in the packed view.

    Args:
      staged: "video", "audio", "text" and, where the preset has them, "image", "flow", "speech" and "window".
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
    if "speech" not in staged:
        return staged["audio"]["audio"], staged["audio"]["audio_mask"]
    steps = staged["speech"]["steps"]
    return steps, np.ones(len(steps), bool)


def landmarker() -> Path:
    """The face landmarker's file, fetched once."""
    from avjax.encoders import weights

    return weights.fetch("face_landmarker")

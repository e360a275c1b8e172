"""One clip → its features: the only path, shared by everything that turns clips into arrays.

A preset (`avjax.features.presets`) determines what is measured. Video and audio are measured clip by clip (`measure`),
each decoded once for all features; sentences depend on the speaker's usual pitch (`speaker_pitch`), so they are
generated when all clips are measured (`describe`).
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
# With fewer voiced clips of a speaker, their median is no estimate of the usual pitch, and fixed bounds apply.
_MIN_CLIPS = 3


def measure(
    clip: Clip,
    instruments: Instruments,
    staged: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    wanted: Container[str] = (),
) -> tuple[dict[str, dict[str, np.ndarray]], Raw]:
    """Measures video and audio of a clip. A missing modality has no steps; its `why` is the reason.

    Args:
      clip: the clip.
      instruments: the tools and the preset.
      staged: "video", "audio", "window" → earlier measurements, which are not repeated.
      wanted: "image", "flow", "speech": features to be encoded, whose inputs are returned as `Raw`.

    Returns:
      video: `video (t, d)`, `video_mask (t,)`, `au (t, a)`, `boxes (t, 4)` of the faces in pixels, `times (t,)` seconds
      from the clip's start; audio: `audio (s, d)`, `audio_mask (s,)`, `seconds ()`, `inside (2,)`, its first and last
      sample without outer digital silence, `prosody (3,)` = median F0 in Hz, syllables per second, stress in dB, 0 if
      not measurable, `surface (2,)` as `audio.surface`; both: `why ()`, "" if nothing is missing; window, if the preset
      has one: as `avtca_window.Cut.measured`. And the inputs of encoders.

    Raises:
      UnusableMedia: neither video nor audio.
    """
    staged, reasons, raw = staged or {}, [], Raw()
    settings = instruments.settings
    cut = None
    if settings.window and "window" not in staged:
        cut = avtca_window.Cut(settings.window, clip.start or 0.0)
    try:
        video_features, raw = _measure_video(clip, instruments, staged.get("video"), wanted, cut)
    except UnusableMedia as error:
        reasons.append(str(error))
        video_features = nothing_seen(str(error))
    try:
        audio_features, samples = _measure_audio(clip, instruments, staged.get("audio"), "speech" in wanted, cut)
    except UnusableMedia as error:
        reasons.append(str(error))
        audio_features, samples = _no_audio(str(error)), None
    if len(reasons) == 2:
        raise UnusableMedia("; ".join(dict.fromkeys(reasons)))
    made = {"video": video_features, "audio": audio_features}
    if settings.window:
        made["window"] = staged.get("window") or cut.measured(
            instruments.tracker, instruments.clock, _audio_span(audio_features, settings)
        )
    return made, dataclasses.replace(raw, samples=samples)


def _audio_span(audio_features: Mapping[str, np.ndarray], settings: Preset) -> tuple[float, float]:
    """Returns when the audio begins and ends, in seconds; the end is infinite if only the beginning was measured."""
    first, last = audio_features["inside"] / audio.SAMPLE_RATE
    return first, last if last < settings.max_seconds else np.inf


def _measure_video(
    clip: Clip,
    instruments: Instruments,
    staged: Mapping[str, np.ndarray] | None,
    wanted: Container[str],
    cut: avtca_window.Cut | None,
) -> tuple[Mapping[str, np.ndarray], Raw]:
    """Measures the face in the frames, those without a face masked; collects images and flows if `wanted`.

    The frames are decoded once, block by block, and shared with the window `cut`.
    """
    viewers = {"faces": FaceVideo(clip, instruments, staged, wanted)}
    if staged and not viewers["faces"].needs(staged["video_mask"]):
        del viewers["faces"]
    if cut:
        viewers["window"] = cut
    try:
        _show_frames(clip, instruments, viewers)
    except UnusableMedia:
        if cut:
            cut.lose()
        if "faces" in viewers:
            raise
    return viewers["faces"].measured() if "faces" in viewers else (staged, Raw())


def _show_frames(clip: Clip, instruments: Instruments, viewers: Mapping[str, object]) -> None:
    """Passes the viewers the frames that they choose."""
    if not viewers:
        return
    choices = {name: viewer.choose for name, viewer in viewers.items()}
    span = {"start": clip.start or 0.0, "end": _end(clip, instruments.settings)}
    for blocks in _timed(video.passes(clip.path, choices, **span), instruments.clock):
        for name, frames in _timed(blocks, instruments.clock):
            viewers[name].take(frames)


def _end(clip: Clip, settings: Preset) -> float | None:
    """Returns the end of a clip on its clock; long clips are truncated if every frame is used."""
    if settings.frames:
        return clip.end
    return min(filter(None, (clip.end, (clip.start or 0.0) + settings.max_seconds)))


def _timed(items: Iterator, clock: Stopwatch) -> Iterator:
    """Yields the items; the time to get each counts as decoding."""
    while True:
        with clock("decoding"):
            item = next(items, None)
        if item is None:
            return
        yield item


def _measure_audio(
    clip: Clip,
    instruments: Instruments,
    staged: Mapping[str, np.ndarray] | None,
    wanted: bool,
    cut: avtca_window.Cut | None,
) -> tuple[Mapping[str, np.ndarray], np.ndarray | None]:
    """Measures acoustic features and prosody; returns also the samples, if `wanted`, without outer silence.

    The audio is decoded once and shared with the window `cut`.
    """
    settings, samples = instruments.settings, None
    if not staged or (wanted and staged["audio_mask"].any()):
        samples = audio.Sampling(max_seconds=settings.max_seconds)
    try:
        decoded = _read_samples(clip, instruments.clock, samples, cut)
    except UnusableMedia:
        if samples:
            raise
    if not samples:
        return staged, None
    with instruments.clock("acoustics"):
        audio_features = staged or _acoustic_measurements(decoded, settings)
    first, last = audio_features["inside"]
    return audio_features, decoded[first:last] if wanted and first < last else None


def _read_samples(
    clip: Clip, clock: Stopwatch, sampling: audio.Sampling | None, cut: avtca_window.Cut | None
) -> np.ndarray | None:
    """Reads the samples (n,) of a clip, if `sampling` is given; the window gets its own."""
    start, samplings = clip.start or 0.0, [s for s in (sampling, cut and cut.sampling) if s]
    if not samplings:
        return None
    with clock("decoding"):
        decoded = audio.read_audio_parts(clip.audio or clip.path, samplings, start=start, end=clip.end)
    if cut:
        cut.samples = decoded[-1]
    if sampling and not decoded[0].size:
        raise UnusableMedia(audio.nothing_decoded(start, clip.end))
    return decoded[0]


def _acoustic_measurements(samples: np.ndarray, settings: Preset) -> dict[str, np.ndarray]:
    """Computes acoustic features at a low rate, and prosody; leading and trailing digital silence is masked."""
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


def _no_audio(why: str) -> dict[str, np.ndarray]:
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
    """Computes the usual pitch of each speaker, the median over clips of the median F0; uses no labels.

    Args:
      clips: (speaker or None, median F0 in Hz or 0) of every clip.
    """
    pitches: dict[str, list[float]] = {}
    for speaker, f0 in clips:
        if speaker and f0 > 0:
            pitches.setdefault(speaker, []).append(f0)
    return {s: float(np.median(v)) for s, v in pitches.items() if len(v) >= _MIN_CLIPS}


@dataclasses.dataclass(frozen=True)
class Facts:
    """The data of each measured clip that are kept in memory, for sentences and reports.

    Attributes:
      face: words for the face, as `action_units.describe`.
      prosody: (3,), see `measure`.
      seconds: duration of the audio.
      why: "video", "audio" → why it is missing, "" if it is not.
    """

    face: object
    prosody: np.ndarray
    seconds: float
    why: Mapping[str, str]


def facts(video_features: Mapping[str, np.ndarray], audio_features: Mapping[str, np.ndarray]) -> Facts:
    """Extracts the facts of a clip from its measurements (`measure`)."""
    return Facts(
        face=action_units.describe(video_features["au"], video_features["video_mask"], faces.AU_NAMES),
        prosody=audio_features["prosody"],
        seconds=float(audio_features["seconds"]),
        why={"video": str(video_features["why"]), "audio": str(audio_features["why"])},
    )


# The arrays of "video" and "audio" that `facts` takes.
FACTS_OF = {"video": ("au", "video_mask", "why"), "audio": ("prosody", "seconds", "why")}


def describe(clip_facts: Facts, transcript: str | None, usual_pitch: float | None) -> dict[str, str]:
    """Generates the sentence of a clip for every source of the template; "" if nothing is known for a source."""
    f0, rate, stress = (float(v) or None for v in clip_facts.prosody)
    parts = template.Parts(
        face=clip_facts.face,
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
    """Makes the record of a clip in the packed view.

    `staged` holds "video", "audio", "text" and, if the preset has them, "image", "flow", "speech" and "window".

    Returns:
      The streams `video`, `audio` and, if present, `flow` with their masks, `text` and `sentence` by source, and
      measurements: `prosody` as in `measure`, `duration` in seconds; `surface (3,)` = duration, lead-in, loudness: cues
      from which a model could guess without seeing or hearing anybody.
    """
    video_features, audio_features = staged["video"], staged["audio"]
    duration = np.float32(max(video_features["times"].max(initial=0.0), audio_features["seconds"]))
    shown = slice(None, None, every(settings))
    return {
        "clip_id": clip.id,
        "label": clip.label if isinstance(clip.label, str) else np.array(clip.label, np.float32),
        "speaker": clip.speaker or "",
        "duration": duration,
        **_streams(settings, staged, shown),
        "au": video_features["au"][shown],
        "times": video_features["times"][shown],
        "prosody": audio_features["prosody"],
        "surface": np.array([duration, *audio_features["surface"]], np.float32),
        "sentence": {s: sentences[s] for s in TEXTS},
        "text": {s: staged["text"][s] for s in TEXTS},
    }


def _streams(settings: Preset, staged: Mapping[str, Mapping[str, np.ndarray]], shown: slice) -> dict[str, np.ndarray]:
    if settings.window:
        return avtca_window.streams(staged["window"])
    present = staged["video"]["video_mask"]
    steps, mask = _audio_stream(staged)
    streams = {
        "video": _video_stream(staged, shown, settings.face),
        "video_mask": seen(present, settings),
        "audio": steps,
        "audio_mask": mask,
    }
    if settings.flow:
        # On the time base of `video`: models weight the two against each other step by step.
        streams |= {"flow": staged["flow"]["steps"][shown], "flow_mask": present[shown]}
    return streams


def _video_stream(staged: Mapping[str, Mapping[str, np.ndarray]], shown: slice, face: bool) -> np.ndarray:
    """Returns the image encoder's features or inputs, the face measurements, or both concatenated, (t, d)."""
    measured = staged["video"]["video"][shown]
    if "image" not in staged:
        return measured
    steps = staged["image"]["steps"]
    return np.concatenate([steps, measured.astype(ENCODED)], -1) if face else steps


def _audio_stream(staged: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the stream `audio` (s, d) and its mask (s,)."""
    if "speech" not in staged:
        return staged["audio"]["audio"], staged["audio"]["audio_mask"]
    steps = staged["speech"]["steps"]
    return steps, np.ones(len(steps), bool)


def landmarker() -> Path:
    """Returns the path of the face landmarker, which is fetched once."""
    from avjax.encoders import weights

    return weights.fetch("face_landmarker")

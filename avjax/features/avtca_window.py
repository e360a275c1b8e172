"""Raw face pictures and MFCC of one span of a clip, as AVT-CA takes them (specification of the systems, section 3)."""

from collections.abc import Mapping

import numpy as np

from avjax.datasets.base import Clip
from avjax.errors import UnusableMedia
from avjax.features.presets import Window
from avjax.media import audio, faces, video
from avjax.utils.progress import Stopwatch


def measure(
    clip: Clip, window: Window, tracker: faces.FaceTracker, clock: Stopwatch, inside: tuple[float, float]
) -> dict[str, np.ndarray]:
    """Cuts pictures and sound of a clip at the same place: in the middle, or all of a shorter clip.

    Where the picture is missing the sound's own middle is taken.

    Args:
      inside: when sound begins and ends, in seconds; before and after is digital silence, whose length says nothing.
    Returns:
      `pictures (t, side, side, 3)` uint8 with `pictures_mask (t,)`, False beyond the clip's end and without a face;
      `mfcc (s, mfccs)` float32 with `mfcc_mask (s,)`, False outside `inside`.
    """
    begin = clip.start or 0.0
    pictures, mask, seconds = _pictures(clip, window, tracker, clock)
    with clock("decoding"):
        try:
            samples = audio.read_sound(clip.audio or clip.path, start=begin, end=clip.end, rate=window.sample_rate)
        except UnusableMedia:
            samples = np.zeros(0, np.float32)
    with clock("acoustics"):
        mfcc, real = _mfcc(samples, window, None if window.released else seconds, inside)
    return {"pictures": pictures, "pictures_mask": mask, "mfcc": mfcc, "mfcc_mask": real}


def moments(window: Window, seconds: float) -> np.ndarray:
    """The times of the pictures, (count,) seconds from the beginning of a clip that lasts `seconds`.

    Each is the middle of a frame of `rate` a second, so that videos of 29.97 give the frames of the same numbers.
    """
    whole = int(window.seconds * window.rate)
    numbers = np.arange(window.count) * whole // window.count + whole // (2 * window.count)
    first = 0.0 if window.released else _first(window, seconds)
    return first + (numbers + 0.5) / window.rate


def _first(window: Window, seconds: float) -> float:
    return max(0.0, (seconds - window.seconds) / 2)


def _pictures(clip: Clip, window: Window, tracker, clock) -> tuple[np.ndarray, np.ndarray, float | None]:
    """The pictures, which are real, and how many seconds of picture the clip has: None where it has none."""
    lasts: list[float] = []

    def wanted(seconds: float) -> np.ndarray:
        lasts.append(seconds)
        return moments(window, seconds)

    out = np.zeros((window.count, window.side, window.side, 3), np.uint8)
    try:
        with clock("decoding"):
            frames, there = video.read_shown(clip.path, wanted, start=clip.start or 0.0, end=clip.end)
    except UnusableMedia:
        return out, np.zeros(window.count, bool), None
    with clock("faces"):
        track = tracker.track(frames)
        cut, found = _cut(frames, track, window)
    out[there] = cut
    mask = there.copy()
    mask[there] = found
    return out, mask | (window.released & mask.any()), lasts[0]


def _cut(frames: video.Frames, track: faces.Faces, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of the face, and in which frames there is one."""
    if not window.released:
        return faces.boxed(frames, track.found, track.boxes, window.side), track.found
    # Where no face is found, the place of the last one is cut out.
    last = np.maximum.accumulate(np.where(track.found, np.arange(len(track.found)), -1))
    known = last >= 0
    pictures = faces.boxed(frames, known, track.boxes[np.maximum(last, 0)], window.side, clamped=False)
    return pictures[..., ::-1], known


def _mfcc(
    samples: np.ndarray, window: Window, seconds: float | None, inside: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """MFCC of the span and which of their steps are real; `seconds` of picture say where it is, None: the samples."""
    import librosa

    length, rate = int(window.seconds * window.sample_rate), window.sample_rate
    first = round(_first(window, len(samples) / rate if seconds is None else seconds) * rate)
    cut = samples[first : first + length]
    padded = np.pad(cut, (0, length - len(cut)))
    mfcc = librosa.feature.mfcc(y=padded, sr=rate, n_mfcc=window.mfccs).T.astype(np.float32)
    if window.released:
        return mfcc, np.full(len(mfcc), len(cut) > 0)
    times = (first + np.arange(len(mfcc)) * (length / len(mfcc))) / rate
    return mfcc, (times >= inside[0]) & (times < min(inside[1], (first + len(cut)) / rate))


def streams(staged: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The streams `video` and `audio` of what was staged."""
    return {
        "video": staged["pictures"],
        "video_mask": staged["pictures_mask"],
        "audio": staged["mfcc"],
        "audio_mask": staged["mfcc_mask"],
    }

"""Face images and MFCC of one span of a clip, as AVT-CA takes them."""

from collections.abc import Mapping

import numpy as np

from avjax.features.presets import Window
from avjax.media import audio, faces, video
from avjax.utils.progress import Stopwatch


class Cut:
    """Cuts video and audio of a clip at the same place: in the middle, or all of a shorter clip.

    Where the video is missing the audio's own middle is taken.

    Args:
      begin: where the clip begins in its files, in seconds.
    Attributes:
      sampling: how it wants the audio; samples: (n,) float32, what it is given of it.
    """

    def __init__(self, window: Window, begin: float) -> None:
        self._window, self._begin = window, begin
        self.sampling = audio.Sampling(rate=window.sample_rate)
        self.samples = np.zeros(0, np.float32)
        self.lose()

    def lose(self) -> None:
        """Gives up the video: it cannot be read."""
        self._frames: list[video.Frames] = []
        self._there = np.zeros(self._window.count, bool)
        self._seconds: float | None = None

    def choose(self, times: np.ndarray, over: float) -> np.ndarray:
        """Begins anew: a `video.Choice` of the frames shown at the `moments` that are before the end of the video."""
        self._frames, seconds = [], over - self._begin
        asked = self._begin + moments(self._window, seconds)
        self._there = asked < over
        self._seconds = seconds if self._there.any() else None
        return video.shown_at(times, asked[self._there])

    def take(self, frames: video.Frames) -> None:
        self._frames.append(frames)

    def measured(
        self, tracker: faces.FaceTracker, clock: Stopwatch, inside: tuple[float, float]
    ) -> dict[str, np.ndarray]:
        """Measures what was taken.

        Args:
          inside: when sound begins and ends, in seconds; around it is digital silence, whose length says nothing.
        Returns:
          `pictures (t, side, side, 3)` uint8 with `pictures_mask (t,)`, False beyond the clip's end and without a face;
          `mfcc (s, mfccs)` float32 with `mfcc_mask (s,)`, False outside `inside`.
        """
        with clock("faces"):
            pictures, mask = self._pictures(tracker)
        with clock("acoustics"):
            mfcc, real = _mfcc(self.samples, self._window, None if self._window.released else self._seconds, inside)
        return {"pictures": pictures, "pictures_mask": mask, "mfcc": mfcc, "mfcc_mask": real}

    def _pictures(self, tracker: faces.FaceTracker) -> tuple[np.ndarray, np.ndarray]:
        """The pictures, and which are real."""
        window = self._window
        out, mask = np.zeros((window.count, window.side, window.side, 3), np.uint8), np.zeros(window.count, bool)
        if not self._frames:
            return out, mask
        frames = video.joined(self._frames)
        out[self._there], mask[self._there] = _cut(frames, tracker.track(frames), window)
        return out, mask | (window.released & mask.any())


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


def _cut(frames: video.Frames, track: faces.Faces, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """The images of the face, and in which frames there is one."""
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

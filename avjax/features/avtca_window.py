"""Face crops and MFCCs of one span of a clip, as in AVT-CA."""

from collections.abc import Mapping

import numpy as np

from avjax.features.presets import Window
from avjax.media import audio, faces, video
from avjax.utils.progress import Stopwatch


class Cut:
    """Cuts the same span from video and audio of a clip: its middle, or all of a shorter clip.

    Without video, the audio's own middle is used. The clip begins `begin` seconds into its files.

    Attributes:
      sampling: the requested sampling of the audio.
      samples: (n,) float32, the audio, set from outside.
    """

    def __init__(self, window: Window, begin: float) -> None:
        self._window, self._begin = window, begin
        self.sampling = audio.Sampling(rate=window.sample_rate)
        self.samples = np.zeros(0, np.float32)
        self.lose()

    def lose(self) -> None:
        """Discards the video: it cannot be read."""
        self._frames: list[video.Frames] = []
        self._inside_clip = np.zeros(self._window.count, bool)
        self._seconds: float | None = None

    def choose(self, times: np.ndarray, over: float) -> np.ndarray:
        """Restarts: a `video.Choice` of the frames shown at the `frame_times` before the end of the video."""
        self._frames, seconds = [], over - self._begin
        asked = self._begin + frame_times(self._window, seconds)
        self._inside_clip = asked < over
        self._seconds = seconds if self._inside_clip.any() else None
        return video.shown_at(times, asked[self._inside_clip])

    def take(self, frames: video.Frames) -> None:
        """Adds the next chosen frames."""
        self._frames.append(frames)

    def measured(
        self, tracker: faces.FaceTracker, clock: Stopwatch, inside: tuple[float, float]
    ) -> dict[str, np.ndarray]:
        """Crops the face in the frames and computes the MFCCs.

        Args:
          tracker: finds the face.
          clock: counts the seconds spent.
          inside: when the audio begins and ends, in seconds, without the digital silence around it.

        Returns:
          `images (t, side, side, 3)` uint8 with `images_mask (t,)`, False beyond the clip's end and without a face;
          `mfcc (s, mfccs)` float32 with `mfcc_mask (s,)`, False outside `inside`.
        """
        with clock("faces"):
            crops, mask = self._crops(tracker)
        with clock("acoustics"):
            mfcc, real = _mfcc(self.samples, self._window, None if self._window.released else self._seconds, inside)
        return {"images": crops, "images_mask": mask, "mfcc": mfcc, "mfcc_mask": real}

    def _crops(self, tracker: faces.FaceTracker) -> tuple[np.ndarray, np.ndarray]:
        """Returns the crops and their mask."""
        window = self._window
        out, mask = np.zeros((window.count, window.side, window.side, 3), np.uint8), np.zeros(window.count, bool)
        if not self._frames:
            return out, mask
        frames = video.joined(self._frames)
        out[self._inside_clip], mask[self._inside_clip] = _cut(frames, tracker.track(frames), window)
        return out, mask | (window.released & mask.any())


def frame_times(window: Window, seconds: float) -> np.ndarray:
    """Returns the times of the crops, (count,) seconds from the beginning of a clip that lasts `seconds`.

    Each is the middle of a frame at `rate` per second, so that videos at 29.97 give the frames of the same numbers.
    """
    length = int(window.seconds * window.rate)
    numbers = np.arange(window.count) * length // window.count + length // (2 * window.count)
    first = 0.0 if window.released else _first(window, seconds)
    return first + (numbers + 0.5) / window.rate


def _first(window: Window, seconds: float) -> float:
    return max(0.0, (seconds - window.seconds) / 2)


def _cut(frames: video.Frames, track: faces.Faces, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Returns the crops of the face and the mask of the frames that show it."""
    if not window.released:
        return faces.boxed(frames, track.present, track.boxes, window.side), track.present
    # Without a face, the box of the last one is cropped.
    last = np.maximum.accumulate(np.where(track.present, np.arange(len(track.present)), -1))
    tracked = last >= 0
    crops = faces.boxed(frames, tracked, track.boxes[np.maximum(last, 0)], window.side, clamped=False)
    return crops[..., ::-1], tracked


def _mfcc(
    samples: np.ndarray, window: Window, seconds: float | None, inside: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the MFCCs of the span and their mask; it is centred in `seconds` of video, or if None in the samples."""
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
    """Returns the streams `video` and `audio` of the staged arrays."""
    return {
        "video": staged["images"],
        "video_mask": staged["images_mask"],
        "audio": staged["mfcc"],
        "audio_mask": staged["mfcc_mask"],
    }

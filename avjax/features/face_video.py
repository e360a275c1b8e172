"""Face measurements of the frames of a clip, and the inputs of image and flow encoders."""

import dataclasses
from collections.abc import Container, Mapping
from pathlib import Path

import numpy as np

from avjax.datasets.base import Clip
from avjax.features.presets import Preset, every
from avjax.features.spool import Spool
from avjax.media import faces, flow, video
from avjax.utils.progress import Stopwatch

# Encoded features are stored in half precision, measurements in single precision.
ENCODED = np.float16


@dataclasses.dataclass(frozen=True)
class Raw:
    """Inputs of the encoders for a clip; None if there are none.

    Attributes:
      images: (k, h, w, 3) uint8, the frames that are `seen`, or the faces in them.
      flows: (n, side, side, 2) float16 at `flow_ends`, or the pairs of frames (n, 2, side, side, 3) uint8 to compute
        flow from.
      samples: (n,) float32 at 16 kHz, the audio without leading and trailing digital silence.
    """

    images: Spool | None = None
    flows: Spool | None = None
    samples: np.ndarray | None = None

    def discard(self) -> None:
        """Removes the spools."""
        for spool in filter(None, (self.images, self.flows)):
            spool.discard()


@dataclasses.dataclass(frozen=True)
class Instruments:
    """Tools for measuring clips.

    Attributes:
      settings: the preset.
      tracker: finds faces.
      clock: counts the seconds of decoding, faces, flow and acoustics.
      scratch: a folder for the spools of `Raw`, which their consumer discards.
    """

    settings: Preset
    tracker: faces.FaceTracker
    clock: Stopwatch
    scratch: Path


class FaceVideo:
    """Measures the face in the frames of a clip, and collects the inputs of encoders; see `measure`."""

    def __init__(
        self,
        clip: Clip,
        instruments: Instruments,
        staged: Mapping[str, np.ndarray] | None,
        wanted: Container[str],
    ) -> None:
        self._begin, self._staged = clip.start or 0.0, staged
        self._instruments, self._wanted = instruments, wanted
        self._inputs = _Inputs(instruments, wanted)

    def needs(self, present: np.ndarray) -> bool:
        """Returns whether encoders need frames of which `present` show the face."""
        return self._inputs.needs(present)

    def choose(self, times: np.ndarray, over: float) -> np.ndarray:
        """Restarts: a `video.Choice`."""
        self._inputs.raw().discard()
        self._inputs = _Inputs(self._instruments, self._wanted)
        self._faces, self._times, self._count = [], [], 0
        count = self._instruments.settings.frames
        return (video.spread(count) if count else video.every_frame)(times, over)

    def take(self, frames: video.Frames) -> None:
        """Measures the next chosen frames."""
        part = slice(self._count, self._count + len(frames.times))
        self._count = part.stop
        if self._staged:
            mask, boxes = self._staged["video_mask"][part], self._staged["boxes"][part]
        else:
            with self._instruments.clock("faces"):
                before = self._faces[-1] if self._faces else None
                self._faces.append(self._instruments.tracker.track(frames, before))
            mask, boxes = self._faces[-1].present, self._faces[-1].boxes
            self._times.append(frames.times - self._begin)
        self._inputs.take(frames, mask, boxes)

    def measured(self) -> tuple[Mapping[str, np.ndarray], Raw]:
        """Returns the measurements and the inputs of encoders."""
        if self._staged:
            return self._staged, self._inputs.raw()
        return _face_measurements(faces.joined(self._faces), np.concatenate(self._times)), self._inputs.raw()


class _Inputs:
    """Collects, block by block, the inputs of the encoders of images and flow."""

    def __init__(self, instruments: Instruments, wanted: Container[str]) -> None:
        self._settings, self._clock, self._scratch = instruments.settings, instruments.clock, instruments.scratch
        self._image = self._settings.image if "image" in wanted else None
        self._flow = self._settings.flow if "flow" in wanted else None
        self._images = self._flows = None
        self._count, self._before = 0, None

    def needs(self, present: np.ndarray) -> bool:
        """Returns whether any encoder needs frames of which `present` show the face."""
        return bool((self._image and seen(present, self._settings).any()) or (self._flow and present.any()))

    def take(self, frames: video.Frames, present: np.ndarray, boxes: np.ndarray) -> None:
        """Adds the next frames, with the mask of those that show the face, and its boxes."""
        if self._image:
            with self._clock("faces"):
                self._add_images(frames, present, boxes)
        if self._flow:
            with self._clock("flow"):
                self._add_flows(frames, present, boxes)
        self._count += len(present)

    def raw(self) -> Raw:
        return Raw(self._images, self._flows)

    def _add_images(self, frames: video.Frames, present: np.ndarray, boxes: np.ndarray) -> None:
        turn = (np.arange(len(present)) + self._count) % self._image.every == 0
        if self._image.sees == "frame":
            images = video.shrunk(frames.images[turn], self._image.side)
        else:
            images = faces.crops(frames, turn & present, boxes, self._image.side)[turn & present]
        self._images = self._spooled(self._images, images)

    def _add_flows(self, frames: video.Frames, present: np.ndarray, boxes: np.ndarray) -> None:
        f = self._flow
        before = frames.images[:0] if self._before is None else self._before
        images = np.concatenate([before, frames.images])
        self._before = images[-f.window :]
        # The ends of flows among these frames; those among earlier frames are done.
        at = flow.ends(np.concatenate([np.zeros(self._count, bool), present]), f.window, f.stride) - self._count
        all_true = np.ones(len(at), bool)
        earlier, later = (
            faces.crops(video.Frames(images[len(before) + at - back], frames.times[at]), all_true, boxes[at], f.side)
            for back in (f.window, 0)
        )
        made = flow.dis(earlier, later).astype(ENCODED) if f.source == "dis" else np.stack([earlier, later], 1)
        self._flows = self._spooled(self._flows, made)

    def _spooled(self, spool: Spool | None, arrays: np.ndarray) -> Spool | None:
        if spool is None and len(arrays):
            spool = Spool.create(self._scratch, arrays.shape[1:], arrays.dtype.name)
        if spool is not None:
            spool.add(arrays)
        return spool


def seen(present: np.ndarray, settings: Preset) -> np.ndarray:
    """Returns which steps of the stream `video` its encoder encodes; `present` (t,): which frames show the face."""
    present = present[:: every(settings)]
    return np.ones_like(present) if settings.image and settings.image.sees == "frame" else present


def flow_ends(present: np.ndarray, settings: Preset) -> np.ndarray:
    """Returns the frames at which flows end (`flow.ends`); none if the preset has no flow."""
    return flow.ends(present, settings.flow.window, settings.flow.stride) if settings.flow else np.zeros(0, int)


def _face_measurements(track: faces.Faces, times: np.ndarray) -> dict[str, np.ndarray]:
    """Concatenates blendshapes, action units and head pose."""
    units = faces.action_units(track.blendshapes, track.present)
    return {
        "video": np.concatenate([track.blendshapes, units, track.pose], -1).astype(np.float32),
        "video_mask": track.present,
        "au": units,
        "boxes": track.boxes,
        "times": times,
        "why": np.array("" if track.present.any() else "no face in any frame"),
    }


def nothing_seen(why: str) -> dict[str, np.ndarray]:
    """Returns empty measurements for a clip without video; `why` is the reason."""
    units = len(faces.AU_NAMES)
    return {
        "video": np.zeros((0, len(faces.BLENDSHAPES) + units + 6), np.float32),
        "video_mask": np.zeros(0, bool),
        "au": np.zeros((0, units), np.float32),
        "boxes": np.zeros((0, 4), np.float32),
        "times": np.zeros(0),
        "why": np.array(why),
    }

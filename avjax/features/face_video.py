"""What is made of the frames of a clip: measurements of the face, and what encoders are to see."""

import dataclasses
from collections.abc import Container, Mapping
from pathlib import Path

import numpy as np

from avjax.datasets.base import Clip
from avjax.features.presets import Preset, every
from avjax.features.spool import Spool
from avjax.media import faces, flow, video
from avjax.utils.progress import Stopwatch

# What encoders give is stored in half precision; what is measured stays in single precision.
ENCODED = np.float16


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


class FaceVideo:
    """Measures the face in the frames of a clip, and collects what encoders are to see of them; see `measure`."""

    def __init__(
        self,
        clip: Clip,
        instruments: Instruments,
        staged: Mapping[str, np.ndarray] | None,
        wanted: Container[str],
    ) -> None:
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

    def __init__(self, instruments: Instruments, wanted: Container[str]) -> None:
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
            pile = Spool.create(self._scratch, arrays.shape[1:], arrays.dtype.name)
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


def nothing_seen(why: str) -> dict[str, np.ndarray]:
    """The measurements of a clip without video, and why it has none."""
    units = len(faces.AU_NAMES)
    return {
        "video": np.zeros((0, len(faces.BLENDSHAPES) + units + 6), np.float32),
        "video_mask": np.zeros(0, bool),
        "au": np.zeros((0, units), np.float32),
        "boxes": np.zeros((0, 4), np.float32),
        "times": np.zeros(0),
        "why": np.array(why),
    }

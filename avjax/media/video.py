"""Pictures out of any container: exactly the frames that decode, upright, with the stream's own timestamps.

Nothing here trusts a header. The frames of a clip are those that decode, counted by decoding them, so a wrong or
missing frame count, a variable frame rate, damaged bytes or a truncated file all lead to a well-defined answer.
The clock of a clip starts at 0 where its container starts, and is shared by its picture and its sound (`audio.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from avjax.errors import UnusableMedia
from avjax.utils.media_files import trouble

MAX_PIXELS = 4096 * 2304  # per frame; more is a mistake or an attack
# Containers round timestamps to as little as a millisecond: a frame due that soon counts as shown.
_ROUNDING = 1e-3
# Seconds decoded on either side of a part: sound codecs need some to settle, and timestamps may be jumbled.
_MARGIN = 1.0


@dataclass(frozen=True)
class Frames:
    """Frames of a clip: `images` (T, H, W, 3) uint8 RGB, upright; `times` (T,) float64, seconds on its clock."""

    images: np.ndarray
    times: np.ndarray


@dataclass(frozen=True)
class Probe:
    """What a container claims, without decoding more than one frame.

    `duration` in seconds; `frames` and `fps` are the header's claim, None where it makes none; `width` and `height`
    in pixels as shown, that is after `rotation` (degrees counter-clockwise); both 0 without a picture.
    """

    has_video: bool
    has_audio: bool
    duration: float
    frames: int | None
    fps: float | None
    width: int
    height: int
    rotation: int


@contextmanager
def opened(path: str | Path):
    """Opens a media file as a PyAV container.

    Raises:
      UnusableMedia: no such file, or no media in it; also instead of any PyAV error inside the block. Reasons name no
        file, here and in all that reads media: they stand beside the name of the clip.
    """
    import av

    if reason := trouble(path):
        raise UnusableMedia(reason)
    try:
        # Metadata in a national encoding must not cost the clip.
        with av.open(str(path), metadata_errors="replace") as container:
            yield container
    except av.InvalidDataError as error:
        raise UnusableMedia(
            "not a media file, or one that is damaged or cut off where its table of contents is"
        ) from error
    except av.FFmpegError as error:
        raise UnusableMedia(f"cannot be read as a media file ({error.strerror or error})") from error


def decoded(container, stream, start: float = 0.0, end: float | None = None) -> Iterator[tuple[float, object]]:
    """Yields (seconds on the clip's clock, frame) of a stream, from a point at or before `start` up to before `end`.

    Packets that do not decode are skipped; a container that breaks off ends the stream there.
    """
    origin = (container.start_time or 0) / 1e6
    # A bare elementary stream has no timestamps: its pictures follow each other at the stated rate.
    step = float(1 / stream.guessed_rate) if stream.type == "video" else 0.0
    time = -step
    for frame in _from(container, stream, origin + start):
        time = time + step if frame.time is None else frame.time - origin
        if end is not None and time >= end:
            return
        yield time, frame


def within(start: float, end: float | None) -> str:
    """How a reason names the part [`start`, `end`) of a clip; "" for all of it."""
    return f" between {start:g} s and {'the end' if end is None else f'{end:g} s'}" if start or end else ""


def probe(path: str | Path) -> Probe:
    """Describes a media file; see `Probe`.

    Raises:
      UnusableMedia: the file is missing or holds neither picture nor sound.
    """
    with opened(path) as container:
        video, has_audio = picture(container), bool(decodable(container.streams.audio))
        if video is None and not has_audio:
            raise UnusableMedia("neither a video nor an audio stream")
        duration = _duration(container)
        if video is None:
            return Probe(False, has_audio, duration, None, None, 0, 0, 0)
        first = next((frame for _, frame in decoded(container, video)), None)
        rotation = first.rotation if first else 0
        size = (video.width, video.height)
        width, height = size if rotation % 180 == 0 else size[::-1]
        fps = float(video.average_rate) if video.average_rate else None
        return Probe(True, has_audio, duration, video.frames or None, fps, width, height, rotation)


def read_frames(
    path: str | Path,
    *,
    count: int | None = None,
    fps: float | None = None,
    indices: Sequence[int] | None = None,
    start: float = 0.0,
    end: float | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Frames:
    """Decodes chosen frames of a clip, or of its part [`start`, `end`) in seconds on the clip's clock.

    Give exactly one of
      count: the frames at the centres of `count` equal spans of the clip's frames; a clip with fewer gives each once.
      fps: the frame shown at `start`, `start` + 1/fps, … up to the end of the clip.
      indices: positions among the frames of the clip (or its part), in any order, repeats allowed.

    The clip is decoded twice, once for its timestamps and once for the chosen frames, so memory holds the answer and
    a single frame more, however long the clip is.

    Raises:
      UnusableMedia: no file, no video stream, no frame (in the part), an index past the last frame, or frames of more
        than `max_pixels`.
      ValueError: not exactly one way of choosing was given, or a count or rate that is not positive.
    """
    if sum(way is not None for way in (count, fps, indices)) != 1:
        raise ValueError(f"give exactly one of count, fps, indices; got count={count}, fps={fps}, indices={indices}")
    first, times = _times(path, start, end, max_pixels)
    if count is not None:
        chosen = _spread(len(times), count)
    elif fps is not None:
        chosen = _shown(times, fps, start, end)
    else:
        chosen = _within(np.asarray(indices, int), len(times))
    return Frames(_pick(_around(path, start, end, max_pixels), first + chosen), times[chosen])


def read_shown(
    path: str | Path,
    wanted: Callable[[float], np.ndarray],
    *,
    start: float = 0.0,
    end: float | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Frames, np.ndarray]:
    """The frames that a clip, or its part [`start`, `end`), shows at chosen times, decoded as in `read_frames`.

    Args:
      wanted: of the seconds that the frames last, the times wanted, (n,) seconds after `start`.
    Returns:
      the frames of those times before the end of the last one, and which these are, (n,) bool.
    Raises:
      UnusableMedia: as `read_frames`.
    """
    first, times = _times(path, start, end, max_pixels)
    over = _over(times, end)
    asked = start + wanted(over - start)
    there = asked < over
    chosen = _at(times, asked[there])
    if not there.any():
        raise UnusableMedia("not one of the frames wanted is before its end")
    return Frames(_pick(_around(path, start, end, max_pixels), first + chosen), times[chosen]), there


def read_blocks(
    path: str | Path,
    *,
    count: int | None = None,
    start: float = 0.0,
    end: float | None = None,
    most: int = 16,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Frames]:
    """Decodes frames of a clip, or of its part, in blocks of at most `most`: memory holds one block.

    `count` as in `read_frames`; None = every frame. What is raised is as there, before the first block.
    """
    first, times = _times(path, start, end, max_pixels)
    chosen = np.arange(len(times)) if count is None else _spread(len(times), count)
    images = _images(_around(path, start, end, max_pixels), first + chosen)
    for at in range(0, len(chosen), most):
        part = list(islice(images, most))
        yield Frames(np.stack(part), times[chosen[at : at + most]])


def shrunk(images: np.ndarray, side: int) -> np.ndarray:
    """Pictures (n, h, w, 3) uint8 with their shorter side brought to `side` pixels, larger or smaller (bicubic)."""
    from PIL import Image

    height, width = images.shape[1:3]
    short = min(height, width)
    size = side * width // short, side * height // short
    if not len(images):
        return np.zeros((0, *size[::-1], 3), np.uint8)
    return np.stack([Image.fromarray(i).resize(size, Image.Resampling.BICUBIC) for i in images])


def _times(path, start: float, end: float | None, max_pixels: int) -> tuple[int, np.ndarray]:
    """The times of the frames in [`start`, `end`), ascending, and how many frames `_around` gives before them."""
    # Frames leave the decoder in the order shown, whatever their timestamps: some containers (AVI) jumble them.
    times = np.sort([time for time, _ in _around(path, start, end, max_pixels)])
    first, last = np.searchsorted(times, [start - _ROUNDING, np.inf if end is None else end])
    if first == last:
        raise UnusableMedia(f"not one frame can be decoded{within(start, end)}")
    return int(first), times[first:last]


def _around(path, start: float, end: float | None, max_pixels: int) -> Iterator[tuple[float, object]]:
    """The (time, frame) pairs of a file's picture from before `start` to some time after `end`."""
    with opened(path) as container:
        stream = picture(container)
        if stream is None:
            raise UnusableMedia("no video stream")
        for time, frame in decoded(container, stream, start, None if end is None else end + _MARGIN):
            if frame.width * frame.height > max_pixels:
                raise UnusableMedia(
                    f"frames of {frame.width}x{frame.height} pixels; at most {max_pixels} are read; scale it down"
                )
            yield time, frame


def _spread(total: int, count: int) -> np.ndarray:
    """Indices of the frames at the centres of `count` equal spans of `total` frames."""
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    count = min(count, total)
    return (2 * np.arange(count) + 1) * total // (2 * count)


def _shown(times: np.ndarray, fps: float, start: float, end: float | None) -> np.ndarray:
    """Indices of the frames shown at `start` + k/fps until the last frame's time is over."""
    if fps <= 0:
        raise ValueError(f"fps must be positive; got {fps}")
    count = int(np.ceil((_over(times, end) - start - _ROUNDING) * fps))
    return _at(times, start + np.arange(max(1, count)) / fps)


def _over(times: np.ndarray, end: float | None) -> float:
    """When the last frame is over."""
    over = times[-1] + (np.median(np.diff(times)) if len(times) > 1 else 0.0)
    return over if end is None else min(over, end)


def _at(times: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Indices of the frames shown at the times `asked`."""
    return np.maximum(np.searchsorted(times, asked + _ROUNDING, side="right") - 1, 0)


def _within(indices: np.ndarray, total: int) -> np.ndarray:
    if indices.size == 0 or indices.min() < 0 or indices.max() >= total:
        raise UnusableMedia(f"it has frames 0 to {total - 1}; frames {indices.tolist()} were asked for")
    return indices


def _pick(frames: Iterator[tuple[float, object]], chosen: np.ndarray) -> np.ndarray:
    """Converts the chosen ones of a stream of frames to (T, H, W, 3) RGB; any order, repeats allowed."""
    wanted, where = np.unique(chosen, return_inverse=True)
    images = None
    for i, image in enumerate(_images(frames, wanted)):
        if images is None:
            images = np.empty((len(chosen), *image.shape), np.uint8)
        images[where == i] = image
    return images


def _images(frames: Iterator[tuple[float, object]], wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Converts those of a stream's frames whose numbers are `wanted`, ascending, to (H, W, 3) RGB."""
    wanted, size = iter(wanted.tolist()), None
    number = next(wanted)
    for index, (_, frame) in enumerate(frames):
        if index == number:
            # A stream may change its size midway; its first chosen frame sets the size of all.
            size = size or {"width": frame.width, "height": frame.height}
            turns = frame.rotation // 90
            # Contiguous: the landmarker reads the memory of a picture, whatever its strides say.
            yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24", **size), turns))
            number = next(wanted, None)
            if number is None:
                return


def decodable(streams) -> list:
    """Those of a container's streams whose codec is known, set to decode in one thread.

    Clips are decoded in parallel, one worker each; one thread also decodes damaged data the same way every time.
    """
    known = [stream for stream in streams if stream.codec_context is not None]
    for stream in known:
        stream.thread_count = 1
    return known


def picture(container):
    """The first video stream that moves (a cover picture is none), or None."""
    import av

    moving = (s for s in decodable(container.streams.video) if not s.disposition & av.stream.Disposition.attached_pic)
    return next(moving, None)


def _from(container, stream, start: float) -> Iterator:
    """Frames of a stream from the last point before `start` that the container can seek to."""
    frames = _frames(container, stream)
    if start > _MARGIN:
        container.seek(int((start - _MARGIN) / stream.time_base), stream=stream)
        first = next(frames, None)
        if first is not None and first.time is not None and first.time <= start:
            yield first
        else:  # a faulty index leads past the place
            container.seek(max(0, int((stream.start_time or 0) - _MARGIN / stream.time_base)), stream=stream)
            frames = _frames(container, stream)
    yield from frames


def _frames(container, stream) -> Iterator:
    """Every frame that decodes."""
    import av

    for packet in _packets(container, stream):
        try:
            frames = stream.decode(packet)
        except av.FFmpegError:
            continue
        yield from frames


def _packets(container, stream) -> Iterator:
    """Packets up to where the container breaks off; then None, for the frames that the decoder still holds."""
    import av

    while True:
        try:
            yield from container.demux(stream)
            return
        except IndexError:
            # PyAV stumbles over a packet of a stream that the header did not announce; the next ones are sound.
            continue
        except av.FFmpegError:
            yield None
            return


def _duration(container) -> float:
    """Seconds from the header, else up to the end of the last packet."""
    if container.duration is not None:
        return container.duration / 1e6
    ends = [
        float((packet.pts + (packet.duration or 0)) * packet.time_base)
        for packet in container.demux()
        if packet.pts is not None
    ]
    return max(ends, default=0.0) - (container.start_time or 0) / 1e6

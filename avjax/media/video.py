"""Frames from any container: exactly those that decode, upright, with the stream's own timestamps.

No header is trusted. The frames of a clip are those that decode, so a wrong or missing frame count, a variable frame
rate, damaged bytes and a truncated file all have a well-defined result. Frames are selected by the timestamps of the
packets, which need no decoding; the single decoding pass verifies them. Only if they are wrong, because packets are
damaged, are the frames decoded again with the verified timestamps.
The clock of a clip is 0 at the start of its container, and its video and audio share it (`audio.py`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avjax.errors import UnusableMedia
from avjax.utils.media_files import trouble

MAX_PIXELS = 4096 * 2304  # per frame; more is an error or an attack
BLOCK = 16  # frames
# Containers round timestamps to as little as a millisecond: a frame due that soon counts as shown.
_ROUNDING = 1e-3
# Seconds decoded on either side of a part: audio codecs need some to settle, and timestamps may be out of order.
_MARGIN = 1.0


@dataclass(frozen=True)
class Frames:
    """Frames of a clip: `images` (T, H, W, 3) uint8 RGB, upright; `times` (T,) float64, seconds on its clock."""

    images: np.ndarray
    times: np.ndarray


# (times (n,) of a part's frames, ascending; time when the last one ends) → indices of the requested frames, ascending,
# repeats allowed.
Choice = Callable[[np.ndarray, float], np.ndarray]


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """Opens a media file as a PyAV container.

    Raises:
      UnusableMedia: no such file, or no media in it; also replaces any PyAV error inside the block. As everywhere in
        `avjax.media`, reasons name no file: they are shown beside the name of the clip.
    """
    import av

    try:
        # Metadata in a legacy encoding must not reject the clip; PyAV 19 itself replaces what it cannot decode.
        lenient = {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "replace"}
        with av.open(str(path), **lenient) as container:
            yield container
    except av.FFmpegError as error:
        # Callers check their files before; at this point it only yields a better reason.
        if reason := trouble(path):
            raise UnusableMedia(reason) from error
        if isinstance(error, av.InvalidDataError):
            reason = "not a media file, or one that is damaged or cut off where its table of contents is"
        raise UnusableMedia(reason or f"cannot be read as a media file ({error.strerror or error})") from error


def decoded(
    container: Any, stream: Any, start: float = 0.0, end: float | None = None
) -> Iterator[tuple[float, object]]:
    """Yields (seconds on the clip's clock, frame) of a stream, from a point at or before `start` until `end`.

    Packets that do not decode are skipped; a truncated container ends the stream there.
    """
    return _timed(container, stream, _frames, start, end)


def _timed(
    container: Any, stream: Any, units: Callable, start: float, end: float | None
) -> Iterator[tuple[float, object]]:
    """Yields (seconds on the clip's clock, unit); `units` maps (container, stream) to frames or packets."""
    origin = (container.start_time or 0) / 1e6
    # A raw elementary stream has no timestamps: its frames follow each other at the stated rate.
    step = float(1 / stream.guessed_rate) if stream.type == "video" else 0.0
    time = -step
    for unit in _from(container, stream, units, origin + start):
        seconds = _seconds(unit)
        time = time + step if seconds is None else seconds - origin
        if end is not None and time >= end:
            return
        yield time, unit


def _seconds(unit: Any) -> float | None:
    """Returns the presentation time of a frame or packet on the container's clock."""
    if hasattr(unit, "time"):
        return unit.time
    return None if unit.pts is None else float(unit.pts) * unit.time_base.numerator / unit.time_base.denominator


def within(start: float, end: float | None) -> str:
    """Describes the part [`start`, `end`) of a clip for a reason; "" for the whole clip."""
    return f" between {start:g} s and {'the end' if end is None else f'{end:g} s'}" if start or end else ""


def read_frames(
    path: str | Path,
    *,
    count: int | None = None,
    indices: Sequence[int] = (),
    start: float = 0.0,
    end: float | None = None,
) -> Frames:
    """Decodes selected frames of a clip, or of its part [`start`, `end`) in seconds on the clip's clock.

    Selects `count` frames as `spread` does, or by `indices`: positions among the frames of the clip (or its part), in
    any order, repeats allowed. Memory holds these frames and one more, however long the clip is.

    Raises:
      UnusableMedia: as `passes`, or an index past the last frame.
      ValueError: a count that is not positive.
    """
    asked, total = np.asarray(indices, int), 0

    def indexed(times: np.ndarray, over: float) -> np.ndarray:
        nonlocal total
        total = len(times)
        return np.sort(asked[asked < total])

    for blocks in passes(path, {"": indexed if count is None else spread(count)}, start=start, end=end):
        parts = [frames for _, frames in blocks]
    if count is None and (not asked.size or asked.min() < 0 or asked.max() >= total):
        raise UnusableMedia(f"it has frames 0 to {total - 1}; frames {asked.tolist()} were asked for")
    frames = joined(parts)
    if count is not None:
        return frames
    order = np.argsort(np.argsort(asked, kind="stable"))
    return Frames(frames.images[order], frames.times[order])


def joined(parts: Sequence[Frames]) -> Frames:
    """Concatenates the frames of consecutive parts."""
    return Frames(np.concatenate([p.images for p in parts]), np.concatenate([p.times for p in parts]))


def passes(
    path: str | Path, choices: Mapping[str, Choice], *, start: float = 0.0, end: float | None = None
) -> Iterator[Iterator[tuple[str, Frames]]]:
    """Decodes the video of a clip, or its part [`start`, `end`), once for all choices of frames.

    Yields passes: each yields the name of a choice and its next frames, at most `BLOCK` at a time, which is all that
    memory holds. If the decoded frames differ from those that the packets announce, because some are damaged, a second
    pass follows and replaces the first.

    Raises:
      UnusableMedia: no such file, no video stream, no frame (in the part), or frames of more than `MAX_PIXELS`.
    """
    timeline, timestamps = None, _timeline([time for time, _ in _around(path, _shown_packets, start, end)], end)
    while timeline is None or not np.array_equal(timeline, timestamps):
        timeline, times = timestamps, []
        first = np.searchsorted(timeline, start - _ROUNDING)
        chosen = {}
        if first < len(timeline):
            shown = timeline[first:]
            chosen = {name: Counter(choice(shown, _over(shown, end)).tolist()) for name, choice in choices.items()}
        yield _blocks(_images(_around(path, _frames, start, end), first, chosen, times), timeline[first:], chosen)
        timestamps = _timeline(times, end)
    if first == len(timeline):
        raise UnusableMedia(f"not one frame can be decoded{within(start, end)}")


def spread(count: int) -> Choice:
    """Selects the frames at the centres of `count` equal spans of the frames; of fewer frames each once.

    Raises:
      ValueError: `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")

    def centres(times: np.ndarray, over: float) -> np.ndarray:
        most = min(count, len(times))
        return (2 * np.arange(most) + 1) * len(times) // (2 * most)

    return centres


def every_frame(times: np.ndarray, over: float) -> np.ndarray:
    """Selects all frames: a `Choice`."""
    return np.arange(len(times))


def shown_at(times: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Returns the indices of the frames, which begin at `times` (n,), that are shown at the times `asked` (m,)."""
    return np.maximum(np.searchsorted(times, asked + _ROUNDING, side="right") - 1, 0)


def shrunk(images: np.ndarray, side: int) -> np.ndarray:
    """Resizes images (n, h, w, 3) uint8 to a shorter side of `side` pixels (bicubic)."""
    from PIL import Image

    height, width = images.shape[1:3]
    short = min(height, width)
    size = side * width // short, side * height // short
    if not len(images):
        return np.zeros((0, *size[::-1], 3), np.uint8)
    return np.stack([Image.fromarray(i).resize(size, Image.Resampling.BICUBIC) for i in images])


def _timeline(times: Sequence[float], end: float | None) -> np.ndarray:
    """Sorts the times before `end`: frames leave the decoder in display order, though AVI's times are out of order."""
    ascending = np.sort(np.array(times, float))
    return ascending[: np.searchsorted(ascending, np.inf if end is None else end)]


def _over(times: np.ndarray, end: float | None) -> float:
    """Returns the time when the last frame ends."""
    over = times[-1] + (np.median(np.diff(times)) if len(times) > 1 else 0.0)
    return over if end is None else min(over, end)


def _around(path: str | Path, units: Callable, start: float, end: float | None) -> Iterator[tuple[float, object]]:
    """Yields (time, frame or packet) of a file's video from before `start` to some time after `end`."""
    with opened(path) as container:
        stream = video_stream(container)
        if stream is None:
            raise UnusableMedia("no video stream")
        yield from _timed(container, stream, units, start, None if end is None else end + _MARGIN)


def _images(
    frames: Iterable[tuple[float, Any]], first: int, chosen: Mapping[str, Counter], times: list[float]
) -> Iterator[tuple[int, np.ndarray]]:
    """Converts the chosen frames, counted from frame `first`, to (H, W, 3) RGB; appends the times of all to `times`."""
    wanted, size = set().union(*chosen.values()), None
    for index, (time, frame) in enumerate(frames, -first):
        times.append(time)
        if frame.width * frame.height > MAX_PIXELS:
            raise UnusableMedia(
                f"frames of {frame.width}x{frame.height} pixels; at most {MAX_PIXELS} are read; scale it down"
            )
        if index in wanted:
            # A stream may change its size midway; the first chosen frame determines the size of all.
            size = size or {"width": frame.width, "height": frame.height}
            turns = frame.rotation // 90
            # Contiguous: the landmarker reads the memory of an image regardless of its strides.
            yield index, np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24", **size), turns))


def _blocks(
    images: Iterable[tuple[int, np.ndarray]], times: np.ndarray, chosen: Mapping[str, Counter]
) -> Iterator[tuple[str, Frames]]:
    """Groups the images of each choice into blocks."""
    waiting = {name: [] for name in chosen}
    for index, image in images:
        for name, counts in chosen.items():
            waiting[name] += [(index, image)] * counts[index]
            while len(waiting[name]) >= BLOCK:
                yield name, _stacked(waiting[name][:BLOCK], times)
                del waiting[name][:BLOCK]
    for name, rest in waiting.items():
        if rest:
            yield name, _stacked(rest, times)


def _stacked(images: Sequence[tuple[int, np.ndarray]], times: np.ndarray) -> Frames:
    return Frames(np.stack([image for _, image in images]), times[[index for index, _ in images]])


def decodable(streams: Iterable[Any]) -> list:
    """Returns those streams of a container that have a decoder, set to decode in one thread.

    Clips are decoded in parallel, one worker each; besides, a single thread decodes damaged data deterministically.
    """
    supported = [stream for stream in streams if stream.codec_context is not None]
    for stream in supported:
        stream.thread_count = 1
    return supported


def video_stream(container: Any) -> Any:
    """Returns the first video stream of a container that is no cover art, or None."""
    import av

    moving = (s for s in decodable(container.streams.video) if not s.disposition & av.stream.Disposition.attached_pic)
    return next(moving, None)


def _from(container: Any, stream: Any, units: Callable, start: float) -> Iterator:
    """Yields frames or packets of a stream from the last seekable point before `start`."""
    items = units(container, stream)
    if start > _MARGIN:
        container.seek(int((start - _MARGIN) / stream.time_base), stream=stream)
        first = next(items, None)
        if first is not None and (seconds := _seconds(first)) is not None and seconds <= start:
            yield first
        else:  # a faulty index leads past `start`
            container.seek(max(0, int((stream.start_time or 0) - _MARGIN / stream.time_base)), stream=stream)
            items = units(container, stream)
    yield from items


def _frames(container: Any, stream: Any) -> Iterator:
    """Yields every frame that decodes; all audio and video is decoded in this function."""
    import av

    for packet in _packets(container, stream):
        try:
            frames = stream.decode(packet)
        except av.FFmpegError:
            continue
        yield from frames


def _shown_packets(container: Any, stream: Any) -> Iterator:
    """Yields every packet that announces a frame."""
    return (p for p in _packets(container, stream) if p is not None and p.size and not p.is_discard)


def _packets(container: Any, stream: Any) -> Iterator:
    """Yields packets until the container breaks off, then None, for the frames that the decoder still holds."""
    import av

    while True:
        try:
            yield from container.demux(stream)
            return
        except IndexError:
            # PyAV fails on a packet of a stream that the header does not announce; the next ones are intact.
            continue
        except av.FFmpegError:
            yield None
            return

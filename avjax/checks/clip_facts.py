"""Facts about the files of clips, measured by opening every one; `findings.py` judges them.

Worker processes decode one frame at a time and keep none. Facts are appended to a file, one JSON line per clip, so that
an interrupted inspection continues where it stopped.
"""

import dataclasses
import functools
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from avjax.datasets.base import Clip
from avjax.errors import UnusableMedia
from avjax.media import video
from avjax.utils import media_files, progress, worker_pool
from avjax.utils.storage import sha256

if TYPE_CHECKING:
    from avjax.media.faces import FaceTracker

SILENT = 1e-3  # of full scale, -60 dB: below, nobody speaks
# Lossy codecs round off clipped peaks, which then lie on either side of full scale: they count from -1 dB on.
FULL = 0.891
BLACK = 32  # of 255: no pixel of a black frame is brighter
FACE_FRAMES = 8
CLIP_SECONDS = 120.0
# A worker takes small clips in batches, or communication would cost as much as opening them.
_BATCH_CLIPS = 48
_BATCH_BYTES = 4_000_000
_BATCHES = 16  # per worker at least, so that all finish at about the same time


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about the files of a clip; times in seconds on its clock (`media/video.py`), None if unknown.

    Attributes:
      id: of the clip.
      key: identity of the clip's files (`key_of`).
      sha256: of the video file, in hex.
      failed: why the files could not be inspected, such as a decoder that crashed; "" if they could.
      no_video, no_audio: why a modality is missing, "" if it is not.
      frames: how many decode; stated_frames: how many its header states; fps: measured, frames per second.
      video, audio: begin and end; video_stated, audio_stated: end by the header; stated: end of the clip by its label
        or its container.
      black: seconds before the first frame that is not black; the duration if all are.
      rate: samples per second; peak: of full scale; full: proportion of samples at full scale.
      speaks: when audio is first above -60 dB of full scale.
      face: whether any of 8 evenly spaced frames shows one; None if faces were not looked for.
    """

    id: str
    key: list
    sha256: str = ""
    failed: str = ""
    no_video: str = ""
    no_audio: str = ""
    frames: int = 0
    stated_frames: int = 0
    fps: float | None = None
    video: tuple[float, float] | None = None
    video_stated: float | None = None
    audio: tuple[float, float] | None = None
    audio_stated: float | None = None
    stated: float | None = None
    black: float = 0.0
    rate: int = 0
    peak: float = 0.0
    full: float = 0.0
    speaks: float | None = None
    face: bool | None = None


def key_of(clip: Clip) -> list:
    """Returns the identity of a clip: size and modification time of its files, and its part of them.

    Raises:
      OSError: a file is missing.
    """
    files = [[stat.st_size, stat.st_mtime_ns] for stat in map(os.stat, filter(None, (clip.path, clip.audio)))]
    return [*files, clip.start, clip.end]


def inspect_all(
    clips: Sequence[Clip],
    record: Path,
    console: Console,
    *,
    model: Path | None = None,
    processes: int = 0,
    clip_seconds: float = CLIP_SECONDS,
) -> dict[str, Facts]:
    """Opens the clips that the file `record` lacks, and adds their facts to it; returns clip id → facts.

    Args:
      clips: of the data set.
      record: the file of facts.
      console: for progress.
      model: the face landmarker's file, or None to look for no faces.
      processes: 0 = one per core.
      clip_seconds: time limit of one clip.

    Raises:
      AvjaxError: a worker process cannot start.
    """
    keys, facts = _keys(clips)
    recorded = {i: f for i, f in _read(record).items() if f.key == keys.get(i) and (f.face is not None or not model)}
    todo = [(c, keys[c.id]) for c in clips if c.id in keys.keys() - recorded.keys()]
    if recorded:
        console.print(f"{len(clips)} clips, {len(recorded)} opened before")
    with record.open("a", encoding="utf-8") as file:
        count = processes or os.cpu_count() or 1
        done = _opened(_batches(todo, len(todo) // (_BATCHES * count)), model, count, clip_seconds)
        for opened in progress.bar(done, len(todo), "opening clips", console):
            if not opened.failed:  # perhaps due to the machine: it is tried again
                file.write(json.dumps(dataclasses.asdict(opened)) + "\n")
                file.flush()
            recorded[opened.id] = opened
    if not model:  # the report must not depend on earlier inspections
        recorded = {i: dataclasses.replace(f, face=None) for i, f in recorded.items()}
    return facts | recorded


def _keys(clips: Sequence[Clip]) -> tuple[dict[str, list], dict[str, Facts]]:
    """Returns clip id → key, and clip id → facts with the reason for clips that are gone by now."""
    keys, facts = {}, {}
    for clip in clips:
        try:
            keys[clip.id] = key_of(clip)
        except OSError as error:
            facts[clip.id] = Facts(clip.id, [], failed=media_files.reason_of(error))
    return keys, facts


def _read(record: Path) -> dict[str, Facts]:
    """Reads the recorded facts, the newest of each clip; a truncated last line is removed from the file."""
    if not record.is_file():
        return {}
    content = record.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        os.truncate(record, len(complete))
    return {facts.id: facts for facts in map(_parsed, complete.splitlines()) if facts}


def _parsed(line: bytes) -> Facts | None:
    try:
        facts = Facts(**json.loads(line))
    except (ValueError, TypeError):  # a power cut leaves damaged lines, another version other fields
        return None
    return dataclasses.replace(
        facts, video=facts.video and tuple(facts.video), audio=facts.audio and tuple(facts.audio)
    )


def _batches(jobs: Sequence[tuple[Clip, list]], most: int) -> list[list[tuple[Clip, list]]]:
    """Batches the jobs: at most `most` and `_BATCH_CLIPS` each, and at most `_BATCH_BYTES` unless it is one clip."""
    batches, room = [], 0
    for job in jobs:
        size = job[1][0][0]
        if not batches or size > room or len(batches[-1]) >= min(most, _BATCH_CLIPS):
            batches.append([])
            room = _BATCH_BYTES
        batches[-1].append(job)
        room -= size
    return batches


def _opened(
    batches: Sequence[list[tuple[Clip, list]]], model: Path | None, count: int, seconds: float
) -> Iterator[Facts]:
    again = []
    for batch, outcome in worker_pool.each(
        _inspect_batch, batches, count=count, seconds=seconds, setup=set_up, arguments=(model,)
    ):
        if not isinstance(outcome, worker_pool.Failure):
            yield from outcome
        elif len(batch) > 1:  # one clip caused it: each is tried alone
            again += [[job] for job in batch]
        else:
            (clip, key), *_ = batch
            yield Facts(clip.id, key, failed=outcome.reason)
    if again:
        yield from _opened(again, model, count, seconds)


# ---- In a worker -----------------------------------------------------------------------------------------------------


_TRACKER: "FaceTracker | None" = None  # of a worker process


def set_up(model: Path | None) -> None:
    """Sets up a worker: what all its clips share."""
    # Messages of native libraries about every start and file would flood the progress.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    global _TRACKER
    _TRACKER = None
    if model:
        from avjax.media.faces import FaceTracker

        _TRACKER = FaceTracker(model)


def _inspect_batch(batch: Sequence[tuple[Clip, list]]) -> list[Facts]:
    return [inspect(clip, key, _TRACKER) for clip, key in batch]


def inspect(clip: Clip, key: list, tracker: "FaceTracker | None" = None) -> Facts:
    """Opens the files of a clip and decodes all of them; `key` is `key_of(clip)`; no `tracker`, no search for faces."""
    facts = {"sha256": _sha256(clip.path)}
    for missing, measure in (("no_video", _video), ("no_audio", _audio)):
        try:
            facts |= measure(clip)
        except UnusableMedia as error:
            facts[missing] = str(error)
    if tracker:
        facts["face"] = "frames" in facts and _shows_face(clip, tracker)
    return Facts(clip.id, key, **facts)


# Clips that are parts of one file follow each other.
_sha256 = functools.lru_cache(8)(sha256)


def _video(clip: Clip) -> dict[str, object]:
    times, black, light = [], 0, False
    with video.opened(clip.path) as container:
        stream = video.video_stream(container)
        if stream is None:
            raise UnusableMedia("no video stream")
        for time, frame in _part(clip, container, stream):
            if frame.width * frame.height > video.MAX_PIXELS:
                raise UnusableMedia(f"frames of {frame.width}x{frame.height} pixels; at most {video.MAX_PIXELS}")
            times.append(time)
            light = light or not _is_black(frame)
            black = black if light else len(times)
        stated = {"stated": _end(clip, container), "video_stated": _stated(clip, container, stream)}
        stated_frames = 0 if clip.start or clip.end else stream.frames
    if not times:
        raise UnusableMedia(f"not one frame can be decoded{video.within(clip.start or 0.0, clip.end)}")
    # In some containers (AVI) the times of the frames are out of order.
    times.sort()
    fps = round((len(times) - 1) / (times[-1] - times[0]), 3) if times[-1] > times[0] else None
    over = times[-1] + (1 / fps if fps else 0.0)
    return stated | {
        "frames": len(times),
        "stated_frames": stated_frames,
        "fps": fps,
        "video": (times[0], over),
        "black": (times[black] if black < len(times) else over) - times[0],
    }


def _is_black(frame: Any) -> bool:
    return int(frame.to_ndarray(format="gray", width=32, height=24).max()) < BLACK


def _audio(clip: Clip) -> dict[str, object]:
    begin = speaks = None
    count, full, peak, over = 0, 0, 0.0, 0.0
    with video.opened(clip.audio or clip.path) as container:
        streams = video.decodable(container.streams.audio)
        if not streams:
            raise UnusableMedia("no audio stream")
        for time, frame in _part(clip, container, streams[0]):
            levels = _levels(frame)
            begin = time if begin is None else begin
            over = time + frame.samples / frame.rate
            loudest = float(levels.max(initial=0.0))
            speaks = time if speaks is None and loudest >= SILENT else speaks
            peak = max(peak, loudest)
            full += int(np.count_nonzero(levels >= FULL))
            count += levels.size
            rate = frame.rate
        stated = _stated(clip, container, streams[0])
    if not count:
        raise UnusableMedia(f"no audio can be decoded{video.within(clip.start or 0.0, clip.end)}")
    levels = {"peak": round(peak, 6), "full": full / count, "speaks": speaks, "rate": rate}
    return levels | {"audio": (begin, over), "audio_stated": stated}


def _levels(frame: Any) -> np.ndarray:
    """Returns the magnitudes of the samples of a frame, 1 = full scale."""
    samples = frame.to_ndarray()
    if samples.dtype.kind == "f":
        return np.abs(samples) if np.isfinite(samples).all() else np.abs(np.nan_to_num(samples, posinf=1, neginf=-1))
    if samples.dtype == np.uint8:
        samples = samples.astype(np.int16) - 128
        return np.abs(samples) / np.float32(128)
    return np.abs(samples.astype(np.float32)) / -float(np.iinfo(samples.dtype).min)


def _part(clip: Clip, container: Any, stream: Any) -> Iterator[tuple[float, object]]:
    """Yields the (time, frame) pairs of a stream that belong to the clip."""
    start = clip.start or 0.0
    for time, frame in video.decoded(container, stream, start, clip.end):
        if not clip.start or time >= start:
            yield time, frame


def _end(clip: Clip, container: Any) -> float | None:
    """Returns the end of the clip by its label, else by its container."""
    return clip.end or (container.duration / 1e6 if container.duration else None)


def _stated(clip: Clip, container: Any, stream: Any) -> float | None:
    """Returns the end of a stream by its header, no later than that of the clip."""
    if stream.duration is None:
        return None
    over = float(((stream.start_time or 0) + stream.duration) * stream.time_base) - (container.start_time or 0) / 1e6
    return min(over, clip.end or over)


def _shows_face(clip: Clip, tracker: "FaceTracker | None") -> bool:
    chosen = {"": video.spread(FACE_FRAMES)}
    try:
        for blocks in video.passes(clip.path, chosen, start=clip.start or 0.0, end=clip.end):
            images = (image[None] for _, frames in blocks for image in frames.images)
            if any(tracker.track(video.Frames(image, np.zeros(1))).present[0] for image in images):
                return True
    except UnusableMedia:
        pass
    return False


def strip(job: tuple[Clip, int]) -> bytes:
    """Draws the first frame of a clip, two between, and the last, side by side, as a small JPEG.

    `job` is (clip, number of frames).

    Raises:
      UnusableMedia: they do not decode.
    """
    from PIL import Image

    clip, count = job
    chosen = [0, count // 3, 2 * count // 3, count - 1]
    frames = video.read_frames(clip.path, indices=chosen, start=clip.start or 0.0, end=clip.end)
    out = io.BytesIO()
    Image.fromarray(np.hstack(list(video.shrunk(frames.images, 72)))).save(out, "JPEG", quality=70)
    return out.getvalue()

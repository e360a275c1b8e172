"""What is in the files of clips, found out by opening every one: facts, of which `findings.py` makes verdicts.

Worker processes decode a frame at a time and keep none. What they find is appended to a file, a JSON line for each
clip, so that a killed inspection goes on where it was.
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

SILENT = 1e-3  # of full scale, -60 dB: below, nothing is said
# Lossy codecs round off clipped tops, which then lie on either side of full scale: from -1 dB on they count.
FULL = 0.891
BLACK = 32  # of 255: in a black picture nothing is brighter
FACE_FRAMES = 8
CLIP_SECONDS = 120.0
# A worker takes small clips by the handful, or handing them over would cost as much as opening them.
_BATCH_CLIPS = 48
_BATCH_BYTES = 4_000_000
_BATCHES = 16  # for each worker at least, so that none is left with much to do when the others have done


@dataclasses.dataclass(frozen=True)
class Facts:
    """What was found in the files of a clip; times in seconds on its clock (`media/video.py`), None where unknown.

    Attributes:
      id: of the clip.
      key: what the clip was made of (`key_of`).
      sha256: of the file with the picture, in hex.
      failed: why nothing could be found out, such as a decoder that crashed; "" where it could.
      no_picture, no_sound: why there is none, "" where there is.
      frames: how many decode; stated_frames: how many its header states; fps: measured, frames a second.
      picture, sound: from when to when there is picture and sound; picture_stated, sound_stated: up to when by the
        header; stated: up to when the clip should last by its label or its container.
      black: seconds before the first picture that is not black, all of them where none is.
      rate: samples a second; peak: of full scale; full: share of samples at full scale.
      speaks: when sound is first above -60 dB of full scale.
      face: whether one was seen in any of 8 evenly spaced frames; None where nobody looked.
    """

    id: str
    key: list
    sha256: str = ""
    failed: str = ""
    no_picture: str = ""
    no_sound: str = ""
    frames: int = 0
    stated_frames: int = 0
    fps: float | None = None
    picture: tuple[float, float] | None = None
    picture_stated: float | None = None
    sound: tuple[float, float] | None = None
    sound_stated: float | None = None
    stated: float | None = None
    black: float = 0.0
    rate: int = 0
    peak: float = 0.0
    full: float = 0.0
    speaks: float | None = None
    face: bool | None = None


def key_of(clip: Clip) -> list:
    """By which a clip is seen to be what it was: size and time of change of its files, and its part of them.

    Raises:
      OSError: a file is not there.
    """
    files = [[about.st_size, about.st_mtime_ns] for about in map(os.stat, filter(None, (clip.path, clip.audio)))]
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
    """Opens what the file `record` does not know yet, and adds it there; returns clip id → facts.

    Args:
      model: the face landmarker's file, or None to look for no faces.
      processes: 0 = one per core; clip_seconds: time limit of one clip.
    Raises:
      AvjaxError: a worker process cannot start.
    """
    keys, facts = _keys(clips)
    known = {i: f for i, f in _read(record).items() if f.key == keys.get(i) and (f.face is not None or not model)}
    todo = [(c, keys[c.id]) for c in clips if c.id in keys.keys() - known.keys()]
    if known:
        console.print(f"{len(clips)} clips, {len(known)} opened before")
    with record.open("a", encoding="utf-8") as file:
        count = processes or os.cpu_count() or 1
        done = _opened(_batches(todo, len(todo) // (_BATCHES * count)), model, count, clip_seconds)
        for found in progress.bar(done, len(todo), "opening clips", console):
            if not found.failed:  # that may have been the machine's fault: it is tried again
                file.write(json.dumps(dataclasses.asdict(found)) + "\n")
                file.flush()
            known[found.id] = found
    if not model:  # what is reported must not depend on what was looked for before
        known = {i: dataclasses.replace(found, face=None) for i, found in known.items()}
    return facts | known


def _keys(clips: Sequence[Clip]) -> tuple[dict[str, list], dict[str, Facts]]:
    """Clip id → key; and facts that say why of clips that are gone by now."""
    keys, facts = {}, {}
    for clip in clips:
        try:
            keys[clip.id] = key_of(clip)
        except OSError as error:
            facts[clip.id] = Facts(clip.id, [], failed=media_files.reason_of(error))
    return keys, facts


def _read(record: Path) -> dict[str, Facts]:
    """What was found before, the newest of each clip; a last line that was cut short is taken off the file."""
    if not record.is_file():
        return {}
    content = record.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(record, len(whole))
    return {facts.id: facts for facts in map(_parsed, whole.splitlines()) if facts}


def _parsed(line: bytes) -> Facts | None:
    try:
        facts = Facts(**json.loads(line))
    except (ValueError, TypeError):  # a power cut leaves odd lines, another version other fields
        return None
    return dataclasses.replace(
        facts, picture=facts.picture and tuple(facts.picture), sound=facts.sound and tuple(facts.sound)
    )


def _batches(jobs: Sequence[tuple[Clip, list]], most: int) -> list[list[tuple[Clip, list]]]:
    """Jobs by the handful: no more than `most` or `_BATCH_CLIPS`, nor, unless it is one, than `_BATCH_BYTES`."""
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
    for batch, answer in worker_pool.each(
        _inspect_batch, batches, count=count, seconds=seconds, setup=set_up, arguments=(model,)
    ):
        if not isinstance(answer, worker_pool.Failure):
            yield from answer
        elif len(batch) > 1:  # the others must not suffer for the one that did it
            again += [[job] for job in batch]
        else:
            (clip, key), *_ = batch
            yield Facts(clip.id, key, failed=answer.reason)
    if again:
        yield from _opened(again, model, count, seconds)


# ---- In a worker -----------------------------------------------------------------------------------------------------


_TRACKER: "FaceTracker | None" = None  # of a worker process


def set_up(model: Path | None) -> None:
    """What all clips of a worker share."""
    # What native libraries say of every start and every odd file would drown the progress.
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
    """Opens the files of a clip and decodes all of it.

    Args:
      key: `key_of(clip)`; tracker: a `FaceTracker`, or None to look for no face.
    """
    found = {"sha256": _sha256(clip.path)}
    for what, measure in (("no_picture", _picture), ("no_sound", _sound)):
        try:
            found |= measure(clip)
        except UnusableMedia as error:
            found[what] = str(error)
    if tracker:
        found["face"] = "frames" in found and _shows_face(clip, tracker)
    return Facts(clip.id, key, **found)


# Clips that are parts of one file come one after the other.
_sha256 = functools.lru_cache(8)(sha256)


def _picture(clip: Clip) -> dict[str, object]:
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
        about = {"stated": _end(clip, container), "picture_stated": _stated(clip, container, stream)}
        stated_frames = 0 if clip.start or clip.end else stream.frames
    if not times:
        raise UnusableMedia(f"not one frame can be decoded{video.within(clip.start or 0.0, clip.end)}")
    # Some containers (AVI) jumble the times of the frames.
    times.sort()
    fps = round((len(times) - 1) / (times[-1] - times[0]), 3) if times[-1] > times[0] else None
    over = times[-1] + (1 / fps if fps else 0.0)
    return about | {
        "frames": len(times),
        "stated_frames": stated_frames,
        "fps": fps,
        "picture": (times[0], over),
        "black": (times[black] if black < len(times) else over) - times[0],
    }


def _is_black(frame: Any) -> bool:
    return int(frame.to_ndarray(format="gray", width=32, height=24).max()) < BLACK


def _sound(clip: Clip) -> dict[str, object]:
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
    share = {"peak": round(peak, 6), "full": full / count, "speaks": speaks, "rate": rate}
    return share | {"sound": (begin, over), "sound_stated": stated}


def _levels(frame: Any) -> np.ndarray:
    """Magnitudes of the samples of a frame, 1 = full scale."""
    samples = frame.to_ndarray()
    if samples.dtype.kind == "f":
        return np.abs(samples) if np.isfinite(samples).all() else np.abs(np.nan_to_num(samples, posinf=1, neginf=-1))
    if samples.dtype == np.uint8:
        samples = samples.astype(np.int16) - 128
        return np.abs(samples) / np.float32(128)
    return np.abs(samples.astype(np.float32)) / -float(np.iinfo(samples.dtype).min)


def _part(clip: Clip, container: Any, stream: Any) -> Iterator[tuple[float, object]]:
    """The (time, frame) pairs of a stream that belong to the clip."""
    start = clip.start or 0.0
    for time, frame in video.decoded(container, stream, start, clip.end):
        if not clip.start or time >= start:
            yield time, frame


def _end(clip: Clip, container: Any) -> float | None:
    """When the clip ends, by what is said of it, else by its container."""
    return clip.end or (container.duration / 1e6 if container.duration else None)


def _stated(clip: Clip, container: Any, stream: Any) -> float | None:
    """When a stream ends by its header, no later than the clip."""
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
    """The first frame of a clip, two between, and the last, beside each other as a small JPEG; `job`: clip, frames.

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

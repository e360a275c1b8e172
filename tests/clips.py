"""Tiny media files for tests: a synthetic pattern and a sine, no face and no speech."""

import collections
import pathlib
import wave
from fractions import Fraction

import numpy as np

RATE = 16000


def write_mp4(path: pathlib.Path, *, seconds=1.0, with_video=True, hz=220.0, fps=10) -> pathlib.Path:
    """Writes `seconds` of a moving pattern (if `with_video`) with a sine of `hz` (silence at 0, no audio at None)."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        streams = []
        if with_video:
            video = container.add_stream("mpeg4", rate=fps)
            video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
            streams.append((video, _frames(round(seconds * fps))))
        if hz is not None:
            audio = container.add_stream("aac", rate=RATE, layout="mono")
            streams.append((audio, _audio(seconds, hz)))
        for stream, frames in streams:
            for frame in frames:
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def write_wav(path: pathlib.Path, *, seconds=1.0, hz=220.0) -> pathlib.Path:
    """Writes `seconds` of a sine of `hz`."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(_sine(seconds, hz).tobytes())
    return path


def _sine(seconds: float, hz: float) -> np.ndarray:
    return (8000 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.int16)


def _frames(count: int):
    import av

    y, x = np.mgrid[:64, :96]
    for i in range(count):
        grey = ((x * (i + 1) + y * 3) % 256).astype(np.uint8)
        frame = av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, -1), "rgb24")
        frame.pts = i
        yield frame


def _audio(seconds: float, hz: float):
    import av

    samples = _sine(seconds, hz)
    for at in range(0, len(samples), 1024):
        frame = av.AudioFrame.from_ndarray(samples[None, at : at + 1024], "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, at, Fraction(1, RATE)
        yield frame


def count_decoding(monkeypatch) -> collections.Counter:
    """Counts what is decoded from now on: "video" and "audio" frames, and their "video passes" and "audio passes"."""
    from avjax.media import video

    counts, frames = collections.Counter(), video._frames

    def counted(container, stream):
        counts[f"{stream.type} passes"] += 1
        for frame in frames(container, stream):
            counts[stream.type] += 1
            yield frame

    monkeypatch.setattr(video, "_frames", counted)
    return counts

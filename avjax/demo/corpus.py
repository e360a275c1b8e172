"""The demo corpus: short synthetic clips in MAFW's own layout, so that everything can be tried without MAFW.

One portrait, warped and recoloured into ten "speakers", and a babbling synthetic voice. Every class has an expression
and a manner of speaking; some classes have nearly the same expression and others the same manner, and noise is added to
all, so that neither modality is sufficient. Lead-in, length and loudness are independent of the class. Folds are
disjoint in speakers. Scores on this corpus do not predict performance on people.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from avjax.demo import face, voice
from avjax.demo.voice import Manner
from avjax.errors import AvjaxError
from avjax.media.audio import SAMPLE_RATE
from avjax.media.requirements import need_media
from avjax.utils import paths, progress, worker_pool
from avjax.utils.storage import only_writer, read_json, replacing, write_text

VERSION = 2  # each version is a corpus of its own, in its own folder
_SEED = 1  # of the clips, equal in versions 1 and 2
TAKES = 2  # clips per class and speaker
SPEAKERS = 10
FPS = 12
_CLIP_SECONDS = 120.0  # time limit for making one clip
# Units of random movements; the others have a cause in every clip.
_STRAY = tuple(n for n in face.UNITS if n not in ("blink", "lips_together", "jaw_drop"))

# Expressions follow the prototypes of the Facial Action Coding System, as far as one portrait can show them; manners
# follow common findings on vocal expression (high, fast and strong when aroused, and so on). The middle manner is 0
# semitones, 4.1 syllables/s, 5 dB.
_HIGH_FAST_STRONG = Manner(5.0, 5.8, 11.0)
_HIGH_FAST_WEAK = Manner(5.0, 5.8, 1.0)
_LOW_SLOW_WEAK = Manner(-5.0, 2.8, 1.0)
_LOW_SLOW_STRONG = Manner(-5.0, 2.8, 11.0)
_FAST_WEAK = Manner(0.0, 5.8, 1.0)
_LOW = Manner(-5.0, 4.1, 5.0)
_MIDDLE = Manner(0.0, 4.1, 5.0)
_FROWN = {"brow_lowerer": 1.0, "lid_tightener": 0.4, "lip_pressor": 0.7}
_DROOP = {"inner_brow_raiser": 0.8, "lip_corner_depressor": 0.9, "blink": 0.2}
_WIDE = {"inner_brow_raiser": 0.8, "outer_brow_raiser": 0.9, "upper_lid_raiser": 0.9, "jaw_drop": 0.5}
EMOTIONS: dict[str, tuple[Mapping[str, float], Manner]] = {
    "anger": (_FROWN, _HIGH_FAST_STRONG),
    "disgust": (_FROWN | {"upper_lip_raiser": 0.6, "lip_pressor": 0.0}, _LOW_SLOW_STRONG),
    "fear": (_WIDE | {"lip_stretcher": 0.5, "jaw_drop": 0.2}, _HIGH_FAST_WEAK),
    "happiness": ({"lip_corner_puller": 1.0, "lid_tightener": 0.5}, _HIGH_FAST_STRONG),
    "neutral": ({}, _MIDDLE),
    "sadness": (_DROOP, _LOW_SLOW_WEAK),
    "surprise": (_WIDE, _HIGH_FAST_STRONG),
    "contempt": ({"one_lip_corner_puller": 1.0, "lid_tightener": 0.3}, _LOW_SLOW_STRONG),
    "anxiety": (_WIDE | {"lip_stretcher": 0.5, "jaw_drop": 0.0}, _FAST_WEAK),
    "helplessness": (_DROOP | {"lip_corner_depressor": 0.7}, _HIGH_FAST_WEAK),
    "disappointment": (_DROOP | {"lip_pucker": 0.2}, _LOW),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A clip to be made: its `name` (without suffix), `emotion`, `speaker` (0–9) and `fold` (1–5)."""

    name: str
    emotion: str
    speaker: int
    fold: int


@dataclasses.dataclass(frozen=True)
class Look:
    """The appearance of a speaker.

    Attributes:
      mirrored: whether the portrait is mirrored.
      gains, gamma: gains (3,) and gamma of the colours.
      units: units that are always active.
      aspect: factor on the width of the portrait.
    """

    mirrored: bool
    gains: np.ndarray
    gamma: float
    units: Mapping[str, float]
    aspect: float


def plans() -> list[Plan]:
    """Returns all clips in the order of their names, which are independent of class and speaker."""
    every = [(e, s) for e in EMOTIONS for s in range(SPEAKERS) for _ in range(TAKES)]
    order = np.random.default_rng(_SEED).permutation(len(every))
    return [Plan(f"{n:05d}", *every[i], fold=every[i][1] // 2 + 1) for n, i in enumerate(order, 1)]


def folder() -> Path:
    """Returns the folder of this version of the corpus: `$AVJAX_CACHE/demo/v<version>`."""
    return paths.cache() / "demo" / f"v{VERSION}"


def write_lists(root: Path) -> None:
    """Writes fold lists as in MAFW, five times train.txt and test.txt, the speakers, and a note."""
    every = plans()
    write_text(root / "speakers.csv", "".join(["clip,speaker\n", *(f"{p.name},{p.speaker}\n" for p in every)]))
    for fold in range(1, 6):
        for part in ("train", "test"):
            lines = [f"{p.name}.mp4 {p.emotion}\n" for p in every if (p.fold == fold) == (part == "test")]
            write_text(root / f"Train & Test Set/single/no_caption/set_{fold}/{part}.txt", "".join(lines))
    portrait = read_json(paths.path("data/demo/portrait.json"))
    note = (
        f"Demo corpus {VERSION} of avjax: synthetic, not MAFW.\nPortrait: {portrait['source']}\n{portrait['licence']}\n"
    )
    write_text(root / "README.txt", note)


def make(root: Path, console: Console) -> None:
    """Makes the missing clips of the corpus at `root`; the next call resumes a killed one.

    Raises:
      AvjaxError: packages are missing, the folder cannot be written, or a clip cannot be made.
    """
    need_media()
    clips = clip_path(root, plans()[0]).parent
    with only_writer(clips, "set AVJAX_CACHE to another folder"):
        jobs = [(root, plan) for plan in plans() if not clip_path(root, plan).is_file()]
        done = worker_pool.each(_make_one, jobs, count=os.cpu_count() or 1, seconds=_CLIP_SECONDS, setup=_single_core)
        for (_, plan), outcome in progress.bar(done, len(jobs), "demo clips", console):
            if isinstance(outcome, worker_pool.Failure):
                raise AvjaxError(f"{clip_path(root, plan)}: cannot be made: {outcome.reason}")
        write_lists(root)


def _single_core() -> None:
    """Limits a worker process to one core, as there are as many workers as cores."""
    import cv2

    cv2.setNumThreads(1)


def _make_one(job: tuple[Path, Plan]) -> None:
    write_clip(*job)


def clip_path(root: Path, plan: Plan) -> Path:
    """Returns the path of a clip."""
    return root / "data" / "clips" / f"{plan.name}.mp4"


def write_clip(root: Path, plan: Plan) -> None:
    """Renders one clip; the same plan always gives the same video and audio."""
    rng = np.random.default_rng([_SEED, int(plan.name)])
    samples, openness = _audio(plan, rng)
    with replacing(clip_path(root, plan), "wb") as file:
        _encode(file, _frames(plan, openness, rng), samples)


def _audio(plan: Plan, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Synthesises the clip's samples (n,) at 16 kHz and the openness (n,) of the mouth."""
    manner = EMOTIONS[plan.emotion][1]
    manner = Manner(
        manner.semitones + rng.normal(0, 1.2),
        manner.rate * np.exp(rng.normal(0, 0.1)),
        manner.stress + rng.normal(0, 1.5),
    )
    lead, length, tail = rng.uniform(0.1, 0.5), rng.uniform(1.3, 1.9), rng.uniform(0.1, 0.4)
    spoken, openness = voice.speak(_voice(plan.speaker), manner, length, rng)
    silence = [(round(lead * SAMPLE_RATE), round(tail * SAMPLE_RATE))]
    spoken, openness = np.pad(spoken, silence), np.pad(openness, silence)
    noise = rng.normal(size=len(spoken)) * 10 ** (-rng.uniform(28, 38) / 20)
    samples = spoken + noise
    # Loudness is set last, so that it is independent of stress and rate.
    level = 10 ** (rng.uniform(-28, -20) / 20)
    return np.clip(samples * level / np.sqrt(np.mean(np.square(samples))), -1, 1), openness


def _frames(plan: Plan, openness: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Renders (s, s, 3) uint8 RGB frames for the duration of the audio."""
    import cv2

    portrait, look = face.portrait(), _look(plan.speaker)
    size = len(portrait.image)
    times = np.arange(round(len(openness) / SAMPLE_RATE * FPS)) / FPS
    expressions = _movement(plan.emotion, look, times, openness, rng)
    drift = np.cumsum(rng.normal(0, 1, (len(times), 4)), 0) * (0.35, 0.35, 0.25, 0.002)
    sway = drift + rng.normal(0, 1, 4) * (3, 3, 2, 0.03)
    colours = _colours(look, rng.uniform(0.85, 1.15))
    noise = rng.normal(0, 4, (2 * size, 2 * size, 3)).astype(np.float32)
    for units, head in zip(expressions, sway, strict=True):
        image = portrait.render(units, _affine(head, look.aspect, size))
        image = cv2.LUT(image[:, ::-1] if look.mirrored else image, colours)
        x, y = rng.integers(size, size=2)
        yield np.clip(np.round(image + noise[y : y + size, x : x + size]), 0, 255).astype(np.uint8)


def _movement(
    emotion: str, look: Look, times: np.ndarray, openness: np.ndarray, rng: np.random.Generator
) -> list[dict[str, float]]:
    """Returns the units of every frame: the expression sets in and varies, the mouth talks, the eyes blink once."""
    target = _expression(emotion, rng)
    onset, ramp = rng.uniform(0, 0.3), rng.uniform(0.15, 0.4)
    course = np.clip((times - onset) / ramp, 0.1, 1) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.5, 1) * times))
    talk = 0.25 * openness[np.minimum((times * SAMPLE_RATE).astype(int), len(openness) - 1)]
    blink = np.exp(-(((times - rng.uniform(0, len(openness) / SAMPLE_RATE)) / 0.08) ** 2))
    frames = []
    for strength, open_by, closed_by in zip(course, talk, blink, strict=True):
        units = {name: strength * s for name, s in target.items()}
        for name, s in (*look.units.items(), ("jaw_drop", open_by), ("blink", closed_by)):
            units[name] = units.get(name, 0) + s
        frames.append(units)
    return frames


def _affine(head: np.ndarray, aspect: float, size: int) -> np.ndarray:
    """Returns the transformation (2, 3) for `head` = pixels right and down, degrees, zoom; `aspect` scales width."""
    import cv2

    dx, dy, degrees, zoom = head
    out = cv2.getRotationMatrix2D((size / 2, size / 2), degrees, 1 + zoom)
    out[0, :2] *= aspect
    out[:, 2] += (dx + (1 - aspect) * size / 2, dy)
    return out


def _colours(look: Look, light: float) -> np.ndarray:
    """Returns the look-up table (1, 256, 3) uint8 of red, green and blue."""
    values = np.linspace(0, 1, 256)[:, None] ** look.gamma * look.gains * light
    return np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)[None]


def _expression(emotion: str, rng: np.random.Generator) -> dict[str, float]:
    """Returns the class's units at a random strength, mixed with those of another class and small random movements."""
    own, other = EMOTIONS[emotion][0], EMOTIONS[rng.choice(list(EMOTIONS))][0]
    strength, proportion = rng.uniform(0.5, 1.0), rng.uniform(0, 0.35)
    stray = dict(zip(rng.choice(_STRAY, 4, replace=False), rng.normal(0, 0.15, 4), strict=True))
    names = sorted({*own, *other, *stray})
    return {n: strength * own.get(n, 0) + proportion * other.get(n, 0) + stray.get(n, 0) for n in names}


@functools.cache
def _look(speaker: int) -> Look:
    rng = np.random.default_rng([_SEED, 1, speaker])
    return Look(
        mirrored=bool(speaker % 2),
        gains=(0.75 + 0.25 * rng.random() + rng.uniform(-0.08, 0.08, 3)).astype(np.float32),
        gamma=float(rng.uniform(0.8, 1.3)),
        units={n: float(rng.normal(0, 0.12)) for n in _STRAY},
        aspect=float(rng.uniform(0.93, 1.05)),
    )


@functools.cache
def _voice(speaker: int) -> voice.Speaker:
    rng = np.random.default_rng([_SEED, 2, speaker])
    return voice.Speaker(rng.uniform(160, 192), rng.uniform(0.88, 1.12), rng.uniform(-11, -7))


def _encode(file: Any, frames: Iterator[np.ndarray], samples: np.ndarray) -> None:
    import av

    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=FPS)
        video.width = video.height = len(face.portrait().image)
        video.pix_fmt, video.bit_rate = "yuv420p", 600_000
        # With more threads, the division of frames would depend on the machine.
        video.codec_context.thread_count = 1
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        audio.bit_rate = 64_000
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for at in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, at : at + 1024].astype(np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, at, Fraction(1, SAMPLE_RATE)
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))

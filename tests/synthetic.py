"""Made-up features for tests: a planted signal in each stream, real masks, odd lengths."""

import dataclasses
import pathlib

import numpy as np

from avjax import tasks
from avjax.datasets.base import Clip, Corpus, Task
from avjax.features import store
from avjax.features.clip import TEXTS, example
from avjax.features.presets import PRESETS
from avjax.features.store import Features

SIZES = {"video": (6, 9), "audio": (11, 7), "text": (8, 12)}  # most steps, width


def make(clips: int = 48, classes: int = 3, speakers: int = 4, seed: int = 0, signal: float = 2.0) -> Features:
    """Makes `clips` clips of `classes` classes by `speakers` speakers; clip 3 lacks audio, clip 5 lacks a face."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(clips) % classes).astype(np.int32)
    names = tuple(f"class{c}" for c in range(classes))
    arrays, masks = {}, {}
    for stream, (steps, width) in SIZES.items():
        x = rng.normal(size=(clips, steps, width)).astype(np.float32)
        x[:, :, :classes] += signal * np.eye(classes, dtype=np.float32)[label][:, None, :]
        mask = np.arange(steps)[None] < rng.integers(2, steps + 1, clips)[:, None]
        if stream != "text":
            mask[3 if stream == "audio" else 5] = False
        for name in ("text_both", "text_audio", "text_video", "text_constant") if stream == "text" else (stream,):
            arrays[name], masks[name] = np.where(mask[..., None], x, 0).astype(np.float32), mask
    ids = [f"clip{i:03d}" for i in range(clips)]
    who = [f"s{i % speakers}" if speakers else None for i in range(clips)]
    made = [Clip(id=i, path=None, label=names[y], speaker=s) for i, y, s in zip(ids, label, who, strict=True)]
    return Features(
        dataset="synthetic",
        classes=names,
        folds=(),
        content=f"made-{seed}",
        ids=ids,
        clips=made,
        label=label,
        speakers=[s or "" for s in who],
        arrays=arrays,
        masks=masks,
        sentences={"both": [f"sentence {i}" for i in ids]},
        counts={"used": clips, "quarantined": 0, "masked_audio": 1, "masked_video": 1},
        made_by={"video": "v", "audio": "a", "text": "t"},
    )


def values(clips: int = 480, speakers: int = 6, seed: int = 0, noise: float = 0.01, permuted: bool = False) -> Features:
    """Calls `make` for the task "regression": three targets on [0, 1], linear in the mean of the audio, and noise.

    Permuted, they are those of other clips: nothing can be learned.
    """
    features, means, rng = _heard(clips, speakers, seed)
    label = 0.5 + 0.12 * means @ np.array([[1, 0.5, 0], [0, 1, -0.5], [-0.5, 0, 1]]) + rng.normal(0, noise, means.shape)
    label = np.clip(rng.permutation(label) if permuted else label, 0, 1)
    return labelled(features, "regression", ("valence", "arousal", "dominance"), label)


def questions(clips: int = 480, speakers: int = 6, seed: int = 0) -> Features:
    """Calls `make` for the task "multilabel": labels are present where one audio dimension has a large mean."""
    features, means, _ = _heard(clips, speakers, seed)
    return labelled(features, "multilabel", ("happy", "sad", "angry"), means > [-0.5, 0.0, 0.8])


def soft(clips: int = 480, speakers: int = 6, seed: int = 0) -> Features:
    """Calls `make` for the task "soft": labels are the softmax of the mean of the audio over three classes."""
    features, means, _ = _heard(clips, speakers, seed)
    share = np.exp(1.5 * means)
    return labelled(features, "soft", ("happy", "sad", "angry"), share / share.sum(-1, keepdims=True))


def labelled(features: Features, task: str, names: tuple[str, ...], label: np.ndarray) -> Features:
    """Returns the same clips with the rows of `label` (clips, names), for a task of `tasks`."""
    labels = [tuple(map(float, row)) for row in label]
    clips = [dataclasses.replace(c, label=row) for c, row in zip(features.clips, labels, strict=True)]
    encoded = tasks.encoded(labels, names, task)
    return dataclasses.replace(features, task=task, classes=names, clips=clips, label=encoded)


def _heard(clips: int, speakers: int, seed: int) -> tuple[Features, np.ndarray, np.random.Generator]:
    """Makes clips with a vector of their own in all audio steps; also its means (clips, 3), 0 without audio."""
    features, rng = make(clips, speakers=speakers, seed=seed, signal=0.0), np.random.default_rng(seed + 1)
    mask = features.masks["audio"][..., None]
    audio = 0.2 * features.arrays["audio"]
    audio[:, :, :3] += rng.normal(size=(clips, 1, 3))
    features.arrays["audio"] = np.where(mask, audio, 0).astype(np.float32)
    means = features.arrays["audio"][:, :, :3].sum(1) / np.maximum(mask.sum(1), 1)
    return features, means, rng


def write_store(root: pathlib.Path, features: Features) -> None:
    """Packs made-up features into a feature store at `root`, under the preset `lite`."""
    corpus = Corpus(features.dataset, Task(features.task, features.classes), tuple(features.clips), features.folds)
    examples = [_example(features, i) for i in range(len(features.ids))]
    facts = {"rejected": (), "made_by": features.made_by}
    store.Store(root).pack(corpus, features.clips, "lite", [lambda: examples], "made up", facts)


def _example(features: Features, i: int) -> dict[str, object]:
    steps = {name: (features.arrays[name][i], features.masks[name][i]) for name in features.arrays}
    frames = len(steps["video"][0])
    video = {"video": steps["video"][0], "video_mask": steps["video"][1]}
    video |= {"au": np.zeros((frames, 2), np.float32), "times": np.arange(frames, dtype=np.float64)}
    audio = {"audio": steps["audio"][0], "audio_mask": steps["audio"][1]}
    audio |= {"prosody": np.zeros(3, np.float32), "seconds": np.array(1.0), "surface": np.zeros(2)}
    text = {s: x[mask] for s in TEXTS for x, mask in [steps[f"text_{s}"]]}
    staged = {"video": video, "audio": audio, "text": text}
    return example(features.clips[i], PRESETS["lite"], staged, dict.fromkeys(TEXTS, f"sentence {features.ids[i]}"))

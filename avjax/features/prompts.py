"""Emotion prompts as features: six texts that name each clip's label, and the texts of the classes (EmoAsst).

They are added to the features of a run, not to the feature store: they depend on labels, which belong to training.
Beside the stream `prompts` comes a text source "utterance", what is said in a clip and nothing else.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from avjax.datasets.base import Clip
from avjax.encoders import Encoder
from avjax.errors import AvjaxError
from avjax.features import encode, presets
from avjax.features.face_video import ENCODED
from avjax.features.store import Features
from avjax.settings import Settings
from avjax.text import prompt_templates
from avjax.utils import paths, progress
from avjax.utils.storage import replacing

UTTERANCE = "utterance"
_AT_ONCE = 32  # texts


def attach(found: Features, settings: Settings, console: Console) -> Features:
    """Features with `prompts` (n, 6, d), `text_utterance` (n, 1, d), masked where nothing is said, and `classes`.

    The last (c, d), a constant of all batches, are the means of the prompts that name nothing but a class (Eq. 2), of
    length 1.

    Texts are encoded by the text encoder of the preset `prompts.preset`, "" = the features' own, a vector each;
    the vectors are kept under `$AVJAX_CACHE/prompts`.

    Raises:
      AvjaxError: the task has no classes, the text encoder cannot be had, or a file of vectors is damaged.
    """
    if found.task != "single":
        raise AvjaxError(f"prompts name one class per clip; the labels of these data are of the task {found.task!r}")
    preset = presets.preset(settings.prompts.preset or settings.preset, random=settings.weights.random)
    encoder = encode.Loader(preset.random)(preset.text)
    length = _counter(encoder)
    texts = [fitted(clip, length, preset.max_tokens) for clip in found.clips]
    classes = [prompt_templates.of_class(name) for name in found.classes]
    known = _known(encoder, [*texts, *classes, _spoken(found)], preset.max_tokens, console)
    found = _with_utterances(found, known, encoder.width)
    return dataclasses.replace(
        found,
        arrays=found.arrays | {"prompts": np.stack([np.stack([known[t] for t in row]) for row in texts])},
        masks=found.masks | {"prompts": np.ones((len(texts), len(prompt_templates.FORMATS)), bool)},
        constants={"classes": _unit(np.stack([np.mean([_unit(known[t]) for t in row], 0) for row in classes]))},
    )


def attach_utterances(found: Features, preset: str, random: bool, console: Console) -> Features:
    """Features with `text_utterance` alone, as `attach` makes it; raises as that."""
    settings = presets.preset(preset, random=random)
    encoder = encode.Loader(random)(settings.text)
    return _with_utterances(found, _known(encoder, [_spoken(found)], settings.max_tokens, console), encoder.width)


def _spoken(found: Features) -> list[str]:
    return [clip.transcript or "" for clip in found.clips]


def _with_utterances(found: Features, known: Mapping[str, np.ndarray], width: int) -> Features:
    name, spoken, nothing = f"text_{UTTERANCE}", _spoken(found), np.zeros(width, np.float32)
    return dataclasses.replace(
        found,
        arrays=found.arrays | {name: np.stack([known.get(s, nothing)[None] for s in spoken])},
        masks=found.masks | {name: np.array([bool(s) for s in spoken])[:, None]},
        sentences=found.sentences | {UTTERANCE: spoken},
    )


def fitted(clip: Clip, length: Callable[[str], int], limit: int) -> tuple[str, ...]:
    """The prompts of a clip; of a long utterance words are left out at its end, so that no label is cut off.

    Args:
      length: counts the tokens of a text, special ones included; limit: the most that an encoder takes.
    """
    words = (clip.transcript or "").split()
    while True:
        texts = prompt_templates.prompts(clip.label, " ".join(words), clip.speaker, clip.gender)
        if not words or max(map(length, texts)) <= limit:
            return texts
        words.pop()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _counter(encoder: Encoder) -> Callable[[str], int]:
    tokenizer = encoder.tokenizer
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text).ids)


def _known(encoder: Encoder, rows: Iterable[Iterable[str]], max_tokens: int, console: Console) -> dict[str, np.ndarray]:
    """Text → its vector (d,), for all texts of the rows but empty ones."""
    wanted = sorted({text for row in rows for text in row if text})
    if not wanted:
        return {}
    return dict(zip(wanted, _encoded(encoder, wanted, max_tokens, console), strict=True))


def _encoded(encoder: Encoder, texts: Sequence[str], max_tokens: int, console: Console) -> np.ndarray:
    """A vector for each text, (n, d) float32: what the encoder pools, else the mean of its tokens."""
    key = hashlib.sha256(json.dumps([encoder.provenance, max_tokens, texts]).encode()).hexdigest()[:16]
    path = paths.cache() / "prompts" / f"{key}.npz"
    if not path.is_file():
        blocks = [texts[i : i + _AT_ONCE] for i in range(0, len(texts), _AT_ONCE)]
        rows = []
        for block in progress.bar(blocks, len(blocks), "prompts", console):
            rows += [tokens.mean(0) for tokens in encode.encode_texts(encoder, block, max_tokens)]
        _keep(path, np.stack(rows).astype(ENCODED))
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            return file["vectors"].astype(np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise AvjaxError(f"{path}: cannot be read ({error}); delete it, and it is made anew") from error


def _keep(path: Path, vectors: np.ndarray) -> None:
    with replacing(path, "wb") as file:
        np.savez(file, vectors=vectors)

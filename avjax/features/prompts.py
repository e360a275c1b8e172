"""Emotion prompts as features: six texts that name each clip's label, and the texts of the classes (EmoAsst).

They are added to the features of a run, not to the feature store, since they depend on labels, which belong to
training. Besides the stream `prompts` they include a text source "utterance": the plain transcript of a clip.
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
_BATCH = 32  # texts


def attach(features: Features, settings: Settings, console: Console) -> Features:
    """Adds `prompts` (n, 6, d), `text_utterance` (n, 1, d), masked without a transcript, and `classes` to features.

    The classes (c, d), a constant of all batches, are the means of the prompts that name only a class (Eq. 2), of
    length 1.

    Each text is encoded as one vector by the text encoder of the preset `prompts.preset` ("" = that of the features);
    the vectors are cached in `$AVJAX_CACHE/prompts`.

    Raises:
      AvjaxError: the task has no classes, the text encoder is not available, or a file of vectors is damaged.
    """
    if features.task != "single":
        raise AvjaxError(f"prompts name one class per clip; the labels of these data are of the task {features.task!r}")
    preset = presets.preset(settings.prompts.preset or settings.preset, random=settings.weights.random)
    encoder = encode.Loader(preset.random)(preset.text)
    length = _counter(encoder)
    texts = [fitted(clip, length, preset.max_tokens) for clip in features.clips]
    classes = [prompt_templates.of_class(name) for name in features.classes]
    vectors = _vectors_of(encoder, [*texts, *classes, _transcripts(features)], preset.max_tokens, console)
    features = _with_utterances(features, vectors, encoder.width)
    return dataclasses.replace(
        features,
        arrays=features.arrays | {"prompts": np.stack([np.stack([vectors[t] for t in row]) for row in texts])},
        masks=features.masks | {"prompts": np.ones((len(texts), len(prompt_templates.FORMATS)), bool)},
        constants={"classes": _unit(np.stack([np.mean([_unit(vectors[t]) for t in row], 0) for row in classes]))},
    )


def attach_utterances(features: Features, preset: str, random: bool, console: Console) -> Features:
    """Adds only `text_utterance` to features, as `attach` does; raises the same errors."""
    settings = presets.preset(preset, random=random)
    encoder = encode.Loader(random)(settings.text)
    return _with_utterances(
        features, _vectors_of(encoder, [_transcripts(features)], settings.max_tokens, console), encoder.width
    )


def _transcripts(features: Features) -> list[str]:
    return [clip.transcript or "" for clip in features.clips]


def _with_utterances(features: Features, vectors: Mapping[str, np.ndarray], width: int) -> Features:
    name, transcripts, nothing = f"text_{UTTERANCE}", _transcripts(features), np.zeros(width, np.float32)
    return dataclasses.replace(
        features,
        arrays=features.arrays | {name: np.stack([vectors.get(s, nothing)[None] for s in transcripts])},
        masks=features.masks | {name: np.array([bool(s) for s in transcripts])[:, None]},
        sentences=features.sentences | {UTTERANCE: transcripts},
    )


def fitted(clip: Clip, length: Callable[[str], int], limit: int) -> tuple[str, ...]:
    """Returns the prompts of a clip; a long utterance is shortened at its end, so that no label is truncated.

    Args:
      clip: the clip.
      length: counts the tokens of a text, including special ones.
      limit: the maximum number of tokens of the encoder.
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


def _vectors_of(
    encoder: Encoder, rows: Iterable[Iterable[str]], max_tokens: int, console: Console
) -> dict[str, np.ndarray]:
    """Returns text → its vector (d,), for all non-empty texts of the rows."""
    wanted = sorted({text for row in rows for text in row if text})
    if not wanted:
        return {}
    return dict(zip(wanted, _encoded(encoder, wanted, max_tokens, console), strict=True))


def _encoded(encoder: Encoder, texts: Sequence[str], max_tokens: int, console: Console) -> np.ndarray:
    """Encodes each text as a vector, (n, d) float32: the encoder's pooled output, or the mean of its tokens."""
    key = hashlib.sha256(json.dumps([encoder.provenance, max_tokens, texts]).encode()).hexdigest()[:16]
    path = paths.cache() / "prompts" / f"{key}.npz"
    if not path.is_file():
        blocks = [texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH)]
        rows = []
        for block in progress.bar(blocks, len(blocks), "prompts", console):
            rows += [tokens.mean(0) for tokens in encode.encode_texts(encoder, block, max_tokens)]
        _save(path, np.stack(rows).astype(ENCODED))
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            return file["vectors"].astype(np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise AvjaxError(f"{path}: cannot be read ({error}); delete it, and it is made again") from error


def _save(path: Path, vectors: np.ndarray) -> None:
    with replacing(path, "wb") as file:
        np.savez(file, vectors=vectors)

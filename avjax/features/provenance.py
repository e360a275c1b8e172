"""Provenance of staged features: the records and keys that distinguish one feature from another."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import NamedTuple

from avjax.datasets.base import Clip
from avjax.features.presets import Preset

# Incremented when a change of code changes what is measured: part of every staged file's key.
CODE_VERSION = {"video": 2, "audio": 3, "image": 2, "flow": 1, "speech": 1, "window": 2, "text": 2}
# The features that are inputs of an encoder in a `raw` preset.
_INPUTS = ("image", "speech", "text")


class Key(NamedTuple):
    """Identity of a staged feature of a clip; its text is part of a file's name.

    Attributes:
      record: the key of the provenance record: settings, weights and code.
      source: a hash of the clip's files, or of its sentences.
    """

    record: str
    source: str

    def __str__(self) -> str:
        return f"{self.record}-{self.source}"


def of_clip(records: Mapping[str, str], clip: Clip) -> dict[str, Key]:
    """Returns the keys of the measured features of a clip; `records`: feature → key of its provenance record.

    Raises:
      OSError: a file of the clip is gone.
    """
    source = source_key(clip)
    return {feature: Key(record, source) for feature, record in records.items()}


def of_sentences(record: str, sentences: Mapping[str, str]) -> Key:
    """Returns the key of the encoded sentences of a clip."""
    return Key(record, hashlib.sha256(repr(sorted(sentences.items())).encode()).hexdigest()[:12])


def described(feature: str, settings: Preset, **weights: str) -> dict[str, object]:
    """Describes what a `feature` (a key of CODE_VERSION) of a clip depends on besides the clip itself."""
    used = {
        "video": ("frames",) if settings.frames else ("frames", "max_seconds"),
        "audio": ("steps_per_second", "max_seconds"),
        "image": ("frames", "image") if settings.frames else ("frames", "max_seconds", "image"),
        "flow": ("frames", "max_seconds", "flow"),
        "speech": ("max_seconds", "speech"),
        "window": ("window",),
        "text": ("text", "max_tokens"),
    }[feature]
    everything = dataclasses.asdict(settings)
    if settings.raw and feature in _INPUTS:
        used += ("raw",)
    return {
        "feature": feature,
        "code": CODE_VERSION[feature],
        "settings": {k: everything[k] for k in used},
        "weights": weights,
    }


def source_key(clip: Clip) -> str:
    """Returns a short hash of a clip's files and of the part of them that it is.

    Files are identified by name, size and modification time, as in `make` and `rsync`.

    Raises:
      OSError: a file of the clip is missing.
    """
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in (clip.path, clip.audio) if p]
    return hashlib.sha256(repr([files, clip.start, clip.end]).encode()).hexdigest()[:12]

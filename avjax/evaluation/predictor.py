"""Predictors of a run: the heads of its model, or the few-shot caches that read the model's features.

This module alone resolves a model's `readers`: others use a `Predictor`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from avjax import tasks
from avjax.evaluation import fewshot
from avjax.evaluation import fewshot_cache as caching
from avjax.evaluation.fewshot_cache import Array, Cache
from avjax.models.base import Model, Output
from avjax.models.emoasst import PREDICTING, TEMPERATURE, zero_shot_scores
from avjax.training import loop
from avjax.training.lanes import LanePlan

_probabilities = tasks.SCORINGS["single"].predict


class Predictor(Protocol):
    """Maps a model's output to probabilities or values. `read` is traced, `predict` takes NumPy or JAX arrays.

    Attributes:
      weights: arrays that it needs besides the model's variables, each with the lanes as first axis.
      constants: its own replacements of `Model.constants`, if any.
      clip_ids: training clips that take part in every prediction.
    """

    weights: Mapping[str, np.ndarray]
    constants: Mapping[str, np.ndarray]
    clip_ids: frozenset[str]

    def read(self, output: Output, head: jax.Array) -> Any:
        """Takes what `predict` needs from a lane's output; `head` is the head that validation selected."""

    def predict(self, read: Any, weights: Mapping[str, Array]) -> Array:
        """Returns the mean over lanes (b, c), probabilities or values, for what was read, lanes first."""

    def select_lanes(self, lanes: Sequence[int]) -> "Predictor":
        """Returns the predictor of some lanes alone."""

    def save(self, folder: Path, names: Sequence[tuple[str, int]]) -> None:
        """Writes what `restored` reads for lanes (fold, seed)."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """The predicting head of a model, or the one that validation selected for each lane."""

    model: Model
    weights = constants = {}  # noqa: RUF012
    clip_ids = frozenset()

    def read(self, output: Output, head: jax.Array) -> jax.Array:
        """Takes the logits (b, …, c) of the predicting head."""
        return loop.with_chosen(self.model, output.logits, head)[self.model.prediction_heads[0]]

    def predict(self, read: Array, weights: Mapping[str, Array]) -> Array:
        """Returns the mean over lanes of logits (lanes, b, c) as probabilities or values."""
        return tasks.SCORINGS[self.model.task].predict(read).mean(0)

    def select_lanes(self, lanes: Sequence[int]) -> "Heads":
        """Returns itself: a lane's head is among the arrays of the run."""
        return self

    def save(self, folder: Path, names: Sequence[tuple[str, int]]) -> None:
        """Writes nothing: heads have no files of their own."""

    @classmethod
    def restored(cls, model: Model, folder: Path, names: Sequence[tuple[str, int]]) -> "Heads":
        """Returns the heads of the model; no file is read."""
        return cls(model)

    @staticmethod
    def described(plan: LanePlan, settings: Mapping[str, Any]) -> str:
        """Returns nothing: the protocol's text names the head."""
        return ""


@dataclasses.dataclass(frozen=True)
class Caches:
    """Few-shot caches that read the features of a model: one of each lane, or one of all lanes together.

    Attributes:
      caches: of the lanes, in their order.
      together: whether a single cache serves all lanes and reads their joined features (`fewshot.joined`).
    """

    caches: tuple[Cache, ...]
    together: bool = False

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Stacks the caches; those with fewer entries are padded with zeros, which do not vote."""
        longest = max(len(cache.ids) for cache in self.caches)
        keys = [np.stack(list(cache.keys.values())) for cache in self.caches]
        return {
            "text": np.stack([cache.text for cache in self.caches]),
            "keys": np.stack([np.pad(k, ((0, 0), (0, longest - k.shape[1]), (0, 0))) for k in keys]),
            "label": np.stack([np.pad(cache.label, (0, longest - len(cache.label))) for cache in self.caches]),
            "alpha": np.array([[*cache.alpha.values()] for cache in self.caches], np.float32),
            "beta": np.array([cache.beta for cache in self.caches], np.float32),
        }

    @property
    def constants(self) -> dict[str, np.ndarray]:
        """Returns the class texts that the model compares features with."""
        return {"classes": self.caches[0].text}

    @property
    def clip_ids(self) -> frozenset[str]:
        """Returns the clips of all caches."""
        return frozenset(clip_id for cache in self.caches for clip_id in cache.ids)

    def read(self, output: Output, head: jax.Array) -> dict[str, jax.Array]:
        """Takes the features (b, d) of the modalities that the caches have."""
        return {m: output.features[m] for m in self.caches[0].modalities}

    def predict(self, read: Mapping[str, Array], weights: Mapping[str, Array]) -> Array:
        """Returns the mean over lanes of the caches' probabilities for features (lanes, b, d)."""
        if self.together:
            read = {m: x[None] for m, x in fewshot.joined(read).items()}
        xp = weights["keys"].__array_namespace__()
        rows = xp.stack([read[m] for m in self.caches[0].modalities], 1)  # (lanes, k, b, d)
        text, keys, alpha = (weights[name].astype(rows.dtype) for name in ("text", "keys", "alpha"))
        one_hot = (weights["label"][..., None] == xp.arange(text.shape[-2])[None, None]).astype(rows.dtype)
        beta = weights["beta"].astype(rows.dtype)[:, None, None, None]
        votes = caching.votes(caching.affinity(rows, keys), one_hot[..., None, :, :], beta)
        return _probabilities(caching.combined(zero_shot_scores(rows, text), votes, alpha) / TEMPERATURE).mean(0)

    def select_lanes(self, lanes: Sequence[int]) -> "Caches":
        """Returns the caches of some lanes alone."""
        return Caches(tuple(self.caches[i] for i in lanes))

    def save(self, folder: Path, names: Sequence[tuple[str, int]]) -> None:
        """Writes the caches of lanes (fold, seed)."""
        fewshot.write_caches(folder, self.caches, names)

    @classmethod
    def restored(cls, model: Model, folder: Path, names: Sequence[tuple[str, int]]) -> "Caches":
        """Reads the caches of lanes (fold, seed)."""
        return cls(tuple(fewshot.read_caches(folder, names)))

    @staticmethod
    def described(plan: LanePlan, settings: Mapping[str, Any]) -> str:
        """Describes the kind of the caches and how they were fitted."""
        return f"; {fewshot.described(plan, settings)}"


# By the kind of a model's first reader ("both_cache": a cache); "" where its heads predict.
PREDICTORS: Mapping[str, type[Heads | Caches]] = {"": Heads, **dict.fromkeys(PREDICTING, Caches)}


def _kind(model: Model) -> type[Heads | Caches]:
    return PREDICTORS[model.readers[0].rpartition("_")[2] if model.readers else ""]


def described(model: Model, plan: LanePlan, settings: Mapping[str, Any]) -> str:
    """Describes the classifier that predicts, to be added to the protocol's text; "" where a head of the model does.

    `settings` are the model's own (`FusionSettings.settings`).
    """
    return _kind(model).described(plan, settings)


def restored(model: Model, folder: Path, names: Sequence[tuple[str, int]]) -> Predictor:
    """Reads the predictor of lanes (fold, seed) of a finished run or bundle.

    Raises:
      AvjaxError: a cache is missing or damaged.
    """
    return _kind(model).restored(model, folder, names)

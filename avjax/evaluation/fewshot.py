"""Classifiers on the features of a trained EmoAsst: zero-shot, K-shot cache, cache with tuned keys, linear probe.

Wang and Yang 2024, sections 3.4 and 4.2; the tuned keys are Tip-Adapter's (Zhang et al. 2021). A lane's classifiers use
its training clips; their settings are searched on its validation clips or, without any, by leaving out one entry of the
cache at a time; test clips play no part. These features are computed without a label in the query.
"""

import dataclasses
import functools
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from avjax.errors import AvjaxError
from avjax.evaluation import baselines
from avjax.evaluation import fewshot_cache as caches
from avjax.evaluation.fewshot_cache import Cache
from avjax.features.store import Features, safe_name
from avjax.models.base import Model
from avjax.models.emoasst import BOTH, TEMPERATURE, modalities
from avjax.tasks import metrics
from avjax.training import loop
from avjax.training.batches import Resident
from avjax.training.lanes import LanePlan
from avjax.training.streamed_batches import Streamed
from avjax.utils.storage import replacing

FOLDER = "caches"  # of the run directory
REPRESENTATIONS = "representations.npz"
# Inverse regularisation strengths of the linear probe; scikit-learn's default where nothing is held out.
STRENGTHS = (0.01, 0.1, 1.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Part:
    """Clips of a lane: their indices (n,), features by modality (n, d), and labels (n,)."""

    index: np.ndarray
    features: Mapping[str, np.ndarray]
    label: np.ndarray

    def of(self, streams: Sequence[str]) -> "Part":
        """Returns the clips with these modalities alone."""
        return dataclasses.replace(self, features={m: self.features[m] for m in streams})


@dataclasses.dataclass(frozen=True)
class ClassifierOutputs:
    """The predictions of all classifiers of all lanes.

    Attributes:
      logits: head → (lanes, n_test, c), zeros on padding; their softmax is the probabilities.
      caches: of each lane, with all modalities of the model.
    """

    logits: dict[str, np.ndarray]
    caches: list[Cache]

    @property
    def record(self) -> dict[str, list]:
        """Returns what `metrics.json` records of each lane's cache."""
        return {
            "shots": [len(cache.ids) for cache in self.caches],
            "alpha": [dict(cache.alpha) for cache in self.caches],
            "beta": [cache.beta for cache in self.caches],
        }


def origin(representations: Mapping[str, np.ndarray]) -> str:
    """Identifies the trained run of features: features of two runs do not belong in one cache."""
    digest = hashlib.sha256()
    for m in sorted(representations):
        digest.update(representations[m].tobytes())
    return digest.hexdigest()[:16]


def represent(
    model: Model, state: loop.State, data: Resident | Streamed, with_label: bool = False
) -> dict[str, np.ndarray]:
    """Computes the features of all clips by each lane's best parameters: modality → (lanes, clips, d).

    The last argument makes the query of the video a prompt with the label, see `EmoAsst`.
    """
    read = lambda output, _: {m: output.features[m] for m in modalities(tuple(output.features))}  # noqa: E731
    run = loop.read_clips(model, read, with_label=with_label)
    blocks = [jax.device_get(run(state.best, state.best_head, state.stats, block)) for _, block in data.blocks()]
    return {m: np.concatenate([block[m] for block in blocks], 1) for m in blocks[0]}


def fit(
    representations: Mapping[str, np.ndarray], features: Features, plan: LanePlan, settings: Mapping[str, Any]
) -> ClassifierOutputs:
    """Fits the classifiers of every lane, and predicts its test clips.

    Args:
      representations: as `represent` returns them.
      features: of the data set.
      plan: of the run.
      settings: the model's own.
    """
    run = origin(representations)
    lanes = jax.device_get(plan.lanes)
    predictions, kept = [], []
    for i, (_, seed) in enumerate(plan.names):
        vectors = {m: representations[m][i] for m in modalities(tuple(representations))}
        parts = {p: _part(vectors, features, getattr(lanes, p)[i], getattr(lanes, f"{p}_weight")[i]) for p in _PARTS}
        combinations = {m: (m,) for m in vectors} | ({BOTH: tuple(vectors)} if len(vectors) > 1 else {})
        logits = {}
        for name, streams in combinations.items():
            empty = _few(parts["train"].of(streams), features, settings["shots"], seed, run)
            now = {p: part.of(streams) for p, part in parts.items()}
            read, cache = _read(empty, now, settings)
            logits |= {f"{name}_{reader}": rows for reader, rows in read.items()}
        predictions.append({head: _padded(rows, lanes.test.shape[1]) for head, rows in logits.items()})
        kept.append(cache)  # the last combination has all modalities
    return ClassifierOutputs({head: np.stack([lane[head] for lane in predictions]) for head in predictions[0]}, kept)


_PARTS = ("train", "val", "test")


def _part(vectors: Mapping[str, np.ndarray], features: Features, index: np.ndarray, weight: np.ndarray) -> Part:
    index = index[weight > 0]
    return Part(index, {m: v[index] for m, v in vectors.items()}, features.label[index])


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    return np.pad(rows, ((0, count - len(rows)), (0, 0)))


def _few(part: Part, features: Features, shots: int, seed: int, origin: str) -> Cache:
    """Makes a cache of at most `shots` training clips of each class, before any fit."""
    ids = [features.ids[i] for i in part.index]
    chosen = caches.few(part.label, ids, len(features.classes), shots, seed)
    text = np.asarray(features.constants["classes"])
    empty = caches.empty(features.classes, text, tuple(part.features), origin)
    names = [features.classes[label] for label in part.label[chosen]]
    return caches.add(empty, [ids[i] for i in chosen], names, {m: v[chosen] for m, v in part.features.items()})


def _read(
    unfitted: Cache, parts: Mapping[str, Part], settings: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], Cache]:
    """Returns reader → logits of the test clips, and the cache that predicts."""
    train, val, test = (parts[p] for p in _PARTS)
    held = (val.features, val.label) if len(val.index) else None
    cache = caches.fit(unfitted, held)
    tuned = tune(cache, train.features, train.label, settings["tune_steps"], settings["tune_rate"])
    if held:
        tuned = caches.fit(tuned, held)
    scores = {
        "zero": caches.zero_shot(cache, test.features),
        "cache": caches.predict(cache, test.features),
        "tuned": caches.predict(tuned, test.features),
    }
    logits = {reader: v / TEMPERATURE for reader, v in scores.items()}
    silent = dataclasses.replace(cache, alpha=dict.fromkeys(cache.alpha, 0.0))
    predicting = {"zero": silent, "cache": cache, "tuned": tuned}[settings["reader"]]
    return logits | {"probe": probe(train, val, test, len(cache.classes))}, predicting


def tune(cache: Cache, features: Mapping[str, np.ndarray], label: np.ndarray, steps: int, rate: float) -> Cache:
    """Trains the keys of a cache on clips by cross entropy (AdamW); alpha and beta stay as they are.

    A clip that is an entry is predicted without itself: entries whose key equals its feature are left out.

    Args:
      cache: whose keys are trained.
      features: modality → (n, d) of the training clips.
      label: (n,) of the training clips.
      steps: of the optimizer.
      rate: learning rate.
    """
    own = np.ones((len(label), len(cache.ids)), bool)
    for m, key in cache.keys.items():
        own &= np.stack([(features[m] == entry[None]).all(-1) for entry in key], 1)
    given = {
        "rows": {m: features[m] for m in cache.keys},
        "zero": caches.zero_shot(cache, features).astype(np.float32),
        "one_hot": np.eye(len(cache.classes), dtype=np.float32)[cache.label],
        "label": label,
        "others": ~own,
        "alpha": {m: np.float32(ratio) for m, ratio in cache.alpha.items()},
        "beta": np.float32(cache.beta),
    }
    keys = _tuned(dict(cache.keys), given, steps, rate)
    return dataclasses.replace(cache, keys={m: np.asarray(_unit(key)) for m, key in keys.items()})


def _unit(keys: jax.Array) -> jax.Array:
    # Not `contrastive.unit`: a difference in the last bit grows to 0.02 of a logit in a hundred steps.
    some = jnp.any(keys != 0, -1)
    keys = jnp.where(some[:, None], keys, 0)
    return keys / jnp.where(some, jnp.sqrt(jnp.sum(keys * keys, -1)), 1)[:, None]


@functools.partial(jax.jit, static_argnums=2)
def _tuned(keys: Mapping[str, jax.Array], given: Mapping[str, Any], steps: int, rate: float) -> Mapping[str, jax.Array]:
    """Trains keys, modality → (n, d); the arrays `given` stay fixed."""
    tx = optax.adamw(rate)

    def loss(keys: Mapping[str, jax.Array]) -> jax.Array:
        scores = given["zero"]
        for m, key in keys.items():
            near = caches.affinity(given["rows"][m], _unit(key), given["others"])
            scores += caches.votes(near, given["one_hot"], given["beta"], given["alpha"][m])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores / TEMPERATURE, given["label"]))

    def step(carry: tuple[Any, Any], _: None) -> tuple[Any, None]:
        keys, state = carry
        moves, state = tx.update(jax.grad(loss)(keys), state, keys)
        return (optax.apply_updates(keys, moves), state), None

    return jax.lax.scan(step, (keys, tx.init(keys)), length=steps)[0][0]


def probe(train: Part, val: Part, test: Part, classes: int) -> np.ndarray:
    """Predicts log-probabilities (n, c) by logistic regression on features (Table 2), its strength by validation."""
    x, x_val, x_test = (np.concatenate([*part.features.values()], -1) for part in (train, val, test))
    strength = baselines.STRENGTH
    if len(val.index):
        scores = [
            _recall(baselines.logistic_regression(x, train.label, x_val, classes, strength=c), val.label, classes)
            for c in STRENGTHS
        ]
        strength = STRENGTHS[int(np.argmax(scores))]
    return baselines.logistic_regression(x, train.label, x_test, classes, strength=strength)


def _recall(logits: np.ndarray, label: np.ndarray, classes: int) -> float:
    return float(metrics.uar(metrics.count(label, logits.argmax(-1), classes)))


def remarks(
    model: Model,
    state: loop.State,
    plan: LanePlan,
    data: Resident | Streamed,
    features: Features,
    representations: Mapping[str, np.ndarray],
) -> dict[str, object]:
    """Returns what `metrics.json` records of a run besides scores: `query`, if queries of the video had its label."""
    if not (model.module.label_in_query and model.module.prompt and "video" in model.streams):
        return {}
    with_label = represent(model, state, data, with_label=True)
    return {"query": query_mismatch(plan, features, with_label["video"], representations["video"])}


def described(plan: LanePlan, settings: Mapping[str, Any]) -> str:
    """Describes the classifier that predicts, as a part of the protocol's text."""
    if settings["reader"] == "zero":
        return "head: zero-shot"
    held = {counts["n_val"] > 0 for counts in plan.counts}
    ways = {True: "on validation clips", False: "by leaving one entry out"}
    how = " or, where nothing is held out, ".join(ways[h] for h in sorted(held, reverse=True))
    tuned = " with tuned keys" if settings["reader"] == "tuned" else ""
    return f"head: {settings['shots']}-shot cache{tuned}, alpha and beta {how}"


def query_mismatch(
    plan: LanePlan, features: Features, with_label: np.ndarray, without_label: np.ndarray
) -> dict[str, float]:
    """Computes UAR of the zero-shot classifier of video on training clips, by queries with and without their label.

    The query has the label in training alone, so the first score is what training saw, and the difference is what it
    learned to copy. Scores are means over lanes; features by either query are (lanes, clips, d).
    """
    lanes = jax.device_get(plan.lanes)
    scores = {}
    for name, representations in (("with_label", with_label), ("without_label", without_label)):
        text = np.asarray(features.constants["classes"])
        lane_scores = []
        for i in range(len(plan.names)):
            part = _part({"video": representations[i]}, features, lanes.train[i], lanes.train_weight[i])
            empty = caches.empty(features.classes, text, ("video",), "")
            lane_scores.append(_recall(caches.zero_shot(empty, part.features), part.label, len(features.classes)))
        scores[name] = float(np.mean(lane_scores))
    return scores


def write(
    workdir: Path,
    outputs: ClassifierOutputs,
    representations: Mapping[str, np.ndarray],
    features: Features,
    plan: LanePlan,
) -> None:
    """Writes the caches of all lanes, and all features with clip_id, speaker, label and `tested` (lanes, n)."""
    write_caches(workdir, outputs.caches, plan.names)
    lanes = jax.device_get(plan.lanes)
    tested = np.zeros((len(plan.names), len(features.ids)), bool)
    for row, index, weight in zip(tested, lanes.test, lanes.test_weight, strict=True):
        row[index[weight > 0]] = True
    clips = {"clip_id": np.array(features.ids), "speaker": np.array(features.speakers, np.str_)}
    with replacing(workdir / REPRESENTATIONS, "wb") as file:
        np.savez(file, **clips, label=features.label, tested=tested, **representations)


def read_representations(workdir: Path) -> dict[str, np.ndarray]:
    """Reads the features of a finished run that `write` wrote.

    Raises:
      AvjaxError: they are missing or damaged.
    """
    path = workdir / REPRESENTATIONS
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise AvjaxError(f"{path}: cannot be read ({error}); a finished run of EmoAsst has one: train again") from error


def cache_name(fold: str, seed: int) -> str:
    """Returns the name of the file of a lane's cache."""
    return f"{safe_name(fold)}-{seed}.npz"


def write_caches(workdir: Path, own: Sequence[Cache], lanes: Sequence[tuple[str, int]]) -> None:
    """Writes the caches of lanes (fold, seed)."""
    for cache, (fold, seed) in zip(own, lanes, strict=True):
        caches.save(cache, workdir / FOLDER / cache_name(fold, seed))


def read_caches(workdir: Path, lanes: Sequence[tuple[str, int]]) -> list[Cache]:
    """Reads the caches of some lanes of a finished run.

    Raises:
      AvjaxError: one is missing or damaged.
    """
    return [caches.load(workdir / FOLDER / cache_name(fold, seed)) for fold, seed in lanes]


def joined(representations: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Joins features of several lanes (lanes, n, d) into one (n, lanes · d), whose cosines are means over lanes."""
    return {m: np.concatenate(v, -1) / np.sqrt(np.float32(len(v))) for m, v in representations.items()}

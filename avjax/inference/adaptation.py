"""Caches that grow with a user's corrections, and the learning curve of a few labelled clips of a person.

A user's cache serves all lanes of a run together: it holds their concatenated features, whose cosine is the mean of the
lanes' cosines (`fewshot.joined`). The curve is measured lane by lane, on people whom the lane has not seen.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from avjax.datasets import folder, labels
from avjax.datasets.base import Clip
from avjax.errors import AvjaxError
from avjax.evaluation import fewshot
from avjax.evaluation import fewshot_cache as caches
from avjax.evaluation.fewshot_cache import Cache
from avjax.evaluation.predictor import Caches
from avjax.inference import predict as prediction
from avjax.inference.run import Run
from avjax.models.emoasst import modalities
from avjax.tasks import metrics


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of the curve: the scores on a person's other clips, given so many labelled ones per class.

    Attributes:
      shots: labelled clips per class; 0 = as trained.
      uar: person → mean over lanes and draws.
      spread: standard deviation of `uar` over people.
      better: the proportion of people with a higher `uar` than without labelled clips.
    """

    shots: int
    uar: dict[str, float]
    spread: float
    better: float

    @property
    def mean(self) -> float:
        """Returns the mean over people."""
        return float(np.mean([*self.uar.values()]))


def open_cache(path: Path, workdir: Path, run: Run) -> Cache:
    """Reads the cache at `path`, or makes a new one if there is none; raises as `read_cache`."""
    return read_cache(path, run) if path.exists() else new_cache(workdir, run)


def read_cache(path: Path, run: Run) -> Cache:
    """Reads the cache at `path`.

    Raises:
      AvjaxError: it is damaged, of another run or of lanes that this one lacks, or the run does not predict by a cache.
    """
    own, cache = _caches(run), caches.load(path)
    if cache.origin != own[0].origin or cache.classes != run.classes:
        raise AvjaxError(f"{path}: a cache of another run than {run.name}; features of two runs cannot be compared")
    if cache.text.shape[1] != sum(lane.text.shape[1] for lane in own):
        raise AvjaxError(f"{path}: made for all lanes of the run; this bundle has {len(run.lanes)} of them")
    return cache


def with_cache(run: Run, cache: Cache) -> Run:
    """Replaces the caches of a run's lanes by a user's cache."""
    return dataclasses.replace(run, predictor=Caches((cache,), together=True))


def _caches(run: Run) -> tuple[Cache, ...]:
    if not isinstance(run.predictor, Caches):
        raise AvjaxError(f"run {run.name} has no cache to adapt; train one with configs/emoasst_folder.py")
    return run.predictor.caches


def new_cache(workdir: Path, run: Run) -> Cache:
    """Makes a new cache of a run: as many clips per class as a lane has, and the lanes' median alpha and beta.

    Raises:
      AvjaxError: the run does not predict by a cache, or its features are missing or damaged.
    """
    own, kept = _caches(run), fewshot.read_representations(workdir)
    joined = fewshot.joined({m: kept[m] for m in modalities(tuple(kept))})
    ids, label = kept["clip_id"].tolist(), kept["label"]
    text = fewshot.joined({"text": np.stack([c.text for c in own])})["text"]
    cache = caches.empty(run.classes, text, tuple(joined), own[0].origin)
    shots = max(int(np.bincount(c.label).max()) for c in own)
    chosen = caches.few(label, ids, len(run.classes), shots, 0)
    names = [run.classes[i] for i in label[chosen]]
    cache = caches.add(cache, [ids[i] for i in chosen], names, {m: v[chosen] for m, v in joined.items()})
    alpha = {m: float(np.median([c.alpha[m] for c in own])) for m in joined}
    return dataclasses.replace(cache, alpha=alpha, beta=float(np.median([c.beta for c in own])))


def corrections(table: Path, run: Run) -> tuple[list[Clip], list[tuple[str, str]]]:
    """Reads clips with labels of the run's classes from a table `file,label[,id]`, and (id, reason) of the other rows.

    Raises:
      AvjaxError: there is no such table, or no row of it can be used.
    """
    corpus = folder.read(table, anywhere=True)
    if corpus.task.kind != "single":
        raise AvjaxError(f"{table}: its labels are of the task {corpus.task.kind!r}; expected a column label")
    reasons = {clip.id: labels.unknown_label(clip.label, run.classes) for clip in corpus.clips}
    rejected = [*corpus.rejected, *((i, reason) for i, reason in reasons.items() if reason)]
    clips = [clip for clip in corpus.clips if not reasons[clip.id]]
    if not clips:
        raise AvjaxError(f"{table}: none of its rows can be used; the first: {': '.join(rejected[0])}")
    return clips, rejected


def add_clips(
    cache: Cache, run: Run, clips: Sequence[Clip], console: Console, *, clip_seconds: float
) -> tuple[Cache, list[tuple[str, str]]]:
    """Adds clips, measured as in extraction, to a cache by their labels; returns also (id, reason) of unusable ones.

    Alpha and beta are kept: a few clips of one person are too few to fit them.
    """
    features, _, rejected = prediction.measure(run, clips, console, clip_seconds=clip_seconds)
    if features is None:
        return cache, rejected
    vectors = fewshot.joined(prediction.read_outputs(run, features))
    return caches.add(cache, features.ids, [clip.label for clip in features.clips], vectors), rejected


def curve(workdir: Path, run: Run, shots: Sequence[int], draws: int, seed: int = 0) -> list[Point]:
    """Computes the learning curve over labelled clips of a person whom a lane has not seen, beginning with none.

    For each lane, each person among its test clips and each draw, as many clips of each class as the largest of `shots`
    are drawn as labelled ones, fewer if a class has no more: one clip is always left to test, and people with at most
    one clip of every class are left out. The first `shots` of them are added to the lane's cache. The person's other
    clips are predicted: the same ones at every point. Alpha and beta are the lane's own, fitted without this person.

    Raises:
      AvjaxError: shots or draws are not positive, speakers are unknown, or nobody has two clips of a class.
    """
    own = _caches(run)
    shots = sorted(set(shots))
    if not shots or shots[0] < 1 or draws < 1:
        raise AvjaxError(f"labelled clips per class are {shots}, draws {draws}; expected 1 or more of each")
    kept = fewshot.read_representations(workdir)
    if not all(kept["speaker"]):
        raise AvjaxError(f"{workdir}: its clips have no speakers; a curve needs people whom a lane has not seen")
    scores: dict[int, dict[str, list[float]]] = {k: {} for k in (0, *shots)}
    for lane, cache in enumerate(own):
        vectors = {m: kept[m][lane] for m in modalities(tuple(kept))}
        for person in np.unique(kept["speaker"][kept["tested"][lane]]).tolist():
            clips = np.flatnonzero(kept["tested"][lane] & (kept["speaker"] == person))
            for draw in range(draws):
                rng = np.random.default_rng([seed, lane, draw])
                for k, score in _drawn(cache, vectors, kept, clips, shots, rng):
                    scores[k].setdefault(person, []).append(score)
    if not scores[0]:
        raise AvjaxError(f"{workdir}: nobody has two clips of a class, one to label and one to test")
    return _points(scores)


def _drawn(
    cache: Cache,
    vectors: Mapping[str, np.ndarray],
    kept: Mapping[str, np.ndarray],
    own: np.ndarray,
    shots: Sequence[int],
    rng: np.random.Generator,
) -> Iterator[tuple[int, float]]:
    """Yields (shots, UAR of the test clips) of one draw from a person's clips `own`."""
    label, ids = kept["label"], kept["clip_id"]
    order = rng.permutation(own)
    by_class = {c: [i for i in order if label[i] == c] for c in np.unique(label[own]).tolist()}
    aside = {c: members[: min(shots[-1], len(members) - 1)] for c, members in by_class.items()}
    if not any(aside.values()):
        return
    rest = np.array([i for c, members in by_class.items() for i in members[len(aside[c]) :]])
    for k in (0, *shots):
        chosen = np.array([i for members in aside.values() for i in members[:k]], int)
        names = [cache.classes[label[i]] for i in chosen]
        grown = (
            caches.add(cache, ids[chosen].tolist(), names, {m: v[chosen] for m, v in vectors.items()}) if k else cache
        )
        predicted = caches.predict(grown, {m: v[rest] for m, v in vectors.items()}).argmax(-1)
        yield k, float(metrics.uar(metrics.count(label[rest], predicted, len(cache.classes))))


def _points(scores: dict[int, dict[str, list[float]]]) -> list[Point]:
    means = {
        k: {person: float(np.mean(of_person)) for person, of_person in people.items()} for k, people in scores.items()
    }
    return [
        Point(
            k,
            uar,
            float(np.std([*uar.values()])),
            float(np.mean([uar[person] > means[0][person] for person in uar])),
        )
        for k, uar in means.items()
    ]

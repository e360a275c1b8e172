"""Training on streamed clips (`streams.Streamed`): the step, the order and the scores of `loop`, one step at a call.

A run can be cut anywhere: beside the checkpoints of whole epochs, one within an epoch is written every
`train.save_steps` steps, and a run that finds it goes on after that very step, with the same numbers.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avjax.errors import Stopped
from avjax.models.base import Model
from avjax.settings import Settings
from avjax.training import batches, loop, standardise, streamed_batches
from avjax.training.checkpoint import Checkpoints
from avjax.training.lanes import Lane
from avjax.training.sharding import ALONE, Placement
from avjax.training.streamed_batches import Streamed
from avjax.utils import multihost

FOLDER = "within_epoch"  # of the run directory
_ASKED = 16  # steps between two questions to other processes whether one was told to stop


def make(
    model: Model,
    settings: Settings,
    workdir: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    placement: Placement = ALONE,
    stop_requested: Callable[[], bool] = lambda: False,
) -> loop.Trainer:
    """As `loop.make`, for data that are `Streamed`; an epoch is a call, whatever `train.epochs_per_call` says.

    Args:
      workdir: where checkpoints within epochs go; None for none.
      say: is told of each such checkpoint, as a sign of progress.
      placement: where arrays live; each process reads what its devices need of a batch.
      stop_requested: whether the run is to stop; it then writes a checkpoint after the step and raises `Stopped`.
    """
    run = _Run(loop.recipe_of(model, settings, placement), workdir / FOLDER if workdir else None, say, stop_requested)
    return loop.Trainer(init=run.init, epochs=run.epochs, predict=run.predict)


class _Run:
    """The compiled functions of a run over lanes, and what goes on between them."""

    def __init__(
        self, recipe: loop.Recipe, folder: Path | None, say: Callable[[str], None], stop_requested: Callable[[], bool]
    ) -> None:
        model, settings, placement = recipe.model, recipe.settings, recipe.placement
        self._say, self._placement, self._stop_requested = say, placement, stop_requested
        self._settings, self._folder = settings, folder
        over = functools.partial(loop.over_lanes, model, placement)
        start = loop.over_lanes(None, placement, functools.partial(_start, recipe), (0, 0, 0, None))
        self._start = jax.jit(lambda *arguments: placement.state(start(*arguments)))
        self._order = jax.jit(
            jax.vmap(functools.partial(loop.epoch_order, batch_size=settings.train.batch_size), (0, None))
        )
        self._step = step(recipe)
        score = over(functools.partial(_score, recipe), (0, 0, 0, None))
        self._score = jax.jit(lambda *arguments: placement.replicate(score(*arguments)))
        end = jax.vmap(functools.partial(_end, recipe), (0, 0, None))
        self._end = jax.jit(lambda *arguments: _placed(placement, end(*arguments)))
        predict = over(functools.partial(_predict, recipe), (0, 0, None))
        self._predict = jax.jit(lambda *arguments: placement.replicate(predict(*arguments)))

    def init(self, lanes: Lane, data: Streamed) -> loop.State:
        known = self._placement.read(lanes)
        stats = self._placement.put_lanes(jax.device_get(streamed_batches.statistics(data, known.counted)))
        first = self._batch(data, known.train[:, :1], known.train_weight[:, :1])
        return self._start(lanes, stats, first, data.constants)

    def epochs(
        self, state: loop.State, lanes: Lane, data: Streamed, first: jax.Array
    ) -> tuple[loop.State, dict[str, np.ndarray]]:
        """One epoch; see `loop.Trainer`."""
        epoch, live = int(first), ~self._placement.read(state.stopped)
        order = index, weight = self._placement.read(self._order(lanes, first))
        found: list[dict] = []
        with _Kept(self._folder) as kept:
            if count := kept.count(epoch, index.shape[1]):
                state, found = self._restored(kept, count, state, lanes, data, order)
            for batch in self._batches(data, index, weight, len(found)):
                state, sums = self._step(state, lanes, batch, data.constants, (first, np.int32(len(found))))
                found.append(sums)
                said = f"epoch {epoch}/{self._settings.train.epochs}, step {len(found)} of {index.shape[1]}"
                stop = self._must_stop(len(found), said)
                due = self._settings.train.save_steps and len(found) % self._settings.train.save_steps == 0
                if due or stop:
                    kept.save(epoch, index.shape[1], state, found)
                    self._say(said)
                if stop:
                    raise Stopped(said)
        val = self._validated(state, lanes, data)
        state, val = self._end(state, val, first)
        train = jax.tree.map(lambda *steps: np.stack(steps, -1), *jax.device_get(found))
        size = self._placement.read(lanes.train_weight).reshape(len(live), -1).sum(-1)
        sums = train | {"train_size": size} | jax.device_get(val) | {"live": live}
        return state, jax.tree.map(lambda v: v[:, None], sums)  # an axis of epochs

    def _must_stop(self, step: int, said: str) -> bool:
        """Whether the run is to stop; several processes find that out together, and so not at every step."""
        if jax.process_count() == 1:
            return self._stop_requested()
        if step % _ASKED:
            return False
        multihost.reached(said)
        return multihost.agree(self._stop_requested())

    def _restored(
        self, kept: "_Kept", count: int, state: loop.State, lanes: Lane, data: Streamed, order: tuple
    ) -> tuple[loop.State, list[dict]]:
        """Reads the state after `count` steps of an epoch, and the sums of these; `order`: of its clips."""
        batch = self._batch(data, *(v[:, 0] for v in order))
        shape = jax.eval_shape(self._step, state, lanes, batch, data.constants, (np.int32(0), np.int32(0)))[1]
        one = self._placement.put(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shape))
        held = kept.restore({"state": state, "found": [one] * count})
        return held["state"], list(held["found"])

    def predict(self, state: loop.State, lanes: Lane, data: Streamed) -> dict[str, jax.Array]:
        tested = self._parts(data, lanes.test, lanes.test_weight)
        parts = [self._predict(state, batch, data.constants) for batch in tested]
        rows = jax.tree.map(lambda *rows: jnp.concatenate(rows, 1), *parts)
        return {head: logits[:, : lanes.test.shape[1]] for head, logits in rows.items()}

    def _validated(self, state: loop.State, lanes: Lane, data: Streamed) -> dict[str, jax.Array]:
        held = self._parts(data, lanes.val, lanes.val_weight)
        parts = [self._score(state, lanes, batch, data.constants) for batch in held]
        return jax.tree.map(lambda *sums: sum(sums), *parts)

    def _parts(self, data: Streamed, index: jax.Array, weight: jax.Array) -> Iterator[Any]:
        """The batches that `loop` evaluates in."""
        known = self._placement.read((index, weight))
        return self._batches(data, *jax.device_get(jax.vmap(loop.parts)(*known)), 0)

    def _batches(self, data: Streamed, index: np.ndarray, weight: np.ndarray, first: int) -> Iterator[Any]:
        """The batches of all lanes, step by step: index, weight (lanes, steps, …)."""
        shape = index.shape[0], index.shape[2]
        lanes, clips = self._placement.part(shape)
        by_step = np.moveaxis(index[lanes, :, clips], 1, 0)
        for at, (numbers, rows) in enumerate(streamed_batches.batches(data, by_step, first), first):
            part = _joined(numbers, rows, weight[lanes, at, clips], len(data.label))
            yield self._placement.put_batch(part, shape)

    def _batch(self, data: Streamed, index: np.ndarray, weight: np.ndarray) -> dict:
        shape = index.shape[:2]
        own = self._placement.part(shape)
        part = _joined(index[own], data.rows(index[own]), weight[own], len(data.label))
        return self._placement.put_batch(part, shape)


def step(recipe: loop.Recipe) -> Callable:
    """Compiles one training step: (state, lanes, batch, constants, (epoch, step)) → (state, sums)."""
    over = loop.over_lanes(recipe.model, recipe.placement, functools.partial(_step, recipe), (0, 0, 0, None, None))
    return jax.jit(lambda *arguments: _placed(recipe.placement, over(*arguments)), donate_argnums=0)


def _placed(placement: Placement, pair: tuple[loop.State, dict]) -> tuple[loop.State, dict]:
    return placement.state(pair[0]), placement.replicate(pair[1])


def _joined(index: np.ndarray, rows: dict[str, np.ndarray], weight: np.ndarray, count: int) -> dict:
    """What a compiled function takes of a batch: the arguments of `pipeline.prepared` but the statistics."""
    there = index < count if index.ndim > 2 else weight > 0
    rows = dict(rows)
    group = rows.pop("group")
    return {"rows": rows, "group": group, "there": there, "weight": weight}


def _prepared(placement: Placement, stats: standardise.Statistics, batch: dict, constants: dict) -> dict[str, Any]:
    return placement.batch(batches.prepared(stats=stats, **batch)) | constants


def _start(recipe: loop.Recipe, lane: Lane, stats: standardise.Statistics, batch: dict, constants: dict) -> loop.State:
    return loop.init_state(recipe, lane, stats, _prepared(recipe.placement, stats, batch, constants))


def _step(
    recipe: loop.Recipe, state: loop.State, lane: Lane, batch: dict, constants: dict, at: tuple
) -> tuple[loop.State, dict[str, jax.Array]]:
    prepared = _prepared(recipe.placement, state.stats, batch, constants)
    state, (terms, gradient) = loop.train_step(recipe, state, lane, prepared, loop.step_key(lane, *at))
    return state, {"train_terms": terms, "train_gradient": gradient}


def _score(recipe: loop.Recipe, state: loop.State, lane: Lane, batch: dict, constants: dict) -> dict[str, jax.Array]:
    prepared = _prepared(recipe.placement, state.stats, batch, constants)
    return loop.validation(recipe.model, state, prepared, lane.prior)


def _end(recipe: loop.Recipe, state: loop.State, val: dict, epoch: jax.Array) -> tuple[loop.State, dict]:
    """The state after an epoch, and its validation sums."""
    val = loop.merged_sums(recipe.model, val)
    return loop.select(recipe, state, val, epoch), val


def _predict(recipe: loop.Recipe, state: loop.State, batch: dict, constants: dict) -> dict[str, jax.Array]:
    prepared = _prepared(recipe.placement, state.stats, batch, constants)
    logits = recipe.model.module.apply(state.best, prepared, train=False).logits
    return loop.with_chosen(recipe.model, logits, state.best_head)


class _Kept:
    """The checkpoints within epochs of a run, numbered by steps since its beginning; none without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._manager = Checkpoints(folder) if folder else None

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._manager:
            self._manager.__exit__(*exc_info)

    def save(self, epoch: int, steps: int, state: loop.State, found: list[dict]) -> None:
        if self._manager:
            self._manager.save((epoch - 1) * steps + len(found), {"state": state, "found": found})

    def count(self, epoch: int, steps: int) -> int:
        """How many steps of an epoch had been made when the newest was written; 0 if that was in another epoch."""
        done = (self._manager.newest() or 0) - (epoch - 1) * steps if self._manager else 0
        return done if 0 < done <= steps else 0

    def restore(self, like: dict) -> dict:
        return self._manager.restore(like)[1]

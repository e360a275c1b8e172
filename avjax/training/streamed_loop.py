"""Training on streamed clips (`streamed_batches.Streamed`): step, order and scores of `loop`, with one call per step.

A run can be interrupted anywhere: in addition to the checkpoints of epochs, one within the epoch is written every
`train.save_steps` steps, and a resumed run continues after that very step, bit for bit.
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
_STOP_INTERVAL = 16  # steps after which processes agree on whether one of them is to stop


def make(
    model: Model,
    settings: Settings,
    workdir: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    placement: Placement = ALONE,
    stop_requested: Callable[[], bool] = lambda: False,
) -> loop.Trainer:
    """Makes the functions of a run, as `loop.make`, for `Streamed` data; each call is one epoch.

    Args:
      model: what is trained.
      settings: of the experiment; `train.epochs_per_call` is not used.
      workdir: where checkpoints within epochs are written; None for none.
      say: called with a line about each such checkpoint.
      placement: where arrays live; each process reads the part of a batch that its devices need.
      stop_requested: returns whether to stop; the run then writes a checkpoint after the step and raises `Stopped`.
    """
    run = _Run(loop.recipe_of(model, settings, placement), workdir / FOLDER if workdir else None, say, stop_requested)
    return loop.Trainer(init=run.init, epochs=run.epochs, predict=run.predict)


class _Run:
    """The compiled functions of a run over lanes, and the host code between them."""

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
        """Makes the state before the first epoch."""
        host = self._placement.read(lanes)
        stats = self._placement.put_lanes(jax.device_get(streamed_batches.statistics(data, host.counted)))
        first = self._batch(data, host.train[:, :1], host.train_weight[:, :1])
        return self._start(lanes, stats, first, data.constants)

    def epochs(
        self, state: loop.State, lanes: Lane, data: Streamed, first: jax.Array
    ) -> tuple[loop.State, dict[str, np.ndarray]]:
        """Trains one epoch; see `loop.Trainer`."""
        epoch, live = int(first), ~self._placement.read(state.stopped)
        order = index, weight = self._placement.read(self._order(lanes, first))
        steps: list[dict] = []
        with _Kept(self._folder) as kept:
            if count := kept.count(epoch, index.shape[1]):
                state, steps = self._restored(kept, count, state, lanes, data, order)
            for batch in self._batches(data, index, weight, len(steps)):
                state, sums = self._step(state, lanes, batch, data.constants, (first, np.int32(len(steps))))
                steps.append(sums)
                line = f"epoch {epoch}/{self._settings.train.epochs}, step {len(steps)} of {index.shape[1]}"
                stop = self._must_stop(len(steps), line)
                due = self._settings.train.save_steps and len(steps) % self._settings.train.save_steps == 0
                if due or stop:
                    kept.save(epoch, index.shape[1], state, steps)
                    self._say(line)
                if stop:
                    raise Stopped(line)
        val = self._validated(state, lanes, data)
        state, val = self._end(state, val, first)
        train = jax.tree.map(lambda *steps: np.stack(steps, -1), *jax.device_get(steps))
        size = self._placement.read(lanes.train_weight).reshape(len(live), -1).sum(-1)
        sums = train | {"train_size": size} | jax.device_get(val) | {"live": live}
        return state, jax.tree.map(lambda v: v[:, None], sums)  # an axis of epochs

    def _must_stop(self, step: int, line: str) -> bool:
        """Returns whether the run is to stop; several processes agree on it, and so not at every step."""
        if jax.process_count() == 1:
            return self._stop_requested()
        if step % _STOP_INTERVAL:
            return False
        multihost.reached(line)
        return multihost.agree(self._stop_requested())

    def _restored(
        self, kept: "_Kept", count: int, state: loop.State, lanes: Lane, data: Streamed, order: tuple
    ) -> tuple[loop.State, list[dict]]:
        """Reads the state after `count` steps of an epoch, and their sums; `order`: the epoch's clips."""
        batch = self._batch(data, *(v[:, 0] for v in order))
        shape = jax.eval_shape(self._step, state, lanes, batch, data.constants, (np.int32(0), np.int32(0)))[1]
        one = self._placement.put(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shape))
        held = kept.restore({"state": state, "found": [one] * count})
        return held["state"], list(held["found"])

    def predict(self, state: loop.State, lanes: Lane, data: Streamed) -> dict[str, jax.Array]:
        """Predicts the test clips of each lane; see `loop.Trainer`."""
        tested = self._parts(data, lanes.test, lanes.test_weight)
        parts = [self._predict(state, batch, data.constants) for batch in tested]
        rows = jax.tree.map(lambda *rows: jnp.concatenate(rows, 1), *parts)
        return {head: logits[:, : lanes.test.shape[1]] for head, logits in rows.items()}

    def _validated(self, state: loop.State, lanes: Lane, data: Streamed) -> dict[str, jax.Array]:
        held = self._parts(data, lanes.val, lanes.val_weight)
        parts = [self._score(state, lanes, batch, data.constants) for batch in held]
        return jax.tree.map(lambda *sums: sum(sums), *parts)

    def _parts(self, data: Streamed, index: jax.Array, weight: jax.Array) -> Iterator[Any]:
        """Yields the batches that `loop` evaluates in."""
        host = self._placement.read((index, weight))
        return self._batches(data, *jax.device_get(jax.vmap(loop.parts)(*host)), 0)

    def _batches(self, data: Streamed, index: np.ndarray, weight: np.ndarray, first: int) -> Iterator[Any]:
        """Yields the batches of all lanes, step by step; index, weight: (lanes, steps, …)."""
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
    """Returns the arguments of `batches.prepared` other than the statistics, as compiled functions take them."""
    present = index < count if index.ndim > 2 else weight > 0
    rows = dict(rows)
    group = rows.pop("group")
    return {"rows": rows, "group": group, "present": present, "weight": weight}


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
    """Returns the state after an epoch, and its validation sums."""
    val = loop.merged_sums(recipe.model, val)
    return loop.select(recipe, state, val, epoch), val


def _predict(recipe: loop.Recipe, state: loop.State, batch: dict, constants: dict) -> dict[str, jax.Array]:
    prepared = _prepared(recipe.placement, state.stats, batch, constants)
    logits = recipe.model.module.apply(state.best, prepared, train=False).logits
    return loop.with_chosen(recipe.model, logits, state.best_head)


class _Kept:
    """The checkpoints within epochs, numbered by steps since the start of the run; none without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._manager = Checkpoints(folder) if folder else None

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._manager:
            self._manager.__exit__(*exc_info)

    def save(self, epoch: int, steps: int, state: loop.State, sums: list[dict]) -> None:
        if self._manager:
            self._manager.save((epoch - 1) * steps + len(sums), {"state": state, "found": sums})

    def count(self, epoch: int, steps: int) -> int:
        """Returns the number of steps of an epoch in the newest checkpoint; 0 if it is of another epoch."""
        done = (self._manager.newest() or 0) - (epoch - 1) * steps if self._manager else 0
        return done if 0 < done <= steps else 0

    def restore(self, like: dict) -> dict:
        return self._manager.restore(like)[1]

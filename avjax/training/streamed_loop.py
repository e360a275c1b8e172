"""Training on streamed clips (`streams.Streamed`): the step, the order and the scores of `loop`, one step at a call.

A run can be cut anywhere: beside the checkpoints of whole epochs, one within an epoch is written every
`train.save_steps` steps, and a run that finds it goes on after that very step, with the same numbers.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avjax.errors import Stopped
from avjax.models.base import Model
from avjax.training import batches, loop, optim, standardise, streamed_batches
from avjax.training.checkpoint import Checkpoints
from avjax.training.lanes import Lane
from avjax.training.sharding import ALONE, Placement
from avjax.training.streamed_batches import Streamed
from avjax.utils import multihost

FOLDER = "within_epoch"  # of the run directory
_ASKED = 16  # steps between two questions to other processes whether one was told to stop


def make(
    model: Model,
    config,
    workdir: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    place: Placement = ALONE,
    told: Callable[[], bool] = lambda: False,
) -> loop.Trainer:
    """As `loop.make`, for data that are `Streamed`; an epoch is a call, whatever `train.epochs_per_call` says.

    Args:
      workdir: where checkpoints within epochs go; None for none.
      say: is told of each such checkpoint, as a sign of progress.
      place: where arrays live; each process reads what its devices need of a batch.
      told: whether the run is to stop; it then writes a checkpoint after the step and raises `Stopped`.
    Raises:
      AvjaxError: `protocol.select` is unknown.
    """
    loop.check_select(config)
    run = _Run(model, config, workdir / FOLDER if workdir else None, say, place, told)
    return loop.Trainer(init=run.init, epochs=run.epochs, predict=run.predict)


class _Run:
    """The compiled functions of a run over lanes, and what goes on between them."""

    def __init__(self, model: Model, config, folder: Path | None, say, place: Placement, told):
        self._say, self._place, self._told = say, place, told
        self._config, self._folder = config, folder
        tx = optim.transform(config.train)
        over = functools.partial(loop.over_lanes, model, place)
        start = loop.over_lanes(None, place, functools.partial(_start, model, tx, place), (0, 0, 0, None))
        self._start = jax.jit(lambda *arguments: place.state(start(*arguments)))
        self._order = jax.jit(
            jax.vmap(functools.partial(loop.epoch_order, batch_size=config.train.batch_size), (0, None))
        )
        self._step = step(model, config, place)
        score = over(functools.partial(_score, model, place), (0, 0, 0, None))
        self._score = jax.jit(lambda *arguments: place.whole(score(*arguments)))
        end = jax.vmap(functools.partial(_end, model, config), (0, 0, None))
        self._end = jax.jit(lambda *arguments: _placed(place, end(*arguments)))
        answer = over(functools.partial(_answer, model, place), (0, 0, None))
        self._answer = jax.jit(lambda *arguments: place.whole(answer(*arguments)))

    def init(self, lanes: Lane, data: Streamed) -> loop.State:
        known = self._place.read(lanes)
        stats = self._place.put_lanes(jax.device_get(streamed_batches.statistics(data, known.counted)))
        first = self._batch(data, known.train[:, :1], known.train_weight[:, :1])
        return self._start(lanes, stats, first, data.constants)

    def epochs(self, state: loop.State, lanes: Lane, data: Streamed, first: jax.Array):
        """One epoch; see `loop.Trainer`."""
        epoch, live = int(first), ~self._place.read(state.stopped)
        index, weight = self._place.read(self._order(lanes, first))
        going = self._place.put_lanes(live)
        found: list[dict] = []
        with _Kept(self._folder) as kept:
            if count := kept.count(epoch, index.shape[1]):
                state, found = self._restored(kept, count, state, lanes, data, index, weight)
            for batch in self._batches(data, index, weight, len(found)):
                done = np.int32(len(found))
                state, sums = self._step(state, lanes, batch, data.constants, going, first, done)
                found.append(sums)
                said = f"epoch {epoch}/{self._config.train.epochs}, step {len(found)} of {index.shape[1]}"
                told = self._is_told(len(found), said)
                due = self._config.train.save_steps and len(found) % self._config.train.save_steps == 0
                if due or told:
                    kept.save(epoch, index.shape[1], state, found)
                    self._say(said)
                if told:
                    raise Stopped(said)
        val = self._validated(state, lanes, data)
        state, val = self._end(state, val, first)
        train = jax.tree.map(lambda *steps: np.stack(steps, -1), *jax.device_get(found))
        size = self._place.read(lanes.train_weight).reshape(len(live), -1).sum(-1)
        sums = train | {"train_size": size} | jax.device_get(val) | {"live": live}
        return state, jax.tree.map(lambda v: v[:, None], sums)  # an axis of epochs

    def _is_told(self, step: int, said: str) -> bool:
        """Whether the run is to stop; several processes find that out together, and so not at every step."""
        if jax.process_count() == 1:
            return self._told()
        if step % _ASKED:
            return False
        multihost.reached(said)
        return multihost.agree(self._told())

    def _restored(self, kept: "_Kept", count: int, state, lanes, data, index, weight) -> tuple[loop.State, list[dict]]:
        """The state after `count` steps of an epoch, and the sums of these."""
        batch = self._batch(data, index[:, 0], weight[:, 0])
        zero = np.int32(0)
        shape = jax.eval_shape(self._step, state, lanes, batch, data.constants, state.stopped, zero, zero)[1]
        one = self._place.put(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shape))
        held = kept.restore({"state": state, "found": [one] * count})
        return held["state"], list(held["found"])

    def predict(self, state: loop.State, lanes: Lane, data: Streamed) -> dict[str, jax.Array]:
        tested = self._parts(data, lanes.test, lanes.test_weight)
        parts = [self._answer(state, batch, data.constants) for batch in tested]
        whole = jax.tree.map(lambda *rows: jnp.concatenate(rows, 1), *parts)
        return {head: logits[:, : lanes.test.shape[1]] for head, logits in whole.items()}

    def _validated(self, state: loop.State, lanes: Lane, data: Streamed) -> dict[str, jax.Array]:
        held = self._parts(data, lanes.val, lanes.val_weight)
        parts = [self._score(state, lanes, batch, data.constants) for batch in held]
        return jax.tree.map(lambda *sums: sum(sums), *parts)

    def _parts(self, data: Streamed, index: jax.Array, weight: jax.Array):
        """The batches that `loop` evaluates in."""
        known = self._place.read((index, weight))
        return self._batches(data, *jax.device_get(jax.vmap(loop.parts)(*known)), 0)

    def _batches(self, data: Streamed, index: np.ndarray, weight: np.ndarray, first: int):
        """The batches of all lanes, step by step: index, weight (lanes, steps, …)."""
        shape = index.shape[0], index.shape[2]
        lanes, clips = self._place.part(shape)
        by_step = np.moveaxis(index[lanes, :, clips], 1, 0)
        for at, (numbers, rows) in enumerate(streamed_batches.batches(data, by_step, first), first):
            part = _joined(numbers, rows, weight[lanes, at, clips], len(data.label))
            yield self._place.put_batch(part, shape)

    def _batch(self, data: Streamed, index: np.ndarray, weight: np.ndarray) -> dict:
        shape = index.shape[:2]
        own = self._place.part(shape)
        part = _joined(index[own], data.rows(index[own]), weight[own], len(data.label))
        return self._place.put_batch(part, shape)


def step(model: Model, config, place: Placement = ALONE) -> Callable:
    """One training step, compiled: (state, lanes, batch, constants, live, epoch, step) → (state, sums)."""
    one = functools.partial(_step, model, optim.transform(config.train), config, place)
    over = loop.over_lanes(model, place, one, (0, 0, 0, None, 0, None, None))
    return jax.jit(lambda *arguments: _placed(place, over(*arguments)), donate_argnums=0)


def _placed(place: Placement, pair: tuple[loop.State, dict]) -> tuple[loop.State, dict]:
    return place.state(pair[0]), place.whole(pair[1])


def _joined(index: np.ndarray, rows: dict[str, np.ndarray], weight: np.ndarray, count: int) -> dict:
    """What a compiled function takes of a batch: the arguments of `pipeline.prepared` but the statistics."""
    there = index < count if index.ndim > 2 else weight > 0
    rows = dict(rows)
    group = rows.pop("group")
    return {"rows": rows, "group": group, "there": there, "weight": weight}


def _prepared(place: Placement, stats: standardise.Statistics, batch: dict, constants: dict) -> dict[str, Any]:
    return place.batch(batches.prepared(stats=stats, **batch)) | constants


def _start(
    model: Model, tx, place, lane: Lane, stats: standardise.Statistics, batch: dict, constants: dict
) -> loop.State:
    return loop.begun(model, tx, lane, stats, _prepared(place, stats, batch, constants))


def _step(
    model: Model, tx, config, place, state: loop.State, lane: Lane, batch: dict, constants: dict, live, epoch, step
):
    key, prepared = loop.step_key(lane, epoch, step), _prepared(place, state.stats, batch, constants)
    state, (terms, gradient) = loop.train_step(model, tx, config, state, lane, prepared, key, live)
    return state, {"train_terms": terms, "train_gradient": gradient}


def _score(model: Model, place, state: loop.State, lane: Lane, batch: dict, constants: dict) -> dict[str, jax.Array]:
    return loop.validation(model, state, _prepared(place, state.stats, batch, constants), lane.prior)


def _end(model: Model, config, state: loop.State, val: dict, epoch: jax.Array):
    """The state after an epoch, and its validation sums."""
    val = loop.whole(model, val)
    return loop.select(model, config, state, val, epoch), val


def _answer(model: Model, place, state: loop.State, batch: dict, constants: dict) -> dict[str, jax.Array]:
    logits = model.module.apply(state.best, _prepared(place, state.stats, batch, constants), train=False).logits
    return loop.with_chosen(model, logits, state.best_head)


class _Kept:
    """The checkpoints within epochs of a run, numbered by steps since its beginning; none without a folder."""

    def __init__(self, folder: Path | None):
        self._manager = Checkpoints(folder) if folder else None

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, *exc_info) -> None:
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

"""Training as one compiled program: a pure step, scanned over steps and epochs, `vmap`ped over the lanes of a protocol.

Each lane has its own parameters, optimizer state, best parameters so far and stop flag; a stopped lane keeps its state
while the others continue. All random draws come from the lane's seed and the epoch, so a run can be interrupted between
two calls and resumed bit for bit.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from avjax import tasks
from avjax.errors import AvjaxError
from avjax.models.base import CHOSEN, Batch, Model, Output
from avjax.settings import Settings
from avjax.training import optim
from avjax.training.augment import augment
from avjax.training.batches import Resident, alive, batches, gather, lane_statistics, shuffled
from avjax.training.lanes import Lane, LanePlan
from avjax.training.sharding import ALONE, Placement
from avjax.training.standardise import Statistics

_EVAL_BATCH = 64
# Bytes of the batches of all lanes. Measured with ETG-AVER on two cores with 32 MiB of cache: 25 lanes of batch 32 take
# 65 to 260 MB, and 1.2 times as long together as one by one; 15 of batch 8 take 10 MB, and 0.7 of the time.
_CACHE = 32 << 20


@flax.struct.dataclass
class State:
    """The state of one lane, carried from step to step.

    Attributes:
      params, opt_state, step: parameters, optimizer state, number of updates made.
      stats: the lane's standardisation statistics, fixed from the start; predictions need them as well as parameters.
      running: other variables of the model, such as running statistics of norms, which are updated without gradients.
      best: the variables that the lane will predict with.
      best_epoch: the epoch of `best`, counted from 1.
      best_head: the index in `Model.heads` of the head that `best` predicts with.
      best_score, best_loss: their validation score (`tasks.Scoring.picks`), and the loss, which breaks ties.
      bad: epochs since the best.
      stopped: whether the lane has stopped early.
    """

    params: dict
    opt_state: tuple
    step: jax.Array
    stats: Statistics
    running: dict
    best: dict
    best_epoch: jax.Array
    best_head: jax.Array
    best_score: jax.Array
    best_loss: jax.Array
    bad: jax.Array
    stopped: jax.Array


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all lanes and steps of a run share.

    Attributes:
      model: what is trained.
      tx: its optimizer, whose directions are not yet scaled by the learning rate.
      settings: of the whole experiment.
      placement: where arrays live.
    """

    model: Model
    tx: optax.GradientTransformation
    settings: Settings
    placement: Placement = ALONE


@flax.struct.dataclass
class Trainer:
    """The compiled functions of a run, all over lanes; `Lane` and `State` have a leading lane axis.

    Attributes:
      init: (lanes, data) → state.
      epochs: (state, lanes, data, first) → (state, sums), `epochs_per_call` epochs from epoch `first`; the state is
        donated.
      predict: (state, lanes, data) → {head: (lanes, n_test, c)}, predictions of each lane's best parameters for its
        test clips; of conversations (lanes, n_test, u, c).
    """

    init: Callable = flax.struct.field(pytree_node=False)
    epochs: Callable = flax.struct.field(pytree_node=False)
    predict: Callable = flax.struct.field(pytree_node=False)


def make(model: Model, settings: Settings, placement: Placement = ALONE) -> Trainer:
    """Makes the functions of a run; compiles nothing yet.

    Lanes and data passed to these functions must have been placed by `placement`.
    """
    recipe, over = recipe_of(model, settings, placement), functools.partial(over_lanes, model, placement)
    init = over_lanes(None, placement, functools.partial(_init, recipe), (0, None))
    epochs = over(functools.partial(_epochs, recipe), (0, 0, None, None), settings.train.batch_size)
    predict = over(functools.partial(_predict_test, recipe), (0, 0, None))

    def placed_epochs(*arguments: Any) -> tuple[State, dict[str, jax.Array]]:
        state, sums = epochs(*arguments)
        return placement.state(state), placement.replicate(sums)

    return Trainer(
        init=jax.jit(lambda *arguments: placement.state(init(*arguments))),
        epochs=jax.jit(placed_epochs, donate_argnums=0),
        predict=jax.jit(lambda *arguments: placement.replicate(predict(*arguments))),
    )


def recipe_of(model: Model, settings: Settings, placement: Placement = ALONE) -> Recipe:
    """Makes the recipe of an experiment."""
    return Recipe(model, optim.transform(settings.train), settings, placement)


def check_streams(model: Model, few: Resident, preset: str) -> None:
    """Checks that features (at least one clip) have the streams of the model, and raw frames where it reads them.

    Raises:
      AvjaxError: they do not; names the `preset` of the features.
    """
    streams = sorted(s for s in few.streams if f"{s}_mask" in few.streams and s != "surface")
    if missing := [s for s in model.streams if s not in streams]:
        raise AvjaxError(
            f"model.streams has {', '.join(missing)}; the features of preset {preset!r} have {', '.join(streams)}: "
            "extract with a preset that has it, or set model.streams"
        )
    raw = {s for s in model.streams if few.streams[s].ndim > 3}
    if raw != set(filter(None, [model.frame_stream])):
        wants = f"raw frames as {model.frame_stream}" if model.frame_stream else "feature sequences"
        has = f"raw frames as {', '.join(raw)}" if raw else "feature sequences"
        raise AvjaxError(
            f"the model reads {wants}, the features of preset {preset!r} are {has}: set model.settings.frames, or use "
            "another preset"
        )


def over_lanes(
    model: Model | None, placement: Placement, function: Callable, axes: tuple[int | None, ...], batch: int = 0
) -> Callable:
    """Maps `function` over the lanes of the arguments whose axis is 0, all together as `vmap` does.

    On one CPU device, lanes run one after another instead where running them together is no faster: a model of raw
    frames keeps gigabytes for the gradients of each lane, and batches that do not fit into the cache are slower.

    Args:
      model: that the function applies; None if it applies none.
      placement: where arrays live.
      function: of one lane.
      axes: 0 or None for each argument, as for `vmap`.
      batch: clips of a batch that the function takes from resident data.
    """

    def over(*arguments: Any) -> Any:
        large = model and (model.frame_stream or _batches_bytes(arguments, axes, batch) > _CACHE)
        if large and not placement.mesh and jax.default_backend() == "cpu":
            return one_by_one(*arguments)
        return jax.vmap(function, axes, spmd_axis_name=placement.axis)(*arguments)

    def one_by_one(*arguments: Any) -> Any:
        def one(lane: Any) -> Any:
            rest = iter(lane)
            return function(*(a if axis is None else next(rest) for a, axis in zip(arguments, axes, strict=True)))

        return jax.lax.map(one, tuple(a for a, axis in zip(arguments, axes, strict=True) if axis is not None))

    return over


def _batches_bytes(arguments: Sequence, axes: Sequence[int | None], batch: int) -> int:
    """Returns the bytes of a batch of all lanes, as far as it comes from resident data."""
    shared = [a for a, axis in zip(arguments, axes, strict=True) if axis is None and isinstance(a, Resident)]
    lanes = next(jax.tree.leaves(a)[0].shape[0] for a, axis in zip(arguments, axes, strict=True) if axis == 0)
    clip = sum(v.size * v.dtype.itemsize // v.shape[0] for data in shared for v in data.streams.values())
    return lanes * batch * clip


def _init(recipe: Recipe, lane: Lane, data: Resident) -> State:
    stats = lane_statistics(data, lane.counted)
    return init_state(recipe, lane, stats, gather(data, stats, lane.train[:1], lane.train_weight[:1]))


def init_state(recipe: Recipe, lane: Lane, stats: Statistics, batch: Batch) -> State:
    """Makes the state of a lane before its first step; `batch` gives the shapes that the model reads."""
    variables = recipe.model.module.init(jax.random.key(lane.seed), batch)
    running = {k: v for k, v in variables.items() if k != "params"}
    params, zero = variables["params"], jnp.int32(0)
    # The best variables start as a copy: donated buffers must not alias.
    return State(
        params=params,
        opt_state=recipe.tx.init(params),
        step=zero,
        stats=stats,
        running=running,
        best=jax.tree.map(jnp.copy, variables),
        best_epoch=zero,
        best_head=zero,
        best_score=jnp.float32(-jnp.inf),
        best_loss=jnp.float32(jnp.inf),
        bad=zero,
        stopped=jnp.bool_(False),
    )


def _epochs(recipe: Recipe, state: State, lane: Lane, data: Resident, first: jax.Array) -> tuple[State, dict]:
    def one(state: Any, epoch: Any) -> Any:
        live = ~state.stopped
        state, train = _train_epoch(recipe, state, lane, data, epoch)
        val = _evaluate(recipe, state, lane, data)
        return select(recipe, state, val, epoch), train | val | {"live": live}

    return jax.lax.scan(one, state, first + jnp.arange(recipe.settings.train.epochs_per_call))


def _batch(
    placement: Placement, data: Resident, stats: Statistics, index: jax.Array, weight: jax.Array
) -> dict[str, jax.Array]:
    return placement.batch(gather(data, stats, index, weight), data.constants)


def _train_epoch(recipe: Recipe, state: State, lane: Lane, data: Resident, epoch: jax.Array) -> tuple[State, dict]:
    order = epoch_order(lane, epoch, recipe.settings.train.batch_size)

    def one(state: Any, item: Any) -> Any:
        index, weight, step_key = item
        return train_step(recipe, state, lane, _batch(recipe.placement, data, state.stats, index, weight), step_key)

    # Keys are derived one by one: step 3 draws the same whether a lane is padded to 5 steps or to 7.
    keys = jax.vmap(functools.partial(step_key, lane, epoch))(jnp.arange(order[0].shape[0]))
    # Sums are kept by step and term, so that a non-finite value can be traced to its clips.
    state, (terms, gradient) = jax.lax.scan(one, state, (*order, keys))
    return state, {"train_terms": terms, "train_gradient": gradient, "train_size": jnp.sum(lane.train_weight)}


def train_step(recipe: Recipe, state: State, lane: Lane, batch: Batch, key: jax.Array) -> tuple[State, tuple]:
    """Updates a lane at its current learning rate; a stopped lane, or a batch of padding alone, leaves it unchanged.

    If a loss or the gradient is not finite, the lane is stopped with the state before that step.

    Returns:
      the state, and (summed loss by term, gradient norm).

    Raises:
      AvjaxError: gradients are to be accumulated, but the loss or running statistics need the whole batch.
    """
    train, stream = recipe.settings.train, recipe.model.frame_stream
    if stream and train.augment:
        how, draw = train.augment, jax.random.fold_in(key, 0)
        batch = batch | {stream: augment(batch[stream], draw, degrees=how.degrees, flip=how.flip)}
    grads, sums, running = _gradients(recipe, state, lane, batch, key)
    total = train.epochs * jnp.ceil(jnp.sum(alive(lane.train_weight)) / train.batch_size)
    rate = optim.learning_rate(train, (state.step + 0.5) / total)
    directions, opt_state = recipe.tx.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, directions)
    moved = state.replace(params=params, opt_state=opt_state, running=running, step=state.step + 1)
    norm, due = optax.global_norm(grads), ~state.stopped & (jnp.sum(batch["weight"]) > 0)
    # No loss scaling: bfloat16 has the exponent range of float32.
    finite = jnp.isfinite(norm) & jnp.isfinite(sum(sums.values()))
    kept = state.replace(stopped=state.stopped | (due & ~finite))
    return _where(due & finite, moved, kept), (sums, norm)


def _keys(lane: Lane, epoch: Any) -> jax.Array:
    """Returns the two keys of an epoch: for its order, and for its steps."""
    return jax.random.split(jax.random.fold_in(jax.random.key(lane.seed), epoch))


def step_key(lane: Lane, epoch: Any, step: Any) -> jax.Array:
    """Returns the key of all random draws of a step."""
    return jax.random.fold_in(_keys(lane, epoch)[1], step)


def epoch_order(lane: Lane, epoch: Any, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the indices and weights (steps, batch) of an epoch of a lane."""
    return shuffled(_keys(lane, epoch)[0], lane.train, lane.train_weight, batch_size)


def _gradients(recipe: Recipe, state: State, lane: Lane, batch: Batch, key: jax.Array) -> tuple[dict, dict, dict]:
    """Computes the gradients of the batch's mean loss, the summed loss by term, and the running variables."""
    pieces = recipe.settings.train.accumulate
    size = jnp.maximum(jnp.sum(batch["weight"]), 1.0)
    gradient = functools.partial(_gradient, recipe, state, lane.prior, size)
    if pieces > 1:
        _check_divisible(recipe.model, state, pieces)
        return *_accumulated(gradient, *optim.cut(batch, pieces), key), state.running
    grads, (sums, running) = gradient(batch, key)
    return grads, sums, running


def _gradient(
    recipe: Recipe, state: State, prior: jax.Array, size: jax.Array, batch: Batch, key: jax.Array
) -> tuple[dict, tuple]:
    """Computes the gradient of the batch's summed loss over `size`, and (summed loss by term, running variables)."""

    def mean_loss(params: Any) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        variables, mutable = {"params": params, **state.running}, list(state.running)
        apply = functools.partial(recipe.model.module.apply, train=True, rngs={"dropout": key}, mutable=mutable)
        output, running = apply(variables, batch)
        terms = recipe.model.loss(output, batch, prior)
        sums = {name: jnp.sum(term * batch["weight"]) for name, term in terms.items()}
        return sum(sums.values()) / size, (sums, running)

    return jax.grad(jax.checkpoint(mean_loss) if recipe.settings.train.remat else mean_loss, has_aux=True)(state.params)


def _accumulated(gradient: Callable, rows: dict, shared: dict, key: jax.Array) -> tuple[dict, dict]:
    """Sums gradients, and losses by term, over the pieces of a batch (`optim.cut`)."""

    def one(total: Any, item: Any) -> Any:
        number, piece = item
        grads, (sums, _) = gradient(shared | piece, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, (grads, sums)), None

    first = jax.tree.map(lambda v: v[0], rows)
    grads, (sums, _) = jax.eval_shape(lambda: gradient(shared | first, key))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, sums))
    return jax.lax.scan(one, zero, (jnp.arange(len(rows["weight"])), rows))[0]


def _check_divisible(model: Model, state: State, pieces: int) -> None:
    if model.whole_batch or state.running or tasks.SCORINGS[model.task].set_loss:
        what = "the statistics of its norms" if state.running else "its loss"
        raise AvjaxError(
            f"train.accumulate is {pieces}, but the model learns by whole batches ({what}): set it to 1, and "
            "train.batch_size to what fits into memory"
        )


def _variables(state: State) -> dict:
    return {"params": state.params, **state.running}


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def parts(index: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits a set into batches for evaluation, no larger than the set; without clips it is a single row of padding."""
    return batches(index, weight, min(_EVAL_BATCH, index.shape[0]))


def _evaluate(recipe: Recipe, state: State, lane: Lane, data: Resident) -> dict[str, jax.Array]:
    """Computes the validation sums of one lane: table of each head (`tasks.Scoring`), summed loss, number of clips."""
    model = recipe.model

    def one(sums: Any, item: Any) -> Any:
        batch = _batch(recipe.placement, data, state.stats, *item)
        return jax.tree.map(jnp.add, sums, validation(model, state, batch, lane.prior)), None

    table = jnp.zeros((len(model.heads), *tasks.SCORINGS[model.task].shape(lane.prior.shape[0])))
    zero = {"val_tables": table, "val_loss": jnp.float32(0), "val_size": jnp.float32(0)}
    return merged_sums(model, jax.lax.scan(one, zero, parts(lane.val, lane.val_weight))[0])


def merged_sums(model: Model, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Puts the loss of the whole set into merged validation sums, for tasks where it is not a sum over clips."""
    set_loss = tasks.SCORINGS[model.task].set_loss
    if not set_loss:
        return sums
    return sums | {"val_loss": sums["val_size"] * jnp.sum(set_loss(sums["val_tables"]))}


def validation(model: Model, state: State, batch: Batch, prior: jax.Array) -> dict[str, jax.Array]:
    """Computes the validation sums of a batch."""
    output = model.module.apply(_variables(state), batch, train=False)
    loss = sum(model.loss(output, batch, prior).values())
    table = tasks.SCORINGS[model.task].table
    tables = [table(batch["label"], output.logits[head], batch["weight"]) for head in model.heads]
    return {
        "val_tables": jnp.stack(tables),
        "val_loss": jnp.sum(loss * batch["weight"]),
        "val_size": jnp.sum(batch["weight"]),
    }


def candidates(model: Model) -> list[int]:
    """Returns the indices in `Model.heads` of the heads that may predict."""
    return [model.heads.index(head) for head in model.candidates or model.heads[:1]]


def select(recipe: Recipe, state: State, val: dict[str, jax.Array], epoch: Any) -> State:
    """Keeps the best epoch and head on validation, or the last epoch, and stops early; test clips play no part."""
    model, settings = recipe.model, recipe.settings
    among, scoring = jnp.array(candidates(model)), tasks.SCORINGS[model.task]
    scores = scoring.scores(val["val_tables"])[scoring.picks][among]
    score, head = jnp.max(scores), among[jnp.argmax(scores)]
    loss = val["val_loss"] / jnp.maximum(val["val_size"], 1.0)
    better = (score > state.best_score) | ((score == state.best_score) & (loss < state.best_loss))
    by_val = (settings.protocol.select == "val") & (val["val_size"] > 0)
    take = ~state.stopped & (better | ~by_val)
    kept = state.replace(
        best=_variables(state),
        best_epoch=jnp.int32(epoch),
        best_head=jnp.where(by_val, head, among[0]).astype(jnp.int32),
        best_score=score,
        best_loss=loss,
        bad=jnp.int32(-1),
    )
    state = _where(take, kept, state)
    bad = jnp.where(state.stopped, state.bad, state.bad + 1)
    patience = settings.train.patience
    stop = state.stopped | (epoch >= settings.train.epochs) | ((patience > 0) & by_val & (bad >= max(patience, 1)))
    return state.replace(bad=bad, stopped=stop)


def _predict_test(recipe: Recipe, state: State, lane: Lane, data: Resident) -> dict[str, jax.Array]:
    read = lambda batch: recipe.model.module.apply(state.best, batch, train=False).logits  # noqa: E731
    gathered = functools.partial(_batch, recipe.placement, data, state.stats)
    return with_chosen(recipe.model, _read_batches(read, gathered, lane.test, lane.test_weight), state.best_head)


def with_chosen(model: Model, logits: dict[str, jax.Array], head: jax.Array) -> dict[str, jax.Array]:
    """Adds the logits of the head with index `head`, where validation selects it, to the logits of all heads."""
    if len(model.candidates) < 2:
        return logits
    return logits | {CHOSEN: jnp.stack([logits[name] for name in model.heads])[head]}


def _read_batches(read: Callable, gathered: Callable, index: jax.Array, weight: jax.Array) -> Any:
    """Reads `index (n, …)` batch by batch: the tree that `read` returns for a `gathered` batch, each leaf (n, …)."""

    def one(_: None, rows: Any) -> Any:
        return None, read(gathered(*rows))

    outputs = jax.lax.scan(one, None, parts(index, weight))[1]
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:])[: index.shape[0]], outputs)


def read_clips(model: Model, read: Callable[[Output, jax.Array], Any], **how: Any) -> Callable:
    """Compiles (best, best_head, stats, data) → `read(output, best_head)` of all resident clips by each lane's best.

    A model of conversations reads each clip as a conversation of one turn.

    Args:
      model: that reads.
      read: returns a tree of arrays (b, …), of conversations (b, u, …).
      **how: further arguments of the module.

    Returns:
      a function that returns the tree with leaves (lanes, clips, …).
    """

    def every(best: Any, head: jax.Array, stats: Statistics, data: Resident) -> Any:
        index = jnp.arange(data.group.shape[0])
        rows = index[:, None] if model.turns else index
        by_head = lambda batch: read(model.module.apply(best, batch, train=False, **how), head)  # noqa: E731
        outputs = _read_batches(by_head, functools.partial(gather, data, stats), rows, jnp.ones(rows.shape))
        return jax.tree.map(lambda v: v[:, 0], outputs) if model.turns else outputs

    return jax.jit(over_lanes(model, ALONE, every, (0, 0, 0, None)))


def attention(model: Model, state: State, plan: LanePlan, data: Resident, count: int = 3) -> list[tuple[int, dict]]:
    """Computes attention in the first `count` test clips of the first lane; `data`: resident or streamed clips.

    Returns:
      (clip, {name: weights (q, k) of the real steps}) of each clip.
    """
    lane, state = (jax.tree.map(lambda v: jnp.asarray(v[0]), tree) for tree in (plan.lanes, state))
    index = lane.test[: min(count, int(jnp.sum(lane.test_weight)))]
    few = data.resident(index)

    def one(rows: jax.Array) -> Any:
        batch = gather(few, state.stats, rows, jnp.ones(rows.shape))
        return model.module.apply(state.best, batch, train=False).attention, batch

    weights, batch = jax.device_get(jax.jit(one)(jnp.arange(len(index))))
    by_clip = []
    for row, clip in enumerate(index.tolist()):
        maps = {}
        for name, *both in model.attention_maps:
            if name in weights:
                maps[name] = _of_real_steps(weights[name][row], [batch[f"{s}_mask"][row] for s in both])
        by_clip.append((clip, maps))
    return by_clip


def _of_real_steps(weights: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Returns weights (q, k) of the real steps; of a stream that the model shortens, those that have any weight."""
    masks = [m if len(m) == weights.shape[i] else weights.any(1 - i) for i, m in enumerate(masks)]
    return weights[np.ix_(*masks)]

"""The answer of a run as one program that JAX alone can run: weights and streams in, probabilities out (`jax.export`).

The weights are an argument, not a part of the program: they are stored once, and no limit of size is met. The program
answers each clip by itself, so that neighbours in a batch and padding cannot matter.
"""

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from avjax.errors import AvjaxError
from avjax.inference.run import Run
from avjax.models.end_to_end import EndToEnd
from avjax.training import batches

PLATFORMS = ("cpu", "cuda", "tpu")
# The numbers of steps that a stream may have: any; multiples, of models that group steps or ask for a least number; or
# that of the longest clip in training, up to which others are padded, of encoders that are trained along.
LENGTHS = ("{name}", "16*{name}", "{longest}")
# Flow stands on the time base of the picture.
_TIME_BASE = {"flow": "video"}

Program = Callable[[Mapping[str, jax.Array], Mapping[str, jax.Array]], jax.Array]


def weights_of(run: Run) -> dict[str, np.ndarray]:
    """All arrays that an answer depends on, by names joined by "/".

    The first axis is that of the lanes, but for `constants/`, which all lanes share. `best/` are the variables that a
    lane answers with, `best_head` is the place of its head, `stats/<stream>/mean` and `std` (lanes, 1, d) standardise.
    """
    read = {stream: run.stats[stream] for stream in run.model.streams if stream in run.stats}
    tree = {
        "best": run.best,
        "best_head": run.best_head,
        "stats": {stream: {"mean": mean, "std": std} for stream, (mean, std) in read.items()},
        "constants": dict(run.model.constants),
        "caches": dict(run.predictor.weights),
    }
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}


def answer(run: Run) -> Program:
    """The program of a run: (weights as `weights_of` names them, streams) → (b, c) float32.

    Streams are `<stream> (b, n, …)` and `<stream>_mask (b, n)`, False where nothing is. The answers are those of
    `predict.probabilities`: the mean over lanes of probabilities, or of values. To a model of conversations each clip
    is one of its own.
    """
    # What pictures and encoders take grows with lanes and clips: these go one by one.
    over = jax.lax.map if run.model.frame_stream or isinstance(run.model.module, EndToEnd) else _together

    def program(weights: Mapping[str, jax.Array], streams: Mapping[str, jax.Array]) -> jax.Array:
        lanes = unflatten_dict(dict(weights), sep="/")
        constants, caches = lanes.pop("constants", {}), lanes.pop("caches", {})

        def of_clip(clip: Mapping[str, jax.Array]) -> jax.Array:
            read = over(lambda lane: _read(run, lane, constants, clip), lanes)
            return run.predictor.predict(read, caches)[0].astype(jnp.float32)

        return over(of_clip, dict(streams))

    return program


def _together(function: Callable, arrays: Any) -> Any:
    return jax.vmap(function)(arrays)


def _read(run: Run, lane: Mapping[str, Any], constants: Mapping[str, Any], clip: Mapping[str, jax.Array]) -> Any:
    """Reads what the predictor takes of a lane's output for a clip, streams (n, …): a tree with leaves (1, …)."""
    model, lead = run.model, (1, 1) if run.model.turns else (1,)
    rows = {key: value.reshape(*lead, *value.shape) for key, value in clip.items()}
    stats = {stream: (found["mean"], found["std"]) for stream, found in lane.get("stats", {}).items()}
    batch = batches.prepared(rows, jnp.zeros(lead, jnp.int32), stats, jnp.ones(lead, bool), jnp.ones(lead))
    output = model.module.apply(lane["best"], batch | dict(constants), train=False)
    read = run.predictor.read(output, lane["best_head"])
    return jax.tree.map(lambda v: v.reshape(1, *v.shape[len(lead) :]).astype(jnp.float32), read)


def exported(run: Run, weights: Mapping[str, np.ndarray]) -> export.Exported:
    """`answer` for any number of clips and steps, for all `PLATFORMS`; products are float32's own everywhere.

    Args:
      weights: as `weights_of` gives them.
    Raises:
      AvjaxError: it is not known what the run's streams are like, or its model has no such program.
    """
    if lacking := [stream for stream in run.model.streams if stream not in run.streams]:
        raise AvjaxError(
            f"run {run.name}: not of this version of avjax (it does not say how wide {', '.join(lacking)} are); train "
            "again"
        )
    trouble = None
    for form in LENGTHS:
        try:
            return _exported(run, weights, form)
        except Exception as error:  # what a model cannot do with an unknown length raises errors of many kinds
            trouble = error
    reason = textwrap.shorten(str(trouble), 200)
    raise AvjaxError(f"run {run.name}: no portable program of its model ({type(trouble).__name__}: {reason})") from (
        trouble
    )


def _exported(run: Run, weights: Mapping[str, np.ndarray], form: str) -> export.Exported:
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}
    scope, streams = export.SymbolicScope(), {}
    for stream in run.model.streams:
        (longest, *step), dtype = run.streams[stream]
        steps = form.format(name=f"{_TIME_BASE.get(stream, stream)}_steps", longest=longest)
        lead = export.symbolic_shape(f"clips, {steps}", scope=scope)
        streams[stream] = jax.ShapeDtypeStruct((*lead, *step), dtype)
        streams[f"{stream}_mask"] = jax.ShapeDtypeStruct(lead, bool)
    with jax.default_matmul_precision("highest"), _without_places():
        return export.export(jax.jit(answer(run)), platforms=PLATFORMS)(shapes, streams)


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Where the source files are on this machine is nobody's business."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def inputs(program: export.Exported) -> dict[str, dict[str, object]]:
    """What the program reads beside the weights: name → its `shape`, unknown sizes by name, and `dtype`."""
    _, streams = jax.tree.unflatten(program.in_tree, program.in_avals)[0]
    return {
        name: {"shape": [size if isinstance(size, int) else str(size) for size in aval.shape], "dtype": aval.dtype.name}
        for name, aval in streams.items()
    }

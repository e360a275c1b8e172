"""Prediction as one program that JAX alone can run: weights and streams in, probabilities out (`jax.export`).

The weights are an argument, not a part of the program: they are stored once, and no size limit applies. The program
predicts each clip by itself, so that neighbours in a batch and padding do not matter.
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
# The numbers of steps that a stream may have: any; multiples, for models that group steps or need a minimum; or that of
# the longest clip in training, to which others are padded, for encoders that are trained too.
LENGTHS = ("{name}", "16*{name}", "{longest}")
# Flow has the time base of the video.
_TIME_BASE = {"flow": "video"}

Program = Callable[[Mapping[str, jax.Array], Mapping[str, jax.Array]], jax.Array]


def weights_of(run: Run) -> dict[str, np.ndarray]:
    """Returns all arrays that a prediction depends on, by names joined by "/".

    The first axis is that of the lanes, except in `constants/`, which all lanes share. `best/` are the variables that a
    lane predicts with, `best_head` is the index of its head, `stats/<stream>/mean` and `std` (lanes, 1, d) standardise.
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


def program_of(run: Run) -> Program:
    """Returns the program of a run: (weights as named by `weights_of`, streams) → (b, c) float32.

    Streams are `<stream> (b, n, …)` and `<stream>_mask (b, n)`, False for padding. The result is that of
    `predict.probabilities`: the mean over lanes of probabilities, or of values. To a model of conversations, each clip
    is a conversation of its own.
    """
    # The memory of frames and encoders grows with lanes and clips: these run one by one.
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
    stats = {stream: (s["mean"], s["std"]) for stream, s in lane.get("stats", {}).items()}
    batch = batches.prepared(rows, jnp.zeros(lead, jnp.int32), stats, jnp.ones(lead, bool), jnp.ones(lead))
    output = model.module.apply(lane["best"], batch | dict(constants), train=False)
    read = run.predictor.read(output, lane["best_head"])
    return jax.tree.map(lambda v: v.reshape(1, *v.shape[len(lead) :]).astype(jnp.float32), read)


def exported(run: Run, weights: Mapping[str, np.ndarray]) -> export.Exported:
    """Exports `program_of(run)` for any number of clips and steps and all `PLATFORMS`, with products in float32.

    `weights` are those of `weights_of`.

    Raises:
      AvjaxError: the run has no record of its streams, or its model has no such program.
    """
    if lacking := [stream for stream in run.model.streams if stream not in run.streams]:
        raise AvjaxError(
            f"run {run.name}: not of this version of avjax (it has no width of {', '.join(lacking)}); train again"
        )
    trouble = None
    for form in LENGTHS:
        try:
            return _exported(run, weights, form)
        except Exception as error:  # a model that does not support a symbolic length raises errors of many kinds
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
    with jax.default_matmul_precision("highest"), _without_paths():
        return export.export(jax.jit(program_of(run)), platforms=PLATFORMS)(shapes, streams)


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
    """Keeps the paths of source files on this machine out of the program."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def inputs(program: export.Exported) -> dict[str, dict[str, object]]:
    """Returns the inputs of a program besides the weights: name → `shape`, symbolic sizes by name, and `dtype`."""
    _, streams = jax.tree.unflatten(program.in_tree, program.in_avals)[0]
    return {
        name: {"shape": [size if isinstance(size, int) else str(size) for size in aval.shape], "dtype": aval.dtype.name}
        for name, aval in streams.items()
    }

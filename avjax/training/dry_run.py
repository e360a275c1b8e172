"""Dry run: parameters and their sharding, and memory and FLOPs of a step as the compiler reports them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console

from avjax.models.base import Model
from avjax.settings import Settings
from avjax.training import loop, sharding, streamed_loop
from avjax.training.batches import Resident
from avjax.training.lanes import LanePlan
from avjax.training.sharding import Placement
from avjax.training.streamed_batches import Streamed, on_one_device


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step of all lanes, compiled for its devices.

    Attributes:
      state: shapes and shardings of the run's state.
      compiled: the program of one step.
    """

    state: Any
    compiled: jax.stages.Compiled

    @property
    def memory(self) -> dict[str, int]:
        """Returns bytes on each device: of the arguments (state and batch), temporary arrays, and the program."""
        analysis = self.compiled.memory_analysis()
        return {
            "arguments": analysis.argument_size_in_bytes,
            "temporary": analysis.temp_size_in_bytes,
            "program": analysis.generated_code_size_in_bytes,
        }

    @property
    def flops(self) -> float:
        """Returns the floating-point operations of a step on each device, as the compiler counts them."""
        return self.compiled.cost_analysis().get("flops", 0.0)


def compile_step(
    model: Model, settings: Settings, placement: Placement, plan: LanePlan, clips: Resident | Streamed
) -> Step:
    """Compiles a training step from shapes alone; nothing is computed."""
    few = on_one_device(clips).resident(np.arange(1))
    lanes, shapes = _shapes(plan.lanes), _shapes(few)
    count, size = len(plan.names), settings.train.batch_size
    one = lanes.replace(counted=jax.ShapeDtypeStruct((count, 1), np.float32))
    state = jax.eval_shape(loop.make(model, settings).init, one, shapes)
    if placement.mesh:
        state = _placed(state, placement.of_state(state))
    turns = plan.lanes.train.shape[2:]
    row = lambda dtype, *more: jax.ShapeDtypeStruct((count, size, *turns, *more), dtype)  # noqa: E731
    batch = {
        "rows": {k: row(v.dtype, *v.shape[1:]) for k, v in few.streams.items()},
        "group": row(np.int32),
        "present": row(bool),
        "weight": row(np.float32),
    }
    step = streamed_loop.step(loop.recipe_of(model, settings, placement))
    lowered = step.lower(state, lanes, batch, _shapes(few.constants), (np.int32(1), np.int32(0)))
    return Step(state, lowered.compile())


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(np.shape(v), v.dtype), tree)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), shapes, shardings)


def show(
    model: Model, settings: Settings, placement: Placement, plan: LanePlan, clips: Resident | Streamed, console: Console
) -> Mapping[str, Any]:
    """Prints the parameter table, devices, memory and FLOPs, and returns the figures."""
    step = compile_step(model, settings, placement, plan, clips)
    lanes, devices = len(plan.names), placement.mesh.size if placement.mesh else 1
    size = sum(v.size for v in jax.tree.leaves(step.state.params)) // lanes
    resident = 0 if isinstance(clips, Streamed) else sum(v.nbytes for v in jax.tree.leaves(clips))
    figures = {
        "parameters": size,
        "lanes": lanes,
        "devices": devices,
        "processes": jax.process_count(),
        "state_bytes": sum(_bytes_per_device(leaf) for leaf in jax.tree.leaves(step.state)),
        "resident_bytes": resident,
        **{f"{name}_bytes": value for name, value in step.memory.items()},
        "flops": step.flops,
    }
    say = lambda text: console.print(text, soft_wrap=True, markup=False)  # noqa: E731
    say(parameters(step.state.params, placement))
    say(f"{lanes} lanes of {size:,} parameters on {sharding.described(placement)}")
    say(f"on each device: state {_mib(figures['state_bytes'])}, resident clips {_mib(resident)}")
    memory = ", ".join(f"{name} {_mib(value)}" for name, value in step.memory.items())
    work = f"{figures['flops'] / 1e9:.3g} GFLOP"
    say(f"a step of batch {settings.train.batch_size}, on each device: {memory}; {work}")
    say("dry run: nothing was trained or written")
    return figures


def parameters(params: Any, placement: Placement) -> str:
    """Lists name, shape, dtype and size of each parameter, and its sharding on a mesh; the lanes are the first axis."""
    from clu import parameter_overview

    return parameter_overview.get_parameter_overview(params, include_stats="sharding" if placement.mesh else False)


def _bytes_per_device(leaf: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of an array on one device."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return int(np.prod(shape)) * leaf.dtype.itemsize


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"

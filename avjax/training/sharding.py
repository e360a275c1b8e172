"""Placement of arrays: a mesh of devices, sharding rules by the paths of parameters, and the check that both hold.

The mesh has four axes. `lane` splits the lanes of a protocol, and `data` the clips of a batch; `fsdp` splits clips and,
between steps, parameters with their optimizer state; `tensor` splits the heads and hidden units of a layer. Every array
of a run's state has the lanes as its first axis, so its sharding is that axis followed by the rule of its path. XLA's
partitioner adds the communication; models do not depend on the mesh.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from avjax.errors import AvjaxError
from avjax.settings import MeshSettings, Settings

AXES = ("lane", "data", "fsdp", "tensor")  # the last ones communicate most, so their devices are neighbours
_BATCH = ("data", "fsdp")  # split the clips of a batch

Rules = tuple[tuple[str, P], ...]

# Path pattern → the sharding of a parameter's axes, without lanes. The first rule applies whose pattern is found in the
# path and whose length is the number of axes; a parameter without a rule, such as a norm's scale, is replicated.
_TRANSFORMER: Rules = (
    (r"/(query|key|value|position)/kernel$", P("fsdp", "tensor", None)),  # width, heads, width of a head
    (r"/(query|key|value|position)/bias$", P("tensor", None)),
    (r"/(content|position)_bias$", P("tensor", None)),
    (r"/out/kernel$", P("tensor", None, "fsdp")),
    (r"/up/kernel$", P("fsdp", "tensor")),
    (r"/up/bias$", P("tensor")),
    (r"/down/kernel$", P("tensor", "fsdp")),
)
_DENSE: Rules = ((r"/kernel$", P("fsdp", None)),)
_CONVOLUTION: Rules = (
    (r"/kernel$", P(None, None, "fsdp")),
    (r"/kernel$", P(None, None, "fsdp", "tensor")),
)
# By model family; a family without an entry has the rules of the fusions.
RULES: dict[str, Rules] = {
    "etg_aver": ((r"/(query|key|value|map|project_\w+)/kernel$", P("fsdp", "tensor")), *_DENSE),
    "etg_aver_raw": (*_TRANSFORMER, *_DENSE, *_CONVOLUTION),
    "emoasst": (*_TRANSFORMER, *_DENSE),
    "de_iii": ((r"/gate/kernel$", P("fsdp", "tensor")), *_TRANSFORMER, *_DENSE, *_CONVOLUTION),
    "avt_ca": ((r"/(expand|project)/kernel$", P("fsdp", "tensor")), *_TRANSFORMER, *_DENSE, *_CONVOLUTION),
    "fusions": (*_TRANSFORMER, *_DENSE, *_CONVOLUTION),
}


@dataclasses.dataclass(frozen=True)
class Placement:
    """The placement of a run's arrays; without a mesh, all are on one device.

    `state`, `replicate` and `batch` constrain the sharding of arrays inside a compiled function.

    Attributes:
      mesh: with the axes `AXES`.
      rules: as in `RULES`.
    """

    mesh: Mesh | None = None
    rules: Rules = ()

    @property
    def axis(self) -> str | None:
        """Returns the axis of the mesh that `vmap` over lanes uses, None without a mesh."""
        return "lane" if self.mesh else None

    def state(self, tree: Any) -> Any:
        """Constrains arrays with lanes as their first axis by the rules of their paths."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.of_state(tree))

    def replicate(self, tree: Any) -> Any:
        """Constrains arrays to be the same on every device."""
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, self._sharding(P()))

    def batch(self, batch: Mapping[str, Any], constants: Iterable[str] = ()) -> dict[str, Any]:
        """Constrains a lane's batch, clips first, within `vmap` over lanes; its `constants` are left as they are."""
        if self.mesh is None:
            return dict(batch)
        constrained = lambda v: jax.lax.with_sharding_constraint(v, self._fitting(P(_BATCH), v.shape))  # noqa: E731
        return {key: value if key in constants else constrained(value) for key, value in batch.items()}

    def of_state(self, tree: Any) -> Any:
        """Returns the shardings of arrays, or of their shapes, with lanes as their first axis."""

        def one(path: Sequence[Any], leaf: Any) -> Any:
            spec = spec_of(self.rules, joined(path), len(leaf.shape) - 1)
            return self._fitting(P("lane", *spec), leaf.shape)

        return jax.tree_util.tree_map_with_path(one, tree)

    def put(self, tree: Any) -> Any:
        """Replicates host arrays, the same in every process, on every device."""
        return jax.tree.map(lambda v: self._global(v, P()), tree)

    def put_lanes(self, tree: Any) -> Any:
        """Puts host arrays, the same in every process and with lanes as their first axis, on the devices."""
        return jax.tree.map(lambda v: self._global(v, P("lane")), tree)

    def read(self, tree: Any) -> Any:
        """Gathers arrays onto the host, whatever their sharding; every process must call this."""
        if self.mesh is not None and jax.process_count() > 1:
            tree = jax.jit(lambda v: v, out_shardings=self._sharding(P()))(tree)
        return jax.device_get(tree)

    def part(self, shape: Sequence[int]) -> tuple[slice, slice]:
        """Returns the lanes and the clips of batches (lanes, clips) that are on this process's devices."""
        if self.mesh is None or jax.process_count() == 1:
            return slice(0, shape[0]), slice(0, shape[1])
        sharding = self._fitting(P("lane", _BATCH), shape)
        indices = sharding.addressable_devices_indices_map(tuple(shape)).values()
        spans = ([index[i].indices(size) for index in indices] for i, size in enumerate(shape))
        return tuple(slice(min(s[0] for s in span), max(s[1] for s in span)) for span in map(list, spans))

    def put_batch(self, part: Any, shape: Sequence[int]) -> Any:
        """Assembles arrays (lanes, clips, …) of `shape` (lanes, clips) from the `part` that each process has."""
        if self.mesh is None:
            return jax.device_put(part)
        lanes, clips = self.part(shape)

        def one(array: jax.Array) -> Any:
            full = (*shape, *array.shape[2:])
            sharding = self._fitting(P("lane", _BATCH), full)

            def local(index: Any) -> Any:
                own = index[0].indices(shape[0]), index[1].indices(shape[1])
                rows = [slice(a - p.start, b - p.start) for (a, b, _), p in zip(own, (lanes, clips), strict=True)]
                return array[(*rows, *index[2:])]

            return jax.make_array_from_callback(full, sharding, local)

        return jax.tree.map(one, part)

    def gather_rows(self, part: Mapping[str, np.ndarray], count: int) -> dict[str, jax.Array]:
        """Gathers arrays of which each process has read an equal part of the rows, in order, onto every device.

        Args:
          part: (rows, …) of this process.
          count: rows of all parts together; rows beyond it are cut off.
        """
        everyone = Mesh(np.array(jax.devices()), ("row",))
        rows = NamedSharding(everyone, P("row"))
        parts = {k: jax.make_array_from_process_local_data(rows, v) for k, v in part.items()}
        cut = jax.jit(lambda v: v[:count], out_shardings=NamedSharding(everyone, P()))
        return {k: self.put(np.asarray(cut(v).addressable_data(0))) for k, v in parts.items()}

    def _global(self, value: Any, spec: P) -> jax.Array:
        if self.mesh is None:
            return jax.device_put(value)
        if jax.process_count() == 1:
            return jax.device_put(value, self._fitting(spec, np.shape(value)))
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, self._fitting(spec, host.shape), lambda index: host[index])

    def _sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _fitting(self, spec: P, shape: Sequence[int]) -> NamedSharding:
        """Returns the sharding of a spec without the axes that have one device or do not divide their dimension."""
        several = [tuple(a for a in _names(axes) if self.mesh.shape[a] > 1) for axes in spec]
        sizes = [math.prod(self.mesh.shape[a] for a in axes) for axes in several]
        fits = [
            (axes[0] if len(axes) == 1 else axes) if axes and length % size == 0 else None
            for axes, size, length in zip(several, sizes, shape, strict=False)
        ]
        return self._sharding(P(*fits))


ALONE = Placement()


def placement(settings: Settings, lanes: int) -> Placement:
    """Returns the placement of a run with so many lanes.

    Raises:
      AvjaxError: the sizes of the mesh do not fit the devices, the lanes or the batch.
    """
    devices = jax.devices()
    sizes = mesh_sizes(settings.mesh, len(devices), jax.process_count(), lanes, settings.train.batch_size)
    count = math.prod(sizes.values())
    if count == 1 and jax.process_count() == 1:
        return ALONE
    mesh = jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 4, devices=devices[:count])
    return Placement(mesh, RULES.get(settings.model.name, RULES["fusions"]))


def mesh_sizes(settings: MeshSettings, devices: int, processes: int, lanes: int, batch: int) -> dict[str, int]:
    """Returns the size of each axis of the mesh, in the order of `AXES`.

    Args:
      settings: their sizes, where not 0, replace those of the preset.
      devices: number of devices of all processes.
      processes: number of processes.
      lanes: of the run.
      batch: clips of a training batch.

    Raises:
      AvjaxError: as `placement`.
    """
    given = {axis: size for axis in AXES if (size := getattr(settings, axis))}
    sizes = dict.fromkeys(AXES, 1) | (given or _preset(settings.preset, devices, processes, lanes, batch))
    count = math.prod(sizes.values())
    mesh = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
    if count > devices or (processes > 1 and count != devices):
        limit = f"all {devices} must" if processes > 1 else f"at most {devices} can"
        raise AvjaxError(f"mesh: {mesh} takes {count} devices, but {limit} be used; set mesh.preset")
    if min(sizes["data"], sizes["fsdp"], sizes["tensor"]) > 1:
        # Found by the tests of every mesh: predictions are wrong by more than their standard deviation, with jax 0.10.2
        # and either of its partitioners; any two of the three are right.
        raise AvjaxError(
            f"mesh: {mesh}: XLA's partitioner gives wrong results with all of data, fsdp and tensor; set at most two"
        )
    for what, length, axes in (("lanes", lanes, ("lane",)), ("train.batch_size", batch, _BATCH)):
        share = math.prod(sizes[a] for a in axes)
        if length % share:
            raise AvjaxError(f"mesh: {mesh} splits {what} = {length} over {share} devices, which must divide it")
    return sizes


def _preset(name: str, devices: int, processes: int, lanes: int, batch: int) -> dict[str, int]:
    if name == "auto":
        name = "lanes" if lanes > 1 else "dp"
        if processes == 1 and name == "dp":
            return {"data": _divisor(batch, devices)}
    if name == "lanes":
        # Devices beyond the lanes stay idle, unless they belong to other processes, none of which may be idle.
        lane = _divisor(lanes, devices) if processes == 1 else math.gcd(lanes, devices)
        return {"lane": lane, "data": devices // lane if processes > 1 else 1}
    return {"single": {}, "dp": {"data": devices}, "fsdp": {"fsdp": devices}, "tp": {"tensor": devices}}[name]


def _divisor(of: int, most: int) -> int:
    """Returns the largest divisor of a number that is at most `most`."""
    return max(d for d in range(1, min(of, most) + 1) if of % d == 0)


def spec_of(rules: Rules, path: str, axes: int) -> P:
    """Returns the rules' sharding of an array with so many axes, lanes aside."""
    specs = (spec for pattern, spec in rules if len(spec) == axes and re.search(pattern, path))
    return next(specs, P())


def joined(path: Sequence[Any]) -> str:
    """Joins the names of a `jax.tree_util` path by "/"."""
    return "/" + jax.tree_util.keystr(path, simple=True, separator="/")


def check(tree: Any, asked: Any) -> None:
    """Checks that arrays have the shardings `asked`, a tree of the same structure (`Placement.of_state`).

    Raises:
      AvjaxError: an array has another sharding; names the first.
    """
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(asked), strict=True):
        if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            raise AvjaxError(f"{joined(path)} {leaf.shape} has the sharding {leaf.sharding}, not {sharding} as asked")


def described(placement: Placement) -> str:
    """Describes the devices of a run in one line."""
    if placement.mesh is None:
        return f"1 {jax.devices()[0].platform} device"
    axes = " × ".join(f"{axis} {size}" for axis, size in placement.mesh.shape.items() if size > 1) or "no axis"
    of = f" of {jax.device_count()}" if placement.mesh.size < jax.device_count() else ""
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{placement.mesh.size}{of} {jax.devices()[0].platform} devices{processes} ({axes})"


def _names(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes

"""Where arrays live: a mesh of devices, a table of rules by the paths of parameters, and the check that both are kept.

The mesh has four axes. `lane` splits the lanes of a protocol, `data` the clips of a batch; `fsdp` splits clips
and, between steps, parameters with their optimizer state; `tensor` the heads and hidden units of a layer. Every array
of a run's state has the lanes in front, so its place is that axis and then what the rule of its path says. XLA's
partitioner makes the communication: no model knows of the mesh.
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

AXES = ("lane", "data", "fsdp", "tensor")  # the last ones speak most and are neighbours
_BATCH = ("data", "fsdp")  # share out the clips of a batch

Rules = tuple[tuple[str, P], ...]

# Path pattern → how the axes of a parameter are shared out, without lanes. The first counts whose pattern is found in
# the path and whose length is the number of axes; a path without any, such as a norm's scale, is whole everywhere.
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
# Of a model's family; what has no table here has that of the fusions.
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
    """The places of a run's arrays; without a mesh, all on one device.

    Inside a compiled function the methods constrain where their arrays are.

    Attributes:
      mesh: with the axes `AXES`; rules: as in `RULES`.
    """

    mesh: Mesh | None = None
    rules: Rules = ()

    @property
    def axis(self) -> str | None:
        """What `vmap` over lanes is to take for its axis of the mesh."""
        return "lane" if self.mesh else None

    def state(self, tree: Any) -> Any:
        """What has the lanes in front, by the rules of the paths."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.of_state(tree))

    def whole(self, tree: Any) -> Any:
        """What is to be the same on every device."""
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, self._sharding(P()))

    def batch(self, batch: Mapping[str, Any], constants: Iterable[str] = ()) -> dict[str, Any]:
        """A lane's batch, clips in front, within `vmap` over lanes; the `constants` in it are left as they are."""
        if self.mesh is None:
            return dict(batch)
        place = lambda v: jax.lax.with_sharding_constraint(v, self._fitting(P(_BATCH), v.shape))  # noqa: E731
        return {key: value if key in constants else place(value) for key, value in batch.items()}

    def of_state(self, tree: Any) -> Any:
        """The shardings of arrays, or of their shapes, that have the lanes in front."""

        def one(path: Sequence[Any], leaf: Any) -> Any:
            spec = spec_of(self.rules, joined(path), len(leaf.shape) - 1)
            return self._fitting(P("lane", *spec), leaf.shape)

        return jax.tree_util.tree_map_with_path(one, tree)

    def put(self, tree: Any) -> Any:
        """Arrays on the host, the same in every process, onto every device, whole."""
        return jax.tree.map(lambda v: self._global(v, P()), tree)

    def put_lanes(self, tree: Any) -> Any:
        """Arrays on the host, the same in every process, with the lanes in front."""
        return jax.tree.map(lambda v: self._global(v, P("lane")), tree)

    def read(self, tree: Any) -> Any:
        """Arrays wherever they are, whole, onto the host; every process has to ask for them."""
        if self.mesh is not None and jax.process_count() > 1:
            tree = jax.jit(lambda v: v, out_shardings=self._sharding(P()))(tree)
        return jax.device_get(tree)

    def part(self, shape: Sequence[int]) -> tuple[slice, slice]:
        """The lanes and the clips of batches (lanes, clips) that are on this process's devices."""
        if self.mesh is None or jax.process_count() == 1:
            return slice(0, shape[0]), slice(0, shape[1])
        sharding = self._fitting(P("lane", _BATCH), shape)
        places = sharding.addressable_devices_indices_map(tuple(shape)).values()
        spans = ([place[i].indices(size) for place in places] for i, size in enumerate(shape))
        return tuple(slice(min(s[0] for s in span), max(s[1] for s in span)) for span in map(list, spans))

    def put_batch(self, part: Any, shape: Sequence[int]) -> Any:
        """This process's `part` of arrays (lanes, clips, …), of which all together have `shape` (lanes, clips)."""
        if self.mesh is None:
            return jax.device_put(part)
        lanes, clips = self.part(shape)

        def one(array: jax.Array) -> Any:
            whole = (*shape, *array.shape[2:])
            sharding = self._fitting(P("lane", _BATCH), whole)

            def local(index: Any) -> Any:
                own = index[0].indices(shape[0]), index[1].indices(shape[1])
                rows = [slice(a - p.start, b - p.start) for (a, b, _), p in zip(own, (lanes, clips), strict=True)]
                return array[(*rows, *index[2:])]

            return jax.make_array_from_callback(whole, sharding, local)

        return jax.tree.map(one, part)

    def shared_out(self, part: Mapping[str, np.ndarray], count: int) -> dict[str, jax.Array]:
        """Arrays of which each process has read an equal part of the rows, in order, whole on every device.

        Args:
          part: (rows, …) of this process; what all parts have beyond `count` rows is cut off.
        """
        everyone = Mesh(np.array(jax.devices()), ("row",))
        rows = NamedSharding(everyone, P("row"))
        there = {k: jax.make_array_from_process_local_data(rows, v) for k, v in part.items()}
        cut = jax.jit(lambda v: v[:count], out_shardings=NamedSharding(everyone, P()))
        return {k: self.put(np.asarray(cut(v).addressable_data(0))) for k, v in there.items()}

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
        """A spec without the axes that share nothing out, or do not divide what they are to."""
        several = [tuple(a for a in _names(axes) if self.mesh.shape[a] > 1) for axes in spec]
        sizes = [math.prod(self.mesh.shape[a] for a in axes) for axes in several]
        fits = [
            (axes[0] if len(axes) == 1 else axes) if axes and length % size == 0 else None
            for axes, size, length in zip(several, sizes, shape, strict=False)
        ]
        return self._sharding(P(*fits))


ALONE = Placement()


def placement(settings: Settings, lanes: int) -> Placement:
    """Where a run with so many lanes puts its arrays.

    Raises:
      AvjaxError: the sizes of the mesh fit neither devices, nor lanes, nor batch.
    """
    devices = jax.devices()
    sizes = mesh_sizes(settings.mesh, len(devices), jax.process_count(), lanes, settings.train.batch_size)
    count = math.prod(sizes.values())
    if count == 1 and jax.process_count() == 1:
        return ALONE
    mesh = jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 4, devices=devices[:count])
    return Placement(mesh, RULES.get(settings.model.name, RULES["fusions"]))


def mesh_sizes(settings: MeshSettings, devices: int, processes: int, lanes: int, batch: int) -> dict[str, int]:
    """The size of each axis of the mesh, in the order of `AXES`.

    Args:
      settings: sizes in them that are not 0 stand in the place of the preset's.
      lanes: of the run; batch: clips of a training batch.
    Raises:
      AvjaxError: as `placement`.
    """
    given = {axis: size for axis in AXES if (size := getattr(settings, axis))}
    sizes = dict.fromkeys(AXES, 1) | (given or _preset(settings.preset, devices, processes, lanes, batch))
    count = math.prod(sizes.values())
    said = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
    if count > devices or (processes > 1 and count != devices):
        need = "all" if processes > 1 else "at most"
        raise AvjaxError(f"mesh: {said} takes {count} devices, and {need} {devices} are to be used; set mesh.preset")
    if min(sizes["data"], sizes["fsdp"], sizes["tensor"]) > 1:
        # Found by the tests of every mesh: answers that are wrong by more than their spread, with jax 0.10.2, by either
        # of its partitioners; two of the three are right.
        raise AvjaxError(f"mesh: {said}: XLA's partitioner errs where all of data, fsdp and tensor share; set two")
    for what, length, axes in (("lanes", lanes, ("lane",)), ("train.batch_size", batch, _BATCH)):
        share = math.prod(sizes[a] for a in axes)
        if length % share:
            raise AvjaxError(f"mesh: {said} splits {what}, {length}, over {share} devices; these must divide it")
    return sizes


def _preset(name: str, devices: int, processes: int, lanes: int, batch: int) -> dict[str, int]:
    if name == "auto":
        name = "lanes" if lanes > 1 else "dp"
        if processes == 1 and name == "dp":
            return {"data": _divisor(batch, devices)}
    if name == "lanes":
        # Devices beyond the lanes stand by, unless they are those of other processes: none of these may.
        lane = _divisor(lanes, devices) if processes == 1 else math.gcd(lanes, devices)
        return {"lane": lane, "data": devices // lane if processes > 1 else 1}
    return {"single": {}, "dp": {"data": devices}, "fsdp": {"fsdp": devices}, "tp": {"tensor": devices}}[name]


def _divisor(of: int, most: int) -> int:
    """The largest divisor of a number that is not above `most`."""
    return max(d for d in range(1, min(of, most) + 1) if of % d == 0)


def spec_of(rules: Rules, path: str, axes: int) -> P:
    """How the rules share out an array with so many axes, lanes apart."""
    found = (spec for pattern, spec in rules if len(spec) == axes and re.search(pattern, path))
    return next(found, P())


def joined(path: Sequence[Any]) -> str:
    """A path of `jax.tree_util` as names joined by "/"."""
    return "/" + jax.tree_util.keystr(path, simple=True, separator="/")


def check(tree: Any, asked: Any) -> None:
    """Whether arrays are where they are asked to be.

    Args:
      asked: the same tree of shardings (`Placement.of_state`).
    Raises:
      AvjaxError: names the first that is not.
    """
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(asked), strict=True):
        if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            raise AvjaxError(f"{joined(path)} {leaf.shape} is placed by {leaf.sharding}, not by {sharding} as asked")


def described(place: Placement) -> str:
    """One line about the devices of a run."""
    if place.mesh is None:
        return f"1 {jax.devices()[0].platform} device"
    axes = " × ".join(f"{axis} {size}" for axis, size in place.mesh.shape.items() if size > 1) or "no axis"
    of = f" of {jax.device_count()}" if place.mesh.size < jax.device_count() else ""
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{place.mesh.size}{of} {jax.devices()[0].platform} devices{processes} ({axes})"


def _names(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes

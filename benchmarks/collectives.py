"""What the devices of a compiled program say to each other: its collectives, as the text of its HLO has them.

Bytes are those that each device sends by the ring algorithms (Chan et al. 2007, "Collective communication: theory,
practice, and experience"); none sends fewer, unless switches add, too. With n devices in a group and S bytes
in all these are S (n - 1)/n for an all-gather, reduce-scatter or all-to-all, and twice that for an all-reduce. Where
groups reach over several nodes of k devices, the algorithm that works within nodes first sends as much in all, and
S (n/k - 1)/n of it (twice that for an all-reduce) to other nodes.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from avjax.errors import AvjaxError

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Others that XLA knows.
_STRANGE = ("collective-broadcast", "ragged-all-to-all")

_COMMENT = re.compile(r"/\*.*?\*/")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
# Name, type of the result, operation.
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?[\w.-]+ = ([^=%"]*?) ([\w-]+)\(')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)="
    r"(mesh\[.*?\] \{.*?\}|\{(?:\{.*?\},?)*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)"
)
_IOTA = re.compile(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[(.*)\] \{(.*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One of KINDS.

    Attributes:
      size: S in bytes: of the whole array that a group gathers or reduces; of an all-to-all or a permutation, of what a
        device has.
      groups: numbers of the devices that take part together; of a permutation pairs (from, to).
      times: how often a run of the program has it.
    """

    kind: str
    size: float
    groups: tuple[tuple[int, ...], ...]
    times: int = 1

    def sent(self) -> float:
        """Bytes that a device sends in all the times."""
        if self.kind == "collective-permute":
            return self.times * self.size * any(a != b for a, b in self.groups)
        n = max(map(len, self.groups))
        return self._rounds * self.size * (n - 1) / n

    def beyond(self, node: int) -> float:
        """Those of the bytes sent that leave a node of so many devices, numbered one after another."""
        if self.kind == "collective-permute":
            return self.times * self.size * any(a // node != b // node for a, b in self.groups)
        group = max(self.groups, key=len)
        places = [device // node for device in group]
        n, here = len(group), max(map(places.count, places))
        nodes = math.ceil(n / here)
        return self._rounds * self.size * ((n - here) / n if self.kind == "all-to-all" else (nodes - 1) / n)

    @property
    def _rounds(self) -> int:
        return self.times * (2 if self.kind == "all-reduce" else 1)


def read(hlo: str) -> list[Collective]:
    """The collectives of a compiled program.

    One that is begun and ended apart counts once; one within a loop as often as the loop turns; of branches all count.

    Args:
      hlo: its text (`jax.stages.Compiled.as_text`).
    Raises:
      AvjaxError: the text has a collective, a notation of groups or a loop with collectives that is not understood.
    """
    parts, entry = _computations(_COMMENT.sub("", hlo))
    count = re.search(r"num_partitions=(\d+)", hlo.partition("\n")[0])
    return list(_walk(parts, entry, 1, int(count[1]) if count else 1))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Name → lines of each computation, and which of them is run."""
    parts: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            entry = name if found[1] else entry
        elif name and line.startswith(" "):
            parts.setdefault(name, []).append(line)
    return parts, entry


def _walk(parts: Mapping[str, list[str]], name: str, times: int, devices: int) -> Iterator[Collective]:
    """The collectives of a computation that is run so many times, and of those that it calls."""
    for line in parts.get(name, ()):
        found = _INSTRUCTION.match(line)
        if not found or found[2].endswith(("-done", "-update")):
            continue
        if (operation := found[2].removesuffix("-start")) in (*KINDS, *_STRANGE):
            yield _collective(operation, found[2] != operation, found[1], line, times, devices)
            continue
        trips = _TRIPS.search(line) if found[2] == "while" else None
        called = [n for names in _CALLED.findall(line) for n in re.findall(r"[\w.-]+", names)]
        inner = [c for n in called for c in _walk(parts, n, times * int(trips[1]) if trips else times, devices)]
        if inner and found[2] == "while" and not trips:
            raise AvjaxError(f"a loop with collectives whose turns XLA does not state: {line.strip()[:200]}")
        yield from inner


def _collective(kind: str, begun: bool, result: str, line: str, times: int, devices: int) -> Collective:
    if kind not in KINDS:
        raise AvjaxError(f"the program has the collective {kind}; known are {', '.join(KINDS)}")
    found = _GROUPS.search(line)
    groups = _groups(found[1] if found else "{}", devices)
    if begun and kind == "collective-permute":
        result = re.sub(r"u32\[\]", "", result)  # what the two ends know each other by
    return Collective(kind, _whole(kind, begun, max(map(len, groups))) * _bytes(result), groups, times)


def _whole(kind: str, begun: bool, n: int) -> float:
    """The size S as a multiple of the bytes of a result; what begins a collective has its operands there, too."""
    if kind in ("all-gather", "reduce-scatter"):
        return n / (n + 1) if begun else (n if kind == "reduce-scatter" else 1)
    return 0.5 if begun and kind != "all-reduce" else 1


def _bytes(result: str) -> float:
    """Bytes of an array, or of all arrays of a tuple."""
    return sum(
        _bits(t) / 8 * math.prod(map(int, filter(None, shape.split(",")))) for t, shape in _ARRAY.findall(result)
    )


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])


def _groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of any notation of XLA's: one by one, as a count of all in another order, or by axes of a mesh."""
    if text == "{}":
        return (tuple(range(devices)),)
    if listed := re.findall(r"\{([\d,]+)\}", text):
        return tuple(tuple(map(int, group.split(","))) for group in listed)
    if iota := _IOTA.fullmatch(text):
        rows, members, shape, order = (tuple(map(int, part.split(","))) if part else None for part in iota.groups())
        numbers = np.arange(rows[0] * members[0]).reshape(shape).transpose(order)
        return _rows(numbers.reshape(*rows, *members))
    if mesh := _MESH.fullmatch(text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        axes = [name.strip("'") for name in mesh[2].split(",")]
        if set(axes) <= set(sizes) and re.fullmatch(r"('[^']+'=\d+,?)+", mesh[1]):
            order = [*(a for a in sizes if a not in axes), *axes]
            numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
            members = math.prod(sizes[a] for a in axes)
            return _rows(numbers.transpose([list(sizes).index(a) for a in order]).reshape(-1, members))
    raise AvjaxError(f"the groups of a collective, {text}, are written in a way that is not known here")


def _rows(numbers: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, numbers.tolist()))

"""Reads the collectives of a compiled program from the text of its HLO.

Bytes are those that each device sends under the ring algorithms (Chan et al. 2007, "Collective communication: theory,
practice, and experience"), the least possible unless switches add, too. With n devices in a group and S bytes in
total these are S (n - 1)/n for an all-gather, reduce-scatter or all-to-all, and twice that for an all-reduce. Where
groups span several nodes of k devices, the algorithm that works within nodes first sends as much in total, and
S (n/k - 1)/n of it (twice that for an all-reduce) to other nodes.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from avjax.errors import AvjaxError

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Other collectives of XLA, not supported.
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
    """A collective of one of KINDS.

    Attributes:
      size: S in bytes: of the full array that a group gathers or reduces; for an all-to-all or a permutation, of a
        device's part.
      groups: numbers of the devices that take part together; for a permutation pairs (from, to).
      times: executions per run of the program.
    """

    kind: str
    size: float
    groups: tuple[tuple[int, ...], ...]
    times: int = 1

    def sent(self) -> float:
        """Returns the bytes that a device sends in all executions."""
        if self.kind == "collective-permute":
            return self.times * self.size * any(a != b for a, b in self.groups)
        n = max(map(len, self.groups))
        return self._rounds * self.size * (n - 1) / n

    def beyond(self, node: int) -> float:
        """Returns the sent bytes that leave a node of `node` devices, numbered consecutively."""
        if self.kind == "collective-permute":
            return self.times * self.size * any(a // node != b // node for a, b in self.groups)
        group = max(self.groups, key=len)
        node_numbers = [device // node for device in group]
        n, per_node = len(group), max(map(node_numbers.count, node_numbers))
        nodes = math.ceil(n / per_node)
        return self._rounds * self.size * ((n - per_node) / n if self.kind == "all-to-all" else (nodes - 1) / n)

    @property
    def _rounds(self) -> int:
        return self.times * (2 if self.kind == "all-reduce" else 1)


def read(hlo: str) -> list[Collective]:
    """Reads the collectives of a compiled program.

    An asynchronous collective (start and done) counts once, one within a loop once per iteration; all branches count.

    Args:
      hlo: text of the program (`jax.stages.Compiled.as_text`).

    Raises:
      AvjaxError: the text has an unknown collective, notation of groups, or loop with collectives.
    """
    parts, entry = _computations(_COMMENT.sub("", hlo))
    count = re.search(r"num_partitions=(\d+)", hlo.partition("\n")[0])
    return list(_walk(parts, entry, 1, int(count[1]) if count else 1))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Returns name → lines of each computation, and the name of the entry computation."""
    parts: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            entry = name if match[1] else entry
        elif name and line.startswith(" "):
            parts.setdefault(name, []).append(line)
    return parts, entry


def _walk(parts: Mapping[str, list[str]], name: str, times: int, devices: int) -> Iterator[Collective]:
    """Yields the collectives of a computation that runs `times` times, and of those that it calls."""
    for line in parts.get(name, ()):
        match = _INSTRUCTION.match(line)
        if not match or match[2].endswith(("-done", "-update")):
            continue
        if (operation := match[2].removesuffix("-start")) in (*KINDS, *_STRANGE):
            yield _collective(operation, match[2] != operation, match[1], line, times, devices)
            continue
        trips = _TRIPS.search(line) if match[2] == "while" else None
        called = [n for names in _CALLED.findall(line) for n in re.findall(r"[\w.-]+", names)]
        inner = [c for n in called for c in _walk(parts, n, times * int(trips[1]) if trips else times, devices)]
        if inner and match[2] == "while" and not trips:
            raise AvjaxError(f"a loop with collectives whose trip count XLA does not state: {line.strip()[:200]}")
        yield from inner


def _collective(kind: str, is_async: bool, result: str, line: str, times: int, devices: int) -> Collective:
    if kind not in KINDS:
        raise AvjaxError(f"the program has the collective {kind}; known are {', '.join(KINDS)}")
    match = _GROUPS.search(line)
    groups = _groups(match[1] if match else "{}", devices)
    if is_async and kind == "collective-permute":
        result = re.sub(r"u32\[\]", "", result)  # context identifiers of the two ends
    return Collective(kind, _size_factor(kind, is_async, max(map(len, groups))) * _bytes(result), groups, times)


def _size_factor(kind: str, is_async: bool, n: int) -> float:
    """Returns S as a multiple of the bytes of the result; the result of an asynchronous start includes its operands."""
    if kind in ("all-gather", "reduce-scatter"):
        return n / (n + 1) if is_async else (n if kind == "reduce-scatter" else 1)
    return 0.5 if is_async and kind != "all-reduce" else 1


def _bytes(result: str) -> float:
    """Returns the bytes of an array, or of all arrays of a tuple."""
    return sum(
        _bits(t) / 8 * math.prod(map(int, filter(None, shape.split(",")))) for t, shape in _ARRAY.findall(result)
    )


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])


def _groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Parses groups in any notation of XLA's: a list, an iota with a transpose, or axes of a mesh."""
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
    raise AvjaxError(f"the groups of a collective, {text}, are in an unknown notation")


def _rows(numbers: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, numbers.tolist()))

"""Profiles one of our training steps: the time by part of the model and by kind of operation.

XLA's operations are timed by JAX's profiler, each without the operations nested in it, and attributed to the source
lines in their metadata. CPU only: on other devices the profiler names operations differently.
"""

import collections
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from avjax.errors import AvjaxError
from benchmarks import step as benchmark
from benchmarks.step import Size

STEPS = 5
_NAMED = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name="([^"]+)"', re.MULTILINE)


def measure(name: str, size: Size, folder: Path) -> dict[str, dict[str, float]]:
    """Runs `STEPS` steps of a model of that size, and leaves the profiler's trace in `folder`.

    Returns:
      {"part": {part of the model: fraction}, "kind": {kind of operation: fraction}}, the largest first. A part is the
      outer two modules without their numbers; outside all modules it is "forward", "backward" or "update".

    Raises:
      AvjaxError: the profiler has timed no operation of the program.
    """
    with jax.default_matmul_precision("float32"):
        program, state, given = benchmark.our_program(benchmark.make_case(name, size))
        compiled = program.lower(state, *given).compile()
    state, _ = jax.block_until_ready(compiled(state, *given))
    with jax.profiler.trace(str(folder)):
        for _ in range(STEPS):
            state, _ = jax.block_until_ready(compiled(state, *given))
    taken, sources = operations(folder), dict(_NAMED.findall(compiled.as_text()))
    if not taken:
        raise AvjaxError(f"{folder}: the trace has no operation of XLA; expected a run on a CPU")
    return {
        "part": _fractions((part(sources.get(op, "")), t) for op, t in taken.items()),
        "kind": _fractions((kind(op, sources.get(op, "")), t) for op, t in taken.items()),
    }


def operations(folder: Path) -> dict[str, float]:
    """Returns operation → nanoseconds, without nested operations, of the newest trace in `folder`."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    taken: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            timed = [e for e in line.events if any(key == "hlo_op" for key, _ in e.stats)]
            taken.update(alone((e.start_ns, e.duration_ns, e.name) for e in timed))
    return dict(taken)


def alone(events: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """Maps events (start, duration, name) of one thread to name → its time outside nested events."""
    taken: collections.Counter[str] = collections.Counter()
    open_: list[tuple[float, str]] = []
    for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_ and open_[-1][0] <= start:
            open_.pop()
        if open_:
            taken[open_[-1][1]] -= duration
        taken[name] += duration
        open_.append((start + duration, name))
    return dict(taken)


def part(source: str) -> str:
    """Returns the part of the model of an XLA source name such as "jit(step)/jvp(M)/block_0/up/dot_general"."""
    modules = [word for word in source.split("/")[1:-1] if not re.search(r"[.()>]|^while$|^body$|^cond$", word)]
    if not modules:
        return _direction(source)
    return "/".join(re.sub(r"_\d+$", "", word) for word in modules[:2])


def _direction(source: str) -> str:
    if "transpose(" in source:
        return "backward"
    return "forward" if "jvp(" in source else "update"


def kind(operation: str, source: str) -> str:
    """Classifies an operation: matrix products with what is fused to them, copies, reductions, or elementwise."""
    primitive = source.rpartition("/")[2]
    if operation.startswith("dot") or primitive == "dot_general":
        return f"products, {_direction(source)}"
    if re.match(r"(wrapped_|transpose_)?copy|transpose|concatenate|wrapped_broadcast", operation):
        return "copies"
    return "reductions" if primitive.startswith(("reduce", "argmax", "cumsum")) else "elementwise"


def _fractions(taken: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: collections.Counter[str] = collections.Counter()
    for name, time in taken:
        sums[name] += time
    total = sum(sums.values())
    return {name: time / total for name, time in sums.most_common()}


def table(title: str, fractions: Mapping[str, Mapping[str, float]], most: int = 8) -> Any:
    """Renders the `most` largest fractions by part and by kind, side by side, in percent."""
    from rich.table import Table

    out = Table(title=title)
    for name in fractions:
        out.add_column(name)
        out.add_column("%", justify="right")
    columns = [[(name, f"{100 * fraction:.1f}") for name, fraction in by.items()][:most] for by in fractions.values()]
    for cells in itertools.zip_longest(*columns, fillvalue=("", "")):
        out.add_row(*itertools.chain(*cells))
    return out

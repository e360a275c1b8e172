"""Prints and draws the plan of avjax: its rooms, the import arrows between them, and what breaks the plan.

python -m tests.architecture [--svg docs/architecture.svg]

A room is a folder of `avjax/`; the commands and what they share are one room. An arrow is an import, inside functions
too. Arrows run down the floors only, never between rooms of one floor, and never in a circle between modules. The
exit status is 1 where one does not.
"""

import argparse
import ast
import dataclasses
import pathlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

ROOT = pathlib.Path(__file__).resolve().parents[1]
# From the top floor down.
FLOORS = (
    ("commands",),
    ("serving",),
    ("checks", "inference"),
    ("evaluation",),
    ("training",),
    ("models",),
    ("features",),
    ("demo",),
    ("generation",),
    ("encoders", "datasets", "media"),
    ("text", "layers", "tasks"),
    ("config",),
    ("utils",),
    ("settings",),
    ("errors",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@dataclasses.dataclass(frozen=True)
class Arrow:
    """An import: the importing and the imported module, and the line."""

    source: str
    target: str
    line: int

    @property
    def rooms(self) -> tuple[str, str]:
        """Returns the rooms of both modules."""
        return room(self.source), room(self.target)

    def __str__(self) -> str:
        return f"{self.source}:{self.line} → {self.target}"


def modules() -> dict[str, pathlib.Path]:
    """Lists the modules of avjax: dotted name → file."""
    files = sorted((ROOT / "avjax").rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def room(module: str) -> str:
    """Names the room of a module."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in FLOOR else "commands"


def arrows(files: Mapping[str, pathlib.Path]) -> list[Arrow]:
    """Collects the imports between modules of `files`."""
    imported = []
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = _targets(node, files)
            imported += [Arrow(module, target, node.lineno) for target in dict.fromkeys(targets) if target != module]
    return imported


def _targets(node: ast.AST, files: Mapping[str, pathlib.Path]) -> Iterator[str]:
    """Yields the modules that a statement imports; the name of a module in a package means that module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in files)
    elif isinstance(node, ast.ImportFrom) and node.module in files:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name if name in files else node.module for name in names)


def not_down(imported: Iterable[Arrow]) -> list[Arrow]:
    """Picks the arrows that run up, or between rooms of one floor."""
    return [a for a in imported if a.rooms[0] != a.rooms[1] and FLOOR[a.rooms[0]] >= FLOOR[a.rooms[1]]]


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Finds groups of names that reach each other along `edges` (Tarjan 1972, strongly connected components)."""
    after: dict[str, list[str]] = {}
    for source, target in edges:
        after.setdefault(source, []).append(target)
        after.setdefault(target, [])
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for other in after[name]:
            if other not in number:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], number[other])
        if lowest[name] == number[name]:
            at = stack.index(name)
            groups.append(stack[at:])
            del stack[at:]

    for name in after:
        if name not in number:
            visit(name)
    return [group for group in groups if len(group) > 1]


def loaded_by(module: str, files: Mapping[str, pathlib.Path]) -> set[str]:
    """Follows what importing a module loads: imports at the top of files, packages' `__init__` included."""
    todo, seen = [module], set()
    while todo:
        name = todo.pop()
        if name in seen or name not in files:
            continue
        seen.add(name)
        todo += [name.rpartition(".")[0], *(t for node in _top(files[name]) for t in _targets(node, files))]
    return seen


def _top(path: pathlib.Path) -> Iterator[ast.AST]:
    """Yields the statements of a file that run when it is imported."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        yield node
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (for_types or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            todo += ast.iter_child_nodes(node)


def lines(files: Mapping[str, pathlib.Path]) -> Counter[str]:
    """Counts the lines of each room."""
    counts: Counter[str] = Counter()
    for module, path in files.items():
        counts[room(module)] += len(path.read_text(encoding="utf-8").splitlines())
    return counts


# ---- The diagram -----------------------------------------------------------------------------------------------------

_WIDTH, _BOX, _HIGH, _FLOOR = 1080, 190, 46, 92


def positions(sizes: Mapping[str, int]) -> dict[str, tuple[float, float]]:
    """Lays out the rooms that exist: room → left and top of its box, in pixels."""
    out = {}
    floors = [[name for name in floor if name in sizes] for floor in FLOORS]
    for row, floor in enumerate(filter(None, floors)):
        gap = _WIDTH / len(floor)
        # Beside each other's middle, so that an arrow past a floor does not run behind its room.
        aside = (-1) ** row * _WIDTH / 8 if len(floor) == 1 else 0
        out |= {name: (gap * (i + 0.5) - _BOX / 2 + aside, 20 + row * _FLOOR) for i, name in enumerate(floor)}
    return out


def svg(sizes: Mapping[str, int], between: Mapping[tuple[str, str], int]) -> str:
    """Draws rooms and arrows as SVG; the width of an arrow grows with the number of its imports."""
    where = positions(sizes)
    height = max(y for _, y in where.values()) + _HIGH + 20
    style = "text{font:14px sans-serif;text-anchor:middle}.s{font-size:11px;fill:#666}path{fill:none;stroke:#4a6fa5}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}">',
        f'<style>{style}rect{{fill:#fff;stroke:#333}}</style><rect width="100%" height="100%" style="stroke:none"/>',
        *(_curve(where[a], where[b], count) for (a, b), count in sorted(between.items())),
        *(_box(name, *where[name], sizes[name]) for name in where),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _curve(source: tuple[float, float], target: tuple[float, float], count: int) -> str:
    x, y, u, v = source[0] + _BOX / 2, source[1] + _HIGH, target[0] + _BOX / 2, target[1]
    bend = (v - y) / 2
    width = min(0.6 + 0.25 * count, 5)
    return (
        f'<path d="M{x:.0f} {y:.0f}C{x:.0f} {y + bend:.0f} {u:.0f} {v - bend:.0f} {u:.0f} {v:.0f}" '
        f'stroke-width="{width:g}" opacity=".45"/>'
    )


def _box(name: str, x: float, y: float, size: int) -> str:
    middle = x + _BOX / 2
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{_BOX}" height="{_HIGH}" rx="6"/>'
        f'<text x="{middle:.0f}" y="{y + 20:.0f}">{name}</text>'
        f'<text class="s" x="{middle:.0f}" y="{y + 37:.0f}">{size:,} lines</text>'
    )


def main(arguments: list[str]) -> int:
    """Prints the plan, draws it where asked, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=pathlib.Path, help="write the diagram to this file")
    svg_file = parser.parse_args(arguments).svg
    files = modules()
    imported, sizes = arrows(files), lines(files)
    between = Counter(a.rooms for a in imported if a.rooms[0] != a.rooms[1])
    for floor in FLOORS:
        for name in floor:
            if name in sizes:
                below = ", ".join(f"{b} {n}" for (a, b), n in sorted(between.items()) if a == name)
                print(f"{name:<12}{sizes[name]:>6} lines  → {below or 'nothing'}")
    wrong, around = not_down(imported), circles((a.source, a.target) for a in imported)
    print(f"{len(sizes)} rooms, {sum(sizes.values()):,} lines, {len(between)} arrows between rooms")
    print(f"upward arrows: {len(wrong)}", *wrong, sep="\n  ")
    print(f"circles: {len(around)}", *(" ↔ ".join(group) for group in around), sep="\n  ")
    if svg_file:
        # Every room raises the errors: arrows to them would hide the others.
        drawn = {pair: n for pair, n in between.items() if "errors" not in pair}
        svg_file.write_text(svg({name: n for name, n in sizes.items() if name != "errors"}, drawn), encoding="utf-8")
    return 1 if wrong or around else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

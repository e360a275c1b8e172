"""The package is as docs/architecture.md describes: imports run down, no cycle, short files, and correct locations."""

import ast
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

from tests import architecture

ROOT = architecture.ROOT
PLAN = ROOT / "docs" / "architecture.md"
if not PLAN.is_file():
    pytest.skip("the plan is checked in a checkout", allow_module_level=True)
TOP = 15  # files allowed in `avjax/` itself
LINES = 500  # of a file


@pytest.fixture(scope="module")
def files():
    return architecture.modules()


@pytest.fixture(scope="module")
def imports(files):
    return architecture.arrows(files)


def test_arrows_run_down(imports):
    assert architecture.not_down(imports) == []


def test_no_circle_of_imports(imports):
    assert architecture.circles((a.source, a.target) for a in imports) == []


def test_arrows_that_run_up_and_circles_are_found():
    up = architecture.Arrow("avjax.layers.linear", "avjax.models.base", 3)
    level = architecture.Arrow("avjax.datasets.base", "avjax.media.video", 1)
    down = architecture.Arrow("avjax.models.base", "avjax.layers.linear", 1)
    assert architecture.not_down([up, level, down]) == [up, level]
    assert architecture.circles([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]) == [["a", "b", "c"]]


def test_every_room_has_a_floor(files):
    folders = {path.relative_to(ROOT / "avjax").parts[0] for path in files.values() if path.parent != ROOT / "avjax"}
    assert folders <= architecture.FLOOR.keys()


def test_files_are_few_at_the_top_and_short():
    assert len(list((ROOT / "avjax").glob("*.py"))) <= TOP
    lengths = {p: len(p.read_text().splitlines()) for p in ROOT.glob("avjax/**/*.py")}
    assert {path: n for path, n in lengths.items() if n > LINES} == {}


@pytest.mark.parametrize(
    ("module", "rooms"),
    [
        ("avjax.models", {"datasets", "demo", "evaluation", "training"}),
        ("avjax.inference.bundle", {"demo"}),
        ("avjax.datasets.registry", {"features", "models", "media", "encoders"}),
        ("avjax.encoders", {"datasets", "features", "models", "media"}),
    ],
)
def test_what_an_import_does_not_load(files, module, rooms):
    """Follows imports at the top of files, packages' `__init__` included."""
    loaded = architecture.loaded_by(module, files)
    assert module in loaded
    assert {name for name in loaded if architecture.room(name) in rooms} == set()


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import avjax.models", ("avjax.datasets", "avjax.evaluation", "avjax.demo")),
        ("import avjax; avjax.load", ("avjax.demo", "jax", "numpy")),
        ("import avjax.inference.bundle", ("avjax.demo",)),
    ],
)
def test_a_fresh_interpreter_does_not_load(code, absent):
    program = f"{code}; import sys; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True).split()
    assert [m for m in loaded if m.startswith("avjax") and m.startswith(absent)] == []
    assert not {"jax", "numpy"} & set(absent) & set(loaded)


# ---- Claims of docs/architecture.md ----------------------------------------------------------------------------------


def symbols() -> dict[str, tuple[str, str]]:
    """Reads the table "Where is it?": question → (path, symbol)."""
    rows = re.findall(r"^\| (.+?\?) \| `(.+?)` \| `(.+?)` \|$", PLAN.read_text(encoding="utf-8"), re.M)
    return {question: (path, symbol) for question, path, symbol in rows}


@pytest.mark.parametrize("words", ["text-guided", "folds", "checkpoint", "UAR", "OpenFace"])
def test_questions_have_true_answers(words):
    (path, symbol), *others = [location for question, location in symbols().items() if words in question]
    assert not others
    assert symbol in _symbols(ROOT / path)


def _symbols(path: pathlib.Path) -> set[str]:
    """Names the functions, classes and methods (`Class.method`) of a file."""
    out = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            out.add(node.name)
        if isinstance(node, ast.ClassDef):
            out |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return out


def test_every_room_stands_in_the_plan():
    text = PLAN.read_text(encoding="utf-8")
    rooms = {architecture.room(module) for module in architecture.modules()}
    assert {room for room in rooms if f"`{room}/`" not in text} <= {"commands", "config", "errors"}


def test_the_picture_is_of_this_tree(tmp_path, capsys):
    assert architecture.main(["--svg", str(tmp_path / "plan.svg")]) == 0
    assert "upward arrows: 0\n" in (printed := capsys.readouterr().out)
    assert "circles: 0\n" in printed
    drawn, kept = ((p / name).read_text() for p, name in ((tmp_path, "plan.svg"), (PLAN.parent, "architecture.svg")))
    # Lines of code change with every commit: the diagram is about rooms and arrows.
    boxes = [sorted(re.findall(r">(\w+)</text>", drawing)) for drawing in (drawn, kept)]
    assert boxes[0] == boxes[1]
    assert drawn.count("<path") == kept.count("<path"), (
        "draw it anew: python -m tests.architecture --svg docs/architecture.svg"
    )


def test_the_wheel_holds_the_package_alone(tmp_path):
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (wheel,) = builder.build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".dist-info/" not in n]
    assert "avjax/train.py" in names
    assert "avjax/_shipped/configs/etg_mafw.py" in names
    assert {n.split("/")[0] for n in names} == {"avjax"}
    parts = {part for n in names for part in pathlib.PurePosixPath(n).with_suffix("").parts}
    assert not parts & {"benchmarks", "benches", "tests", "torch", "conftest"}


# ---- Modules and files that text mentions ----------------------------------------------------------------------------

_MENTION = re.compile(r"(?<![\w/.])avjax(?:[./]\w+)+")


def mentions() -> set[tuple[str, str]]:
    """Collects (file, name) of every module, symbol or file of avjax that text or code mentions."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")]
    texts += [p for room in ("avjax", "benchmarks", "configs") for p in (ROOT / room).rglob("*.py")]
    imports = {(p.relative_to(ROOT).as_posix(), m) for p in texts for m in _MENTION.findall(p.read_text("utf-8"))}
    return {(path, name) for path, name in imports if path != "CHANGELOG.md"}


def _exists(name: str) -> bool:
    """Returns whether `avjax/a/b.py`, the module `avjax.a.b` or the symbol `avjax.a.b.C` exists."""
    if "/" in name:
        return (ROOT / name).exists()
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:length])
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        if file.is_file():
            rest = parts[length : length + 1]
            return not rest or re.search(rf"\b{rest[0]}\b", file.read_text(encoding="utf-8")) is not None
    return False


def test_modules_and_files_that_are_named_exist():
    assert sorted(mention for mention in mentions() if not _exists(mention[1])) == []

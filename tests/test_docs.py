"""The documents are consistent as far as a program can check: links, commands and vocabulary."""

import ast
import importlib
import pathlib
import re
import tomllib

import pytest

from tests import commands_of_docs
from tests.commands_of_docs import Command

ROOT = pathlib.Path(__file__).resolve().parents[1]
if not (ROOT / "CONTRIBUTING.md").is_file():
    pytest.skip("the documents are checked in a checkout", allow_module_level=True)
FRONT = ROOT / "README.md"
PAGES = sorted(
    [FRONT, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "launch" / "README.md", *ROOT.glob("docs/**/*.md")]
)
LINES = 150  # of the front page
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:avjax|benchmarks|configs|data|docs|launch|tests)/[\w./*-]+)(?::[\w,]+)?`")
_NEVER = re.compile(
    r"\b(at hand|mend(s|ed|ing)?|pass(es|ed|ing)? (it |them )?on|yes or no|faithful(ly)?|pictures?|answer(s|ed|ing)?|"
    r"told)\b",
    re.I,
)


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """Returns a page without fenced blocks and code font, and without the table of avoided words."""
    text = commands_of_docs.FENCE.sub("", text)
    text = re.sub(r"^## One vocabulary\n.*?(?=^## )", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`]*`", "", text)


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    out: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", commands_of_docs.FENCE.sub("", text), re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        out.add(re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-"))
    return out


def broken_links(page: pathlib.Path, text: str) -> list[str]:
    out = []
    for target in _LINK.findall(commands_of_docs.FENCE.sub("", text)):
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = page.parent / file if file else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            out.append(target)
    return out


def test_front_page_is_short():
    assert len(FRONT.read_text().splitlines()) <= LINES


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text()) == []


def test_broken_links_are_found():
    text = (
        "# A title: `x`, y\n[a](docs/none.md) [b](README.md#no-such) ![c](none.png) [d](#a-title-x-y) [e](https://x)\n"
    )
    assert broken_links(FRONT, text) == ["docs/none.md", "README.md#no-such", "none.png", "#a-title-x-y"]
    assert "a-title-x-y" in anchors(text)


def test_front_page_leads_to_every_page():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in _LINK.findall(FRONT.read_text())}
    assert [relative(page) for page in PAGES if page not in {*linked, FRONT}] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_files_that_are_named_exist(page):
    paths = [path.rstrip("/") for path in _PATH.findall(page.read_text())]
    assert [path for path in paths if not list(ROOT.glob(path))] == []


def test_configurations_name_pages_that_exist():
    named = {
        (c.name, page) for c in ROOT.glob("configs/*.py") for page in re.findall(r"docs/[\w/]+\.md", c.read_text())
    }
    assert len(named) > 10
    assert [pair for pair in named if not (ROOT / pair[1]).is_file()] == []


def commands(page: pathlib.Path) -> list[Command]:
    scripts = commands_of_docs.blocks(page.read_text(), "bash")
    return [command for script in scripts for command in commands_of_docs.commands(script)]


@pytest.mark.budget(20)  # loads every configuration in the documents, with every row of the loops
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=relative)
def test_commands_parse(page):
    wrong = []
    for command in commands(page):
        try:
            commands_of_docs.check(command)
        except Exception as error:
            wrong.append(f"{command}: {type(error).__name__}: {error}")
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python -m avjax.trane --config configs/etg_mafw.py", "no such module"),
        ("python -m avjax.train --config configs/etg_maffw.py", "etg_maffw"),
        ("python -m avjax.train --config configs/etg_mafw.py:fulll", "is 'fulll'; choose one of"),
        ("python -m avjax.train --config configs/etg_mafw.py --config.train.seedz=1", "seedz"),
        ("python -m avjax.train --config configs/etg_mafw.py --config.train.epochs=many", "epochs"),
        ("python -m avjax.train --config configs/etg_mafw.py --wrkdir W", "wrkdir"),
        ("python -m avjax.train --workdir W", "needs --config"),
        ("python -m avjax.predict clip.mp4", "workdir"),
        ("python -m avjax.predict --workdir W", "expected clips"),
        (
            "python -m avjax.evaluate compare --config configs/fusion_folder.py --rows concat,none",
            "is 'none'; choose one of",
        ),
        ("python -m avjax.extract --config configs/extract_folder.py --only audio --out F", "only"),
        ("python -m benchmarks stepp", "no benchmark stepp"),
        ("for x in full fulll; do\n  python -m avjax.train --config configs/etg_mafw.py:$x\ndone", "fulll"),
        ("launch/local.sh --proceses 2 -- --config configs/etg_mafw.py", "proceses"),
        ("launch/local.sh --processes 2 -- --config configs/etg_mafw.py --wrkdir W", "wrkdir"),
        ('pip install -e ".[meda]"', "meda"),
        ("pytest -m sloow", "sloow"),
        ("pytest tests/no_such.py", "no such tests"),
        ("AVJAX_NO_SUCH=1 pytest", "nothing reads"),
        ("avjax train", "not known"),
    ],
)
def test_wrong_commands_are_found(line, message):
    *right, wrong = commands_of_docs.commands(line)
    for command in right:
        commands_of_docs.check(command)
    with pytest.raises(Exception, match=message):
        commands_of_docs.check(wrong)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_python_blocks_import_what_exists(page):
    for block in commands_of_docs.blocks(page.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "avjax":
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_words_are_those_of_the_field(page):
    assert [hit[0] for hit in _NEVER.finditer(prose(page.read_text()))] == []


def test_words_that_are_never_written_are_found():
    text = (
        "A picture is at hand; `picture`; we answered.\n```\npicture\n```\n## One vocabulary\nmend\n## Next\nmended\n"
    )
    assert [hit[0] for hit in _NEVER.finditer(prose(text))] == ["picture", "at hand", "answered", "mended"]


def test_the_citation_is_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_workflow_runs_what_ci_runs():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: .ci/run\n" in workflow
    assert "python -m tests.smoke" in workflow
    assert "-m tests.smoke" in (ROOT / ".ci" / "run").read_text()

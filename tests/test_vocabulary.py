"""One vocabulary: the words and names that `docs/architecture.md` rules out are in no code, template or document."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CODE = ("avjax", "benchmarks", "configs", "launch")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs")
SUFFIXES = {".py", ".j2", ".md", ".sh", ".yaml", ".toml", ".css", ".sbatch"}
# What to write instead.
PROSE = {
    r"pictures?|pictured": "video, frame, image, figure",
    r"sounds?": "audio",
    r"answer(?:s|ed|ing)?": "prediction, predict",
    r"yes or no": "multi-label",
    r"mend(?:s|ed|ing)?": "fix",
    r"at hand": "available",
    r"pass(?:es|ed)? on": "redistribute",
    r"moments": "mean_and_std, scoring_sums, frame_times, opt_state",
    r"told": "given, shown, stopped",
    r"begun": "started, initial",
    r"faithful": "as_released",
}
# Words that prose may use, and code has a better name for.
IN_CODE = PROSE | {
    r"says": "states, reports, returns",
    r"here": "the name of what is meant",
    # A quotation mark before it: the name of parameters in checkpoints.
    r"(?<!\")(?<!in )(?<!its )(?<!their )places?": "path, folder, placement, position",
    r"shares": "soft label, proportions",
}
NAMES = {
    "found", "there", "known", "whole", "enter", "about", "here", "told", "says", "said", "begun", "Bench", "Read",
    "of_lanes", "moments", "faithful", "answer", "answers", "picture", "pictures", "sound", "sounds", "place",
}  # fmt: skip
# Sentences that are quoted: the template of ETG-AVER (Eq. 1) and the table of words itself.
QUOTED = {("avjax/text/template.py", "says"), ("docs/architecture.md", "table")}


def files(roots: tuple[str, ...]) -> list[pathlib.Path]:
    paths = [p for root in roots for p in ([ROOT / root] if (ROOT / root).is_file() else (ROOT / root).rglob("*"))]
    return sorted(p for p in paths if p.suffix in SUFFIXES and "__pycache__" not in p.parts)


def misused(text: str, words: dict[str, str]) -> Iterator[str]:
    """Yields line, word and what to write, for each place of `text` that uses a word that is ruled out."""
    for word, instead in words.items():
        for match in re.finditer(rf"\b(?:{word})\b", text, re.IGNORECASE):
            yield f"{text.count(chr(10), 0, match.start()) + 1}: {match[0]} → {instead}"


def named(text: str) -> Iterator[str]:
    """Yields line and name of each identifier of a Python file that describes a state and not what it holds."""
    for node in ast.walk(ast.parse(text)):
        for field in ("name", "id", "arg", "attr"):
            name = getattr(node, field, None)
            if isinstance(name, str) and not name.startswith("__") and name.strip("_") in NAMES:
                yield f"{node.lineno}: name {name}"


@pytest.mark.parametrize("root", CODE)
def test_code_keeps_to_the_vocabulary(root):
    wrong = [
        f"{path.relative_to(ROOT)}:{use}"
        for path in files((root,))
        for use in (*misused(path.read_text(), IN_CODE), *(named(path.read_text()) if path.suffix == ".py" else ()))
        if (str(path.relative_to(ROOT)), use.split()[1]) not in QUOTED
    ]
    assert not wrong, "\n".join(wrong)


def test_documents_keep_to_the_vocabulary():
    wrong = []
    for path in files(DOCUMENTS):
        text = path.read_text()
        if path.name == "architecture.md":
            table = text[text.index("| write | never |") :].partition("\n\n")[0]
            text = text.replace(table, "\n" * table.count("\n"))
        wrong += [f"{path.relative_to(ROOT)}:{use}" for use in misused(text, PROSE)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("# the picture is blank", "1: picture → video, frame, image, figure"),
        ('"""Reads.\n\nThe Moments at rest."""', "3: Moments → mean_and_std, scoring_sums, frame_times, opt_state"),
        ("raise Error('no sound at hand')", "1: sound → audio"),
        ("# the place of a file", "1: place → path, folder, placement, position"),
    ],
)
def test_a_word_outside_it_would_be_found(text, use):
    assert use in list(misused(text, IN_CODE))


def test_a_name_outside_it_would_be_found():
    uses = {"1: name found", "2: name here", "2: name _told"}
    assert set(named("def f(x, found):\n    self._told = x.here")) == uses


def test_words_that_only_look_alike_pass():
    assert not list(misused("a soundtrack in place of text, in its place; placement; answerable; momentum", IN_CODE))

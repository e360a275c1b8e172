"""Finds the commands in the documents' bash blocks, and parses each as the program that it calls would."""

import ast
import dataclasses
import importlib.util
import itertools
import pathlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^ *```(\S*)[^\n]*\n(.*?)^ *```$", re.M | re.S)
_LOOP = re.compile(r"for (\w+) in (.*); do$")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
# Programs whose arguments are not checked, and words of the shell.
FOREIGN = ("source", "export", "kubectl", "ruff", "python3")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its words, and the environment variables that are set before it."""

    words: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(text: str, language: str) -> list[str]:
    """Returns the fenced blocks of a language."""
    return [content for fence, content in FENCE.findall(text) if fence == language]


def commands(script: str) -> Iterator[Command]:
    """Returns the commands of a script. Loops are expanded; `$(…)` becomes one made-up word."""
    variables: dict[str, list[str]] = {}
    loops: list[str] = []
    for line in script.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\([^)]*\)", "W", re.sub(r"\s+#.*$", "", line.strip()))
        words = shlex.split(line)
        if loop := _LOOP.match(line):
            loops.append(loop[1])
            variables[loop[1]] = _expanded(loop[2], variables).split()
        elif words == ["done"]:
            loops.pop()
        elif len(words) == 1 and (assigned := _ASSIGNMENT.fullmatch(words[0])):
            variables[assigned[1]] = [assigned[2]]
        elif words:
            for values in itertools.product(*(variables[name] for name in loops)):
                bound = variables | {name: [value] for name, value in zip(loops, values, strict=True)}
                yield from _split(shlex.split(_expanded(line, bound)))


def _expanded(text: str, variables: Mapping[str, Sequence[str]]) -> str:
    return re.sub(r"\$(\w+)", lambda m: variables[m[1]][0] if m[1] in variables else m[0], text)


def _split(words: Sequence[str]) -> Iterator[Command]:
    for between, part in itertools.groupby(words, lambda word: word in ("&&", ";")):
        if not between:
            part = list(part)
            assigned = list(itertools.takewhile(_ASSIGNMENT.fullmatch, part))
            yield Command(tuple(part[len(assigned) :]), dict(word.split("=", 1) for word in assigned))


def check(command: Command) -> None:
    """Parses a command; raises an error that names what is invalid."""
    for name in command.environment:
        assert name.startswith("AVJAX_"), f"{name} is no variable of avjax"
        files = [*ROOT.glob("avjax/**/*.py"), *ROOT.glob("tests/**/*.py")]
        assert any(f'"{name}"' in file.read_text() for file in files), f"nothing reads {name}"
    match command.words:
        case ["python", "-m", "pip", *words] | ["pip", *words]:
            _check_pip(words)
        case ["python", "-m", module, *words]:
            check_module(module, words)
        case ["python", script, *_]:
            assert (ROOT / script).is_file(), f"{script}: no such file"
        case ["pytest", *words]:
            _check_pytest(words)
        case ["sbatch", *words]:
            script, *rest = itertools.dropwhile(lambda word: word.startswith("-"), words)
            check_launcher(script, rest)
        case ["bash", script, *words]:
            check_launcher(script, words)
        case [program, *words] if program.startswith("launch/"):
            check_launcher(program, words)
        case [program, *_]:
            assert program in FOREIGN or (ROOT / program).is_file(), f"{program} is not known to this test"
        case _:
            raise AssertionError("there is no command")


def _check_pip(words: Sequence[str]) -> None:
    assert words[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"[\w-]+", "".join(re.findall(r"\.\[(.*)\]", " ".join(words))))
    unknown = set(extras) - set(project["optional-dependencies"])
    assert not unknown, f"extras {unknown} are not in pyproject.toml"


def _check_pytest(words: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    markers = {re.split(r"[:(]", line)[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]}
    words = iter(words)
    for word in words:
        if word == "-m":
            expression = next(words)
            assert set(expression.split()) <= markers | {"not", "and", "or"}, f"marker {expression}"
        else:
            assert word.startswith("-") or (ROOT / word.partition("::")[0]).exists(), f"{word}: no such tests"


def check_launcher(script: str, words: Sequence[str]) -> None:
    """Compares the options of a launcher with those in its `case`; what follows `--` belongs to the module."""
    text = (ROOT / script).read_text()
    labels = re.findall(r"^ *((?:-h \| )?--\w+(?: \|(?: \\\n)? *--\w+)*)\)", text, re.M)
    known_flags = set(re.findall(r"--\w+", " ".join(labels)))
    at = words.index("--") if "--" in words else len(words)
    own = [word.partition("=")[0] for word in words[:at] if word.startswith("--")]
    assert set(own) <= known_flags, f"{script} does not know {set(own) - known_flags}"
    if words[at + 1 :]:
        module = next((b for a, b in itertools.pairwise(words[:at]) if a == "--module"), "avjax.train")
        check_module(module, words[at + 1 :])


def check_module(module: str, words: Sequence[str]) -> None:
    """Parses the flags of a module, with its configuration, variants and keys, as the module would."""
    assert importlib.util.find_spec(module), f"{module}: no such module"
    source = _source(module)
    if not (flags_of := _flags(source)):
        return
    values = flags.FlagValues()
    for name, arguments in flags_of:
        _define(values, name, arguments)
    if "configs.require_flag()" in source or "configs.define_flag()" in source:
        config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    given = [f"--config={ROOT / word}" if b == "--config" else word for b, word in _after(words) if word != "--config"]
    argv = [module, *(re.sub(r"^--config=(?!/)", f"--config={ROOT}/", word) for word in given)]
    before, sys.argv = sys.argv, argv  # where ml_collections looks for overrides
    try:
        rest = values(argv)[1:]
        values.mark_as_parsed()
        if "config" in values:
            assert values["config"].value is not None or "require_flag" not in source, f"{module} needs --config"
            assert values["config"].value is None or values["config"].value.name  # one without a file fails when read
    finally:
        sys.argv = before
    _check_arguments(module, source, rest, values)


def _after(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (previous word, word)."""
    return itertools.pairwise(["", *words])


def _source(module: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    return (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def _flags(source: str) -> list[tuple[str, ast.Call]]:
    """Yields (kind, call) of all `flags.DEFINE_<kind>(…)`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        (call.func.attr, call)
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr.startswith("DEFINE_")
    ]


def _define(values: flags.FlagValues, kind: str, call: ast.Call) -> None:
    positional = [_literal(node) for node in call.args]
    named = {word.arg: _literal(word.value) for word in call.keywords}
    getattr(flags, kind)(*positional, **named, flag_values=values)


def _literal(node: ast.AST) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None  # a name, such as a constant default


def _check_arguments(module: str, source: str, rest: Sequence[str], values: flags.FlagValues) -> None:
    """Checks positional arguments by what each entry point accepts."""
    match module:
        case "avjax.evaluate":
            assert rest, "expected run directories or compare"
            assert rest[0] != "compare" or (len(rest) == 1 and values["config"].value), "compare takes --config alone"
            for row in values["rows"].value or ():
                _load(config_flags.get_config_filename(values["config"]), row)
        case "avjax.predict":
            assert rest, "expected clips"
        case "avjax.doctor":
            assert rest in ([], ["data"]) or (len(rest) == 2 and rest[0] == "lists"), rest
            assert rest != ["data"] or values["config"].value, "data takes --config"
        case "benchmarks":
            names = re.search(r"^BENCHMARKS.*?^}", source, re.M | re.S)[0]
            assert len(rest) == 1, rest
            assert f'"{rest[0]}":' in names, f"no benchmark {rest[0]}"
        case _:
            assert not rest, f"{module} takes no arguments: {rest}"


def _load(spec: str, row: str) -> None:
    from avjax import config

    config.load(f"{spec}{',' if ':' in spec else ':'}{row}")

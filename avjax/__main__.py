"""Runs a command of avjax by its name: `avjax train …` is `python -m avjax.train …`.

avjax COMMAND [flags]      runs a command; avjax COMMAND --help shows its flags
avjax                      lists the commands
"""

import ast
import runpy
import sys
from pathlib import Path

from avjax.errors import nearest

COMMANDS = ("train", "extract", "predict", "evaluate", "doctor", "adapt", "export")


def main() -> None:
    """Runs the command named by the first argument, or lists all commands."""
    name, *rest = sys.argv[1:] or ("--help",)
    if name in ("-h", "--help", "--helpfull"):
        print(__doc__)
        print("\n".join(f"  {command:<9} {_summary(command)}" for command in COMMANDS))
    elif name in COMMANDS:
        sys.argv = [f"avjax {name}", *rest]
        runpy.run_module(f"avjax.{name}", run_name="__main__", alter_sys=True)
    else:
        print(
            f"error: command is {name!r}; choose one of {', '.join(COMMANDS)}{nearest(name, COMMANDS)}", file=sys.stderr
        )
        sys.exit(2)


def _summary(command: str) -> str:
    """Reads the first line of a command's help without importing it."""
    text = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(text)).splitlines()[0]


if __name__ == "__main__":
    main()

"""Lays finished runs side by side: WAR, UAR, differences fold by fold to the first run, and the references of that run.

python -m avjax.evaluate W1 W2 ... [--markdown]
"""

from collections.abc import Iterator
from pathlib import Path

from absl import flags

from avjax import cli
from avjax.errors import AvjaxError

MARKDOWN = flags.DEFINE_bool("markdown", False, "Print Markdown instead of a terminal table.")


def main(argv: list[str]) -> None:
    from rich.console import Console

    from avjax.report import tables

    runs = [read(Path(w)) for w in argv[1:]]
    runs += references(*runs[0])
    if MARKDOWN.value:
        print(tables.compare_markdown(runs), end="")
    else:
        Console().print(tables.compare_table(runs))


def read(workdir: Path) -> tuple[str, dict]:
    """(name, metrics) of a finished run.

    Raises:
      AvjaxError: there is no finished run.
    """
    from avjax import results

    if not (workdir / "metrics.json").is_file():
        raise AvjaxError(f"{workdir}: no metrics.json; a finished run of avjax.train has one")
    return workdir.resolve().name, results.read(workdir)


def references(name: str, metrics: dict) -> Iterator[tuple[str, dict]]:
    """The logistic regressions of a run, as runs of their own over the same folds."""
    tested = {f["fold"]: f for f in metrics["folds"]}
    for streams, scores in metrics["reference"].items():
        folds = [tested[f["fold"]] | f for f in scores["folds"]]
        yield f"logistic regression, {streams} (of {name})", metrics | scores | {"folds": folds}


if __name__ == "__main__":
    cli.run(main, takes="run directories")

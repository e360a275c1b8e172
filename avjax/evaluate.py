"""Compares runs.

python -m avjax.evaluate W1 W2 ... [--markdown]

Compares finished runs: WAR, UAR, differences to the first run fold by fold, and the baselines of that run.

python -m avjax.evaluate W1 W2 ... --heads

Shows the pooled scores of all heads of each run, weighted F1 among them: for EmoAsst the rows of its Tables 2 to 5.

python -m avjax.evaluate compare --config configs/ravdess_features.py:av [--rows concat,lmf,mult] [--runs W]

Trains each of `--rows`, variants of the configuration (default: every fusion that can read its streams), under one
protocol into W/<row>, and compares all with the first row: bootstrap intervals over speakers and a paired test. Run
again, it continues where it stopped. A row that cannot be trained is reported with its reason; the others continue.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from avjax import cli
from avjax import config as configs
from avjax.errors import AvjaxError
from avjax.settings import Settings

CONFIG = configs.define_flag()
MARKDOWN = flags.DEFINE_bool("markdown", False, "Print Markdown instead of a terminal table.")
HEADS = flags.DEFINE_bool("heads", False, "Show every head of every run, over all folds and seeds.")
ROWS = flags.DEFINE_list("rows", None, "Variants to compare with the first of them; default: every fusion.")
RUNS = flags.DEFINE_string("runs", None, "Folder of the compared runs; default runs/compare-<config>-<variants>.")


def main(argv: list[str]) -> None:
    """Runs the command."""
    if argv[1] == "compare":
        return _compare(argv[2:])
    runs = [read(Path(w)) for w in argv[1:]]
    if HEADS.value:
        return _show_heads(runs)
    return _show([*runs, *references(*runs[0])], None, [])


def read(workdir: Path) -> tuple[str, dict]:
    """Returns (name, metrics) of a finished run.

    Raises:
      AvjaxError: there is no finished run.
    """
    from avjax.evaluation import results

    if not (workdir / "metrics.json").is_file():
        raise AvjaxError(f"{workdir}: no metrics.json; a finished run of avjax.train has one")
    return workdir.resolve().name, results.read(workdir)


def references(name: str, metrics: dict) -> Iterator[tuple[str, dict]]:
    """Yields the linear baselines of a run, as runs of their own on the same folds."""
    way = "ridge" if metrics["task"] == "regression" else "logistic"
    tested = {f["fold"]: f for f in metrics["folds"]}
    for streams, scores in metrics["reference"].items():
        folds = [tested[f["fold"]] | f for f in scores["folds"]]
        yield f"{way} regression, {streams} (of {name})", metrics | scores | {"folds": folds, "together": None}


def _compare(surplus: list[str]) -> None:
    from avjax import tasks
    from avjax.evaluation import significance
    from avjax.models.fusions.registry import comparable

    if surplus or not CONFIG.value:
        raise AvjaxError(f"got {' '.join(surplus)!r}; expected compare --config FILE, see --help")
    settings = configs.typed(CONFIG.value, Settings)
    names = ROWS.value or comparable(settings.model.streams)
    folder = Path(RUNS.value or "runs") / ("" if RUNS.value else _name(settings))
    trained, failed = train_all(names, folder)
    if not trained:
        raise AvjaxError(f"no row could be trained: {'; '.join(failed)}")
    runs = [read(workdir) for workdir in trained.values()]
    evidence = significance.of_runs(trained) if runs[0][1]["task"] in tasks.ONE_CLASS else None
    _show([*runs, *references(*runs[0])], evidence, failed)


def train_all(names: list[str], folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Trains the rows one after another, on one feature store.

    Returns:
      The run directories, and "row: reason" for the rows that cannot be trained.
    """
    from avjax.train import train
    from avjax.training import data

    trained, failed = {}, []
    for name in names:
        try:
            settings = configs.typed(configs.with_variant(CONFIG, name), Settings)
            trained[name] = train(data.with_store(settings, folder), folder / name)
        except AvjaxError as error:
            failed.append(f"{name}: {error}")
    return trained, failed


def _show_heads(runs: list[tuple[str, dict]]) -> None:
    from rich.console import Console

    from avjax.evaluation.report import tables

    Console(markup=False).print(tables.head_table(runs))


def _name(settings: Settings) -> str:
    return "-".join(["compare", settings.name, *filter(None, settings.variants.split(","))])


def _show(runs: list[tuple[str, dict]], evidence: Mapping[str, Any] | None, failed: list[str]) -> None:
    from rich.console import Console

    from avjax.evaluation.report import tables

    if MARKDOWN.value:
        print(tables.compare_markdown(runs, evidence), end="")
    else:
        Console().print(tables.compare_table(runs, evidence))
    for line in failed:
        print(f"not compared: {line}")


if __name__ == "__main__":
    cli.run(main, takes="run directories, or compare --config FILE")

"""A run's predictions for new clips, for a terminal and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from avjax.tasks import ONE_CLASS

if TYPE_CHECKING:
    from avjax.evaluation.fewshot_cache import Cache
    from avjax.inference.adaptation import Point
    from avjax.inference.predict import Prediction
    from avjax.inference.run import Run

_DETAILED = 8  # clips; of more, each has one row
_BAR = 40  # columns of the terminal


def as_json(
    run: Run, predictions: Iterable[Prediction], rejected: Iterable[tuple[str, str]], cache: Cache | None = None
) -> str:
    """Returns predictions as one JSON object: run, dataset, protocol, lanes, clips, rejected, perhaps cache_entries."""
    clips = [
        {
            "file": p.file,
            **_scores(run, p),
            "sentence": p.sentence,
            "missing": p.missing,
        }
        for p in predictions
    ]
    entries = {"run": run.name, "dataset": run.dataset, "protocol": run.protocol, "lanes": len(run.lanes)}
    entries |= {"cache_entries": len(cache.ids)} if cache else {}
    refused = [{"file": file, "reason": reason} for file, reason in rejected]
    return json.dumps(entries | {"clips": clips, "rejected": refused}, indent=1)


def _scores(run: Run, prediction: Prediction) -> dict[str, object]:
    if run.task == "regression":
        return {"values": prediction.scores}
    likely = [name for name, p in prediction.scores.items() if p > 0.5]
    return {
        "predicted": likely if run.task == "multilabel" else prediction.ranked[0][0],
        "probabilities": prediction.scores,
    }


def as_table(run: Run, predictions: Sequence[Prediction], cache: Cache | None = None) -> RenderableType:
    """Tabulates predictions for a terminal: each with its sentence and all classes, or many with one row each."""
    if run.task not in ONE_CLASS:
        parts = [_numbers(run, predictions)]
    else:
        parts = [_rows(predictions)] if len(predictions) > _DETAILED else [_details(p) for p in predictions]
    lanes = "one lane" if len(run.lanes) == 1 else f"mean of {len(run.lanes)} lanes (fold × seed)"
    by = f", by a cache of {len(cache.ids)} entries" if cache else ""
    return Group(*parts, Text(f"{run.name}: {lanes}{by}. {run.dataset} · {run.protocol}", "dim"))


def cache_table(cache: Cache, name: str, initial: Cache) -> Table:
    """Tabulates a cache: for each class the number of entries from the run, and the ids of those added since.

    `initial` is a new cache of the same run.
    """
    ratios = ", ".join(f"alpha of {m} {ratio:g}" for m, ratio in cache.alpha.items())
    table = Table(title=Text(name), caption=Text(f"{len(cache.ids)} entries; {ratios}; beta {cache.beta:g}"))
    for column in ("class", "from the run", "added"):
        table.add_column(column, justify="right" if column == "from the run" else "left", overflow="fold")
    first = set(zip(initial.ids, initial.label.tolist(), strict=True))
    for number, label in enumerate(cache.classes):
        ids = [i for i, entry in zip(cache.ids, cache.label, strict=True) if entry == number]
        added = [i for i in ids if (i, number) not in first]
        table.add_row(*map(Text, (label, str(len(ids) - len(added)), ", ".join(added))))
    return table


def curve_table(points: Sequence[Point], run: Run, draws: int) -> Table:
    """Tabulates the learning curve over labelled clips of a person, a row per number of them (`adaptation.curve`)."""
    lanes = f"{len(run.lanes)} lanes × {draws} draws; mean ± standard deviation over {len(points[0].uar)} people"
    table = Table(title=Text(run.name), caption=Text(f"{lanes}. {run.dataset} · {run.protocol}"))
    for column in ("labelled per class", "UAR", "gain", "people who gain"):
        table.add_column(column, justify="right")
    for point in points:
        gain = f"{100 * (point.mean - points[0].mean):+.1f}" if point.shots else ""
        above = f"{_percent(point.better)} %" if point.shots else ""
        spread = f"{_percent(point.mean)} ± {_percent(point.spread)}"
        table.add_row(*map(Text, (str(point.shots), spread, gain, above)))
    return table


def _details(prediction: Prediction) -> RenderableType:
    (best, probability), *_ = prediction.ranked
    bars = Table.grid(padding=(0, 1))
    bars.add_column(justify="left")
    bars.add_column(justify="right")
    for name, p in prediction.ranked:
        bars.add_row(
            Text(name), _percent(p), ProgressBar(total=1.0, completed=p, width=_BAR, finished_style="bar.complete")
        )
    head = Text.assemble((prediction.file, "bold"), ": ", (best, "bold"), f" {_percent(probability)} %")
    lines = [Text(f"“{prediction.sentence}”", "italic")] if prediction.sentence else []
    lines += [Text(f"without {what}: {why}", "yellow") for what, why in prediction.missing.items()]
    return Group(head, Padding(Group(*lines, bars), (0, 0, 1, 2)))


def _numbers(run: Run, predictions: Sequence[Prediction]) -> Table:
    """Tabulates one row per clip: its values, or the probabilities of its labels in percent."""
    shown = "{:.3f}".format if run.task == "regression" else _percent
    table = Table()
    for column in ("file", *run.classes, "without"):
        table.add_column(column, justify="right" if column in run.classes else "left", overflow="fold")
    for p in predictions:
        table.add_row(*map(Text, (p.file, *map(shown, p.scores.values()), ", ".join(p.missing))))
    return table


def _rows(predictions: Sequence[Prediction]) -> Table:
    # A common folder is named once; relative and absolute names have none.
    folders = [os.path.dirname(p.file) for p in predictions]
    folder = os.path.commonpath(folders) if len({f.startswith("/") for f in folders}) == 1 else ""
    table = Table(title=Text(folder), title_justify="left")
    for column in ("file", "class", "%", "runner-up", "%", "without"):
        table.add_column(column, justify="right" if column == "%" else "left", overflow="fold")
    for p in predictions:
        first, second = p.ranked[:2]
        cells = (first[0], _percent(first[1]), second[0], _percent(second[1]), ", ".join(p.missing))
        table.add_row(*map(Text, (os.path.relpath(p.file, folder) if folder else p.file, *cells)))
    return table


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"

"""A run's answers for new clips, for a terminal and as JSON."""

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

_DETAILED = 8  # beyond so many clips a row each
_BAR = 40  # columns of the terminal


def as_json(
    run: Run, answers: Iterable[Prediction], rejected: Iterable[tuple[str, str]], cache: Cache | None = None
) -> str:
    """The answers as one JSON object: run, dataset, protocol, lanes, clips, rejected, maybe cache_entries."""
    clips = [
        {
            "file": a.file,
            **_answer(run, a),
            "sentence": a.sentence,
            "missing": a.missing,
        }
        for a in answers
    ]
    about = {"run": run.name, "dataset": run.dataset, "protocol": run.protocol, "lanes": len(run.lanes)}
    about |= {"cache_entries": len(cache.ids)} if cache else {}
    refused = [{"file": file, "reason": reason} for file, reason in rejected]
    return json.dumps(about | {"clips": clips, "rejected": refused}, indent=1)


def _answer(run: Run, answer: Prediction) -> dict[str, object]:
    if run.task == "regression":
        return {"values": answer.scores}
    likely = [name for name, p in answer.scores.items() if p > 0.5]
    return {
        "predicted": likely if run.task == "multilabel" else answer.ranked[0][0],
        "probabilities": answer.scores,
    }


def as_table(run: Run, answers: Sequence[Prediction], cache: Cache | None = None) -> RenderableType:
    """The answers for a terminal: each with its sentence and all classes, or, where there are many, one row each."""
    if run.task not in ONE_CLASS:
        parts = [_numbers(run, answers)]
    else:
        parts = [_rows(answers)] if len(answers) > _DETAILED else [_details(a) for a in answers]
    lanes = "one lane" if len(run.lanes) == 1 else f"mean of {len(run.lanes)} lanes (fold × seed)"
    by = f", by a cache of {len(cache.ids)} entries" if cache else ""
    return Group(*parts, Text(f"{run.name}: {lanes}{by}. {run.dataset} · {run.protocol}", "dim"))


def cache_table(cache: Cache, name: str, begun: Cache) -> Table:
    """What is in a cache: a row for each class, how many entries are of the run, and the ids of those entered since.

    Args:
      begun: what a new cache of the same run has.
    """
    ratios = ", ".join(f"alpha of {m} {ratio:g}" for m, ratio in cache.alpha.items())
    table = Table(title=Text(name), caption=Text(f"{len(cache.ids)} entries; {ratios}; beta {cache.beta:g}"))
    for column in ("class", "of the run", "entered"):
        table.add_column(column, justify="right" if column == "of the run" else "left", overflow="fold")
    first = set(zip(begun.ids, begun.label.tolist(), strict=True))
    for place, label in enumerate(cache.classes):
        ids = [i for i, entry in zip(cache.ids, cache.label, strict=True) if entry == place]
        entered = [i for i in ids if (i, place) not in first]
        table.add_row(*map(Text, (label, str(len(ids) - len(entered)), ", ".join(entered))))
    return table


def curve_table(points: Sequence[Point], run: Run, draws: int) -> Table:
    """What labelled clips of a person bring, a row for each number of them (`adaptation.curve`)."""
    lanes = f"{len(run.lanes)} lanes × {draws} draws; mean ± standard deviation over {len(points[0].uar)} people"
    table = Table(title=Text(run.name), caption=Text(f"{lanes}. {run.dataset} · {run.protocol}"))
    for column in ("labelled per class", "UAR", "to none", "people above none"):
        table.add_column(column, justify="right")
    for point in points:
        gain = f"{100 * (point.mean - points[0].mean):+.1f}" if point.shots else ""
        above = f"{_percent(point.better)} %" if point.shots else ""
        spread = f"{_percent(point.mean)} ± {_percent(point.spread)}"
        table.add_row(*map(Text, (str(point.shots), spread, gain, above)))
    return table


def _details(answer: Prediction) -> RenderableType:
    (best, share), *_ = answer.ranked
    bars = Table.grid(padding=(0, 1))
    bars.add_column(justify="left")
    bars.add_column(justify="right")
    for name, p in answer.ranked:
        bars.add_row(
            Text(name), _percent(p), ProgressBar(total=1.0, completed=p, width=_BAR, finished_style="bar.complete")
        )
    head = Text.assemble((answer.file, "bold"), ": ", (best, "bold"), f" {_percent(share)} %")
    lines = [Text(f"“{answer.sentence}”", "italic")] if answer.sentence else []
    lines += [Text(f"without {what}: {why}", "yellow") for what, why in answer.missing.items()]
    return Group(head, Padding(Group(*lines, bars), (0, 0, 1, 2)))


def _numbers(run: Run, answers: Sequence[Prediction]) -> Table:
    """A row for each clip: its values, or the probabilities of its labels in percent."""
    shown = "{:.3f}".format if run.task == "regression" else _percent
    table = Table()
    for column in ("file", *run.classes, "without"):
        table.add_column(column, justify="right" if column in run.classes else "left", overflow="fold")
    for answer in answers:
        table.add_row(*map(Text, (answer.file, *map(shown, answer.scores.values()), ", ".join(answer.missing))))
    return table


def _rows(answers: Sequence[Prediction]) -> Table:
    # A folder that all share is named once; relative and absolute names share none.
    folders = [os.path.dirname(a.file) for a in answers]
    folder = os.path.commonpath(folders) if len({f.startswith("/") for f in folders}) == 1 else ""
    table = Table(title=Text(folder), title_justify="left")
    for column in ("file", "class", "%", "runner-up", "%", "without"):
        table.add_column(column, justify="right" if column == "%" else "left", overflow="fold")
    for answer in answers:
        first, second = answer.ranked[:2]
        cells = (first[0], _percent(first[1]), second[0], _percent(second[1]), ", ".join(answer.missing))
        table.add_row(*map(Text, (os.path.relpath(answer.file, folder) if folder else answer.file, *cells)))
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"

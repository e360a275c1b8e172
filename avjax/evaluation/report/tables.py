"""Runs as tables: one run fold by fold, and several runs side by side without comparing what cannot be compared.

`metrics` is always the content of a run's `metrics.json`: scores between 0 and 1, shown here as percent.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from avjax.errors import AvjaxError
from avjax.tasks import ONE_CLASS, SCORINGS

if TYPE_CHECKING:
    from rich.table import Table

    from avjax.evaluation.significance import Evidence

Metrics = dict[str, Any]

EVIDENCE_COLUMNS = ("run", "WAR", "UAR", "95 % of WAR", "WAR − first", "p")
TOGETHER = "seeds together"
EVIDENCE_NOTE = (
    "95 %: bootstrap over speakers (clips where speakers are unknown); p: paired permutation test over the same, not "
    "corrected for the number of rows. A clip counts by the share of seeds that are right."
)
TOGETHER_NOTE = "Seeds together: {} of the mean of their predictions (of classes, of their probabilities)."
# Below so many folds an interval of the mean is wider than any difference worth reporting.
ENOUGH_FOLDS = 6
_MARK = "†"


def scores(metrics: Metrics) -> dict[str, str]:
    """The two scores of the run's task that stand in tables: key → how it is called."""
    return dict([*SCORINGS[metrics["task"]].names.items()][:2])


def run_columns(metrics: Metrics) -> tuple[str, ...]:
    """The columns of `run_rows`."""
    return ("fold", "seed", "train", "val", "test", "epoch", *scores(metrics).values())


def reference_columns(metrics: Metrics) -> tuple[str, ...]:
    """The columns of `reference_rows`."""
    first, *_ = names = [*scores(metrics).values()]
    way = "ridge" if metrics["task"] == "regression" else "logistic"
    return (f"{way} regression on pooled features", *names, f"{first}, run − reference")


def compare_columns(metrics: Metrics) -> tuple[str, ...]:
    """The columns of `compare_table` without evidence."""
    first, *_ = names = [*scores(metrics).values()]
    return ("run", *names, f"{first} − first", "fold by fold")


def run_table(metrics: Metrics, title: str) -> Table:
    """One row per fold and seed, then the summary rows; protocol and counts in the caption.

    Returns:
      A `rich.table.Table` with the columns `run_columns`.
    """
    columns = run_columns(metrics)
    blank = ("",) * (len(columns) - 3)
    summary = [(name, *blank, *both) for name, *both in summary_rows(metrics)]
    notes = [f"Protocol: {_setting(metrics)}", *run_notes(metrics)]
    return _rich_table(columns, [run_rows(metrics), summary], title, notes)


def reference_table(metrics: Metrics) -> Table:
    """The references that the run computed beside itself on the same clips and folds.

    Returns:
      A `rich.table.Table` with the columns `reference_columns`.
    """
    note = interval_note(len({fold["fold"] for fold in metrics["folds"]}))
    return _rich_table(reference_columns(metrics), [reference_rows(metrics)], "", [note])


def of_run(metrics: Metrics, title: str) -> list[Table]:
    """All tables of a run."""
    values = [value_table(metrics)] if value_rows(metrics) else []
    heads = [head_table([(title, metrics)])] if "beta" in metrics["folds"][0] else []
    return [run_table(metrics, title), *values, *heads, reference_table(metrics)]


def head_columns(metrics: Metrics) -> tuple[str, ...]:
    """The columns of `head_rows`."""
    return ("head, pooled", *scores(metrics).values(), *(["weighted F1"] if metrics["task"] in ONE_CLASS else []))


def head_rows(metrics: Metrics) -> list[tuple[str, ...]]:
    """One row per head, or classifier that reads the features: its scores over all folds and seeds."""
    keys = [*scores(metrics), *(["f1"] if metrics["task"] in ONE_CLASS else [])]
    return [(head, *(percent(scored[key]) for key in keys)) for head, scored in metrics["heads"].items()]


def head_table(runs: Sequence[tuple[str, Metrics]]) -> Table:
    """The heads of runs below each other, with a column for the run.

    Raises:
      AvjaxError: the runs are of different tasks.
    """
    first = runs[0][1]
    if apart := [name for name, metrics in runs if metrics["task"] != first["task"]]:
        raise AvjaxError(f"{', '.join(apart)}: another task than {runs[0][0]}; show their heads apart")
    sections = [[(name, *row) for row in head_rows(metrics)] for name, metrics in runs]
    notes = [f"{name}: {_setting(metrics)}" for name, metrics in runs]
    notes += [note for _, metrics in runs for note in query_notes(metrics)]
    return _rich_table(("run", *head_columns(first)), sections, "", notes)


def query_notes(metrics: Metrics) -> list[str]:
    """What became of features in training that were asked for with their label, where there are such."""
    if "query" not in metrics:
        return []
    labelled, plain = (percent(metrics["query"][key]) for key in ("with_label", "without_label"))
    return [
        "In training the query names the label, and nowhere else: zero-shot UAR of video on training clips is "
        f"{labelled} with it and {plain} without."
    ]


def value_rows(metrics: Metrics) -> list[tuple[str, ...]]:
    """One row per value or label of a task that has such: its name and all its scores over all folds; else none."""
    return [
        (name, *(f"{score:.3f}" for score in scored.values())) for name, scored in metrics.get("values", {}).items()
    ]


def value_table(metrics: Metrics) -> Table:
    """`value_rows` as a `rich.table.Table`."""
    return _rich_table(value_columns(metrics), [value_rows(metrics)], "", ["All folds and seeds pooled."])


def value_columns(metrics: Metrics) -> tuple[str, ...]:
    """The columns of `value_rows`."""
    scoring = SCORINGS[metrics["task"]]
    return ("pooled", *scoring.names.values())


def reference_rows(metrics: Metrics) -> list[tuple[str, str, str, str]]:
    """One row of `reference_columns` per reference; the difference is over their folds, seeds averaged."""
    first, *_ = keys = [*scores(metrics)]
    return [
        (
            name,
            *(spread(reference, key) for key in keys),
            difference([*fold_differences(metrics["folds"], reference["folds"], first).values()]),
        )
        for name, reference in metrics["reference"].items()
    ]


def compare_table(runs: Sequence[tuple[str, Metrics]], evidence: Mapping[str, Evidence] | None = None) -> Table:
    """One row per run: name, WAR and UAR (mean ± std over folds and seeds), WAR difference to the first run in points.

    Differences are paired: seeds are averaged within each fold, then folds are subtracted. A run on another data set,
    protocol or selection of folds or clips is marked and gets no difference.

    Args:
      runs: (name, metrics), the one to compare with first.
      evidence: by name, for intervals and tests over people in place of folds; a run may lack it.
    Returns:
      A `rich.table.Table` with the columns `compare_columns`, or, given evidence, `EVIDENCE_COLUMNS`; behind them
      `TOGETHER`, if a run has several seeds.
    Raises:
      AvjaxError: there is no run.
    """
    columns, rows, notes = _compared(runs, evidence)
    return _rich_table(columns, [rows], _setting(runs[0][1]), notes)


def compare_markdown(runs: Sequence[tuple[str, Metrics]], evidence: Mapping[str, Evidence] | None = None) -> str:
    """`compare_table` as Markdown: the setting, the table, and the notes as a list. Ends with a newline."""
    columns, rows, notes = _compared(runs, evidence)
    lines = [
        f"**{plain(_setting(runs[0][1]))}**",
        "",
        markdown_row(columns),
        markdown_row(["---", *["--:"] * (len(columns) - 1)]),
        *map(markdown_row, rows),
        "",
        *(f"- {plain(note)}" for note in notes),
    ]
    return "\n".join(lines) + "\n"


def run_rows(metrics: Metrics) -> list[tuple[str, ...]]:
    """One row of `run_columns` per fold and seed; beside its epoch the head that validation chose, where it does."""
    return [
        (
            *(str(fold[key]) for key in ("fold", "seed", "n_train", "n_val", "n_test")),
            f"{fold['best_epoch']} ({fold['head']})" if "head" in fold else str(fold["best_epoch"]),
            *(percent(fold[key]) for key in scores(metrics)),
        )
        for fold in metrics["folds"]
    ]


def summary_rows(metrics: Metrics) -> list[tuple[str, str, str]]:
    """(name, score, score): mean ± std, pooled, of all seeds' mean answer, and of classes what needs no model."""
    together, keys = metrics.get("together"), [*scores(metrics)]
    rows = [
        ("mean ± std" if len(metrics["folds"]) > 1 else "single run", *(spread(metrics, key) for key in keys)),
        ("pooled", *(percent(metrics["pooled"][key]) for key in keys)),
        *([("seeds together", *(spread(together, key) for key in keys))] if together else []),
    ]
    return rows + (_without_model(metrics) if "confusion" in metrics else [])


def _without_model(metrics: Metrics) -> list[tuple[str, str, str]]:
    support = [sum(row) for row in metrics["confusion"]]
    chance, present = percent(1 / len(support)), sum(count > 0 for count in support)
    return [
        ("chance", chance, chance),
        ("majority class", percent(max(support) / max(sum(support), 1)), percent(1 / max(present, 1))),
    ]


def run_notes(metrics: Metrics) -> list[str]:
    """What has to be said beside the scores: clips used and left out, and whether speakers are shared."""
    counts = metrics["counts"]
    return [
        f"{counts['used']} clips used, {counts['quarantined']} quarantined; "
        f"audio masked in {counts['masked_audio']}, video masked in {counts['masked_video']}.",
        _speakers(metrics["folds"]),
        *_sentiment(metrics.get("sentiment")),
    ]


def _sentiment(found: Mapping[str, float] | None) -> list[str]:
    """The measures of a sentiment (`avjax.tasks.metrics.sentiment`), where there is one."""
    if not found:
        return []
    shares = {k: percent(v) for k, v in found.items()}
    return [
        f"Sentiment, pooled: accuracy of two {shares['acc2_has0']} (0 counts as positive), {shares['acc2_non0']} "
        f"(without 0), weighted F1 {shares['f1_has0']}, {shares['f1_non0']}; of five {shares['acc5']}, of seven "
        f"{shares['acc7']}; mean absolute error {found['mae']:.3f}, correlation {found['corr']:.3f}."
    ]


def fold_differences(folds: Sequence[Metrics], reference: Sequence[Metrics], key: str = "war") -> dict[str, float]:
    """A score of `folds` minus that of `reference` in points, fold by fold; seeds are averaged within their fold first.

    Args:
      folds, reference: dicts with "fold" and the score `key` (0–1); both must have the same folds.
    Returns:
      Fold → difference, in the order of `reference`.
    """
    ours, theirs = _by_fold(folds, key), _by_fold(reference, key)
    return {fold: 100 * (ours[fold] - war) for fold, war in theirs.items()}


def difference(differences: Sequence[float]) -> str:
    """Mean difference in points, with its 95 % interval (Student's t over folds) from `ENOUGH_FOLDS` folds on."""
    count = len(differences)
    mean = sum(differences) / count
    if count < ENOUGH_FOLDS:
        return points(mean)
    from scipy.stats import t

    std = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1))
    half = t.ppf(0.975, count - 1) * std / math.sqrt(count)
    return f"{points(mean)} [{points(mean - half)}, {points(mean + half)}]"


def interval_note(folds: int) -> str:
    """Says what may be read out of `difference` over so many folds."""
    if folds < ENOUGH_FOLDS:
        return f"With {folds} fold{'s' * (folds > 1)} an interval of a difference is uninformative: none is given."
    return f"Brackets: 95 % interval over {folds} folds; folds share training clips, so it is rather too narrow."


def percent(score: float) -> str:
    """A score between 0 and 1 as percent with one decimal."""
    return f"{100 * score:.1f}"


def points(difference: float) -> str:
    """A difference in percentage points with its sign, a true minus, and no negative zero."""
    return f"{round(difference, 1) + 0.0:+.1f}".replace("-", "−")


def spread(scores: Metrics, key: str) -> str:
    """Mean ± standard deviation of one score; the mean alone where there is one fold and nothing to spread."""
    mean = percent(scores["mean"][key])
    return f"{mean} ± {percent(scores['std'][key])}" if len(scores["folds"]) > 1 else mean


def _speakers(folds: Iterable[Metrics]) -> str:
    overlaps = {fold["speaker_overlap"] for fold in folds}
    if overlaps == {0}:
        return "No speaker is in both training and test."
    if None in overlaps:
        return "The speakers are unknown: training and test may share them."
    return (
        f"NOT speaker-independent: up to {max(overlaps)} speakers are in both training and test; "
        "the scores say little about people outside the training set."
    )


def _compared(
    runs: Sequence[tuple[str, Metrics]], evidence: Mapping[str, Evidence] | None
) -> tuple[Sequence[str], list[tuple[str, ...]], list[str]]:
    """Columns, rows, and the notes below them."""
    if not runs:
        raise AvjaxError("no runs to compare: expected at least one (name, metrics)")
    first = runs[0][1]
    keys, called = [*scores(first)], [*scores(first).values()]
    note = interval_note(len({fold["fold"] for fold in first["folds"]})) if evidence is None else EVIDENCE_NOTE
    rows, notes = [], [note, f"{' and '.join(called)}: mean ± standard deviation over folds and seeds, percent."]
    for position, (name, metrics) in enumerate(runs):
        reasons = _mismatch(metrics, first)
        if reasons:
            tested = evidence is not None and name in evidence and evidence[name].difference is not None
            verdict = "stands here under another protocol than" if tested else "cannot be compared with"
            notes.append(f"{_MARK} {name} {verdict} {runs[0][0]}: {'; '.join(reasons)}.")
        paired = not reasons and position > 0
        differences = [*fold_differences(metrics["folds"], first["folds"], keys[0]).values()] if paired else []
        by_fold = (difference(differences) if differences else "–", " ".join(map(points, differences)) or "–")
        more = by_fold if evidence is None else _evidence(evidence.get(name), differences)
        spreads = [spread(metrics, k) if k in metrics["mean"] else "–" for k in keys]
        rows.append((f"{name} {_MARK}" if reasons else name, *spreads, *more))
    columns = compare_columns(first) if evidence is None else EVIDENCE_COLUMNS
    together = [m["together"] if m.get("together") and keys[0] in m["mean"] else None for _, m in runs]
    if not any(together):
        return columns, rows, notes
    rows = [(*row, spread(found, keys[0]) if found else "–") for row, found in zip(rows, together, strict=True)]
    return (*columns, TOGETHER), rows, [*notes, TOGETHER_NOTE.format(called[0])]


def _evidence(found: Evidence | None, differences: Sequence[float]) -> tuple[str, str, str]:
    """The last three of `EVIDENCE_COLUMNS`; without evidence the mean difference over folds alone."""
    if found is None:
        return "–", points(sum(differences) / len(differences)) if differences else "–", "–"
    interval = "–".join(percent(bound) for bound in found.interval)
    if found.difference is None:
        return interval, "–", "–"
    mean, low, high = (points(100 * value) for value in found.difference)
    return interval, f"{mean} [{low}, {high}]", f"{found.p:.4f}" if found.p < 0.001 else f"{found.p:.3f}"


def _mismatch(metrics: Metrics, first: Metrics) -> list[str]:
    """Why scores of the two runs are not about the same thing; empty when they are."""
    named = {"dataset": "data set", "protocol": "protocol", "task": "task"}
    ours, theirs = ({key: _but_heads(m[key]) for key in named} for m in (metrics, first))
    reasons = [f"{what} {_apart(ours[key], theirs[key])}" for key, what in named.items() if ours[key] != theirs[key]]
    if metrics["classes"] != first["classes"]:
        reasons.append("other classes")
    tested, expected = ({fold["fold"]: fold["n_test"] for fold in m["folds"]} for m in (metrics, first))
    if not reasons and tested.keys() != expected.keys():
        return [f"folds {', '.join(tested)}, not {', '.join(expected)}"]
    if not reasons and tested != expected:
        return [f"{sum(tested.values())} test clips, not {sum(expected.values())}, or cut otherwise"]
    return reasons


def _but_heads(protocol: str) -> str:
    """A protocol without which of its heads a model answers with: others have one."""
    return "; ".join(part for part in protocol.split("; ") if not part.startswith("head: "))


def _apart(ours: str, theirs: str) -> str:
    """What two lists of things, joined by semicolons, do not share."""
    ours, theirs = ours.split("; "), theirs.split("; ")
    more, less = ("; ".join(x for x in a if x not in b) for a, b in ((ours, theirs), (theirs, ours)))
    return f"{more}, not {less}" if more and less else f"with {more}" if more else f"without {less}"


def _setting(metrics: Metrics) -> str:
    return f"{metrics['dataset']} · {metrics['protocol']}"


def _by_fold(folds: Iterable[Metrics], key: str) -> dict[str, float]:
    found = defaultdict(list)
    for fold in folds:
        found[fold["fold"]].append(fold[key])
    return {fold: sum(values) / len(values) for fold, values in found.items()}


def _rich_table(
    columns: Sequence[str], sections: Iterable[Iterable[Iterable[str]]], title: str, notes: Iterable[str]
) -> Table:
    from rich.table import Table
    from rich.text import Text

    # Text, not markup: a name such as "etg[lite]" is to be shown, not obeyed.
    table = Table(title=Text(title), caption=Text("\n".join(notes)), caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for section in sections:
        for row in section:
            table.add_row(*map(Text, row))
        table.add_section()
    return table


def markdown_row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(plain, cells))} |"


def plain(text: str) -> str:
    """Text that Markdown shows as it is: no cell ends early, no emphasis or tag begins."""
    return re.sub(r"([\\`*_|<\[])", r"\\\1", " ".join(text.split()))

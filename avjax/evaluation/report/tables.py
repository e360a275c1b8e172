"""Tables of runs: one run by fold, and several runs side by side, with differences only where runs are comparable.

`metrics` is always the content of a run's `metrics.json`: scores between 0 and 1, which tables show in percent.
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

EVIDENCE_COLUMNS = ("run", "WAR", "UAR", "95 % CI of WAR", "WAR − first", "p")
TOGETHER = "seeds together"
EVIDENCE_NOTE = (
    "95 % CI: bootstrap over speakers (clips where speakers are unknown). p: paired permutation test over the same "
    "units, not corrected for multiple comparisons. Correctness is averaged over seeds within each clip."
)
TOGETHER_NOTE = "Seeds together: {} of the mean prediction of all seeds (of classes, of the mean probabilities)."
# With fewer folds, an interval of the mean is wider than any difference worth reporting.
ENOUGH_FOLDS = 6
_MARK = "†"


def scores(metrics: Metrics) -> dict[str, str]:
    """Returns the two scores of the run's task that tables show: key → name."""
    return dict([*SCORINGS[metrics["task"]].names.items()][:2])


def run_columns(metrics: Metrics) -> tuple[str, ...]:
    """Returns the columns of `run_rows`."""
    return ("fold", "seed", "train", "val", "test", "epoch", *scores(metrics).values())


def reference_columns(metrics: Metrics) -> tuple[str, ...]:
    """Returns the columns of `reference_rows`."""
    first, *_ = names = [*scores(metrics).values()]
    way = "ridge" if metrics["task"] == "regression" else "logistic"
    return (f"{way} regression on pooled features", *names, f"{first}, run − baseline")


def compare_columns(metrics: Metrics) -> tuple[str, ...]:
    """Returns the columns of `compare_table` without evidence."""
    first, *_ = names = [*scores(metrics).values()]
    return ("run", *names, f"{first} − first", "per fold")


def run_table(metrics: Metrics, title: str) -> Table:
    """Returns a table of one row per fold and seed, then the summary rows; the caption has protocol and counts.

    Its columns are `run_columns`.
    """
    columns = run_columns(metrics)
    blank = ("",) * (len(columns) - 3)
    summary = [(name, *blank, *both) for name, *both in summary_rows(metrics)]
    notes = [f"Protocol: {_setting(metrics)}", *run_notes(metrics)]
    return _rich_table(columns, [run_rows(metrics), summary], title, notes)


def reference_table(metrics: Metrics) -> Table:
    """Returns a table of the baselines on the same clips and folds, with the columns `reference_columns`."""
    note = interval_note(len({fold["fold"] for fold in metrics["folds"]}))
    return _rich_table(reference_columns(metrics), [reference_rows(metrics)], "", [note])


def of_run(metrics: Metrics, title: str) -> list[Table]:
    """Returns all tables of a run."""
    values = [value_table(metrics)] if value_rows(metrics) else []
    heads = [head_table([(title, metrics)])] if "beta" in metrics["folds"][0] else []
    return [run_table(metrics, title), *values, *heads, reference_table(metrics)]


def head_columns(metrics: Metrics) -> tuple[str, ...]:
    """Returns the columns of `head_rows`."""
    return ("head, pooled", *scores(metrics).values(), *(["weighted F1"] if metrics["task"] in ONE_CLASS else []))


def head_rows(metrics: Metrics) -> list[tuple[str, ...]]:
    """Returns one row per head, or classifier on features, with its scores over all folds and seeds."""
    keys = [*scores(metrics), *(["f1"] if metrics["task"] in ONE_CLASS else [])]
    return [(head, *(percent(scored[key]) for key in keys)) for head, scored in metrics["heads"].items()]


def head_table(runs: Sequence[tuple[str, Metrics]]) -> Table:
    """Returns a table of the heads of all runs, with a column for the run.

    Raises:
      AvjaxError: the runs are of different tasks.
    """
    first = runs[0][1]
    if apart := [name for name, metrics in runs if metrics["task"] != first["task"]]:
        raise AvjaxError(f"{', '.join(apart)}: another task than {runs[0][0]}; show their heads separately")
    sections = [[(name, *row) for row in head_rows(metrics)] for name, metrics in runs]
    notes = [f"{name}: {_setting(metrics)}" for name, metrics in runs]
    notes += [note for _, metrics in runs for note in query_notes(metrics)]
    return _rich_table(("run", *head_columns(first)), sections, "", notes)


def query_notes(metrics: Metrics) -> list[str]:
    """Notes how much queries with the label help on training clips, for runs that train with such queries."""
    if "query" not in metrics:
        return []
    with_label, without = (percent(metrics["query"][key]) for key in ("with_label", "without_label"))
    return [
        "Queries contain the label in training only: zero-shot UAR of the video on training clips is "
        f"{with_label} with the label and {without} without it."
    ]


def value_rows(metrics: Metrics) -> list[tuple[str, ...]]:
    """Returns one row per target value or label, with its name and all its scores over all folds; none for classes."""
    return [
        (name, *(f"{score:.3f}" for score in scored.values())) for name, scored in metrics.get("values", {}).items()
    ]


def value_table(metrics: Metrics) -> Table:
    """Returns `value_rows` as a table."""
    return _rich_table(value_columns(metrics), [value_rows(metrics)], "", ["All folds and seeds pooled."])


def value_columns(metrics: Metrics) -> tuple[str, ...]:
    """Returns the columns of `value_rows`."""
    scoring = SCORINGS[metrics["task"]]
    return ("pooled", *scoring.names.values())


def reference_rows(metrics: Metrics) -> list[tuple[str, str, str, str]]:
    """Returns one row of `reference_columns` per baseline; the difference is over its folds, seeds averaged."""
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
    """Returns a table of runs: name, WAR and UAR (mean ± std over folds and seeds), WAR difference to the first run.

    Differences are in points and paired: seeds are averaged within each fold, then folds are subtracted. A run on
    another data set, protocol, or selection of folds or clips is marked and has no difference.

    Args:
      runs: (name, metrics), first the run to compare with.
      evidence: by name, for intervals and tests over people instead of folds; a run may lack it.

    Returns:
      A table with the columns `compare_columns`, or, given evidence, `EVIDENCE_COLUMNS`; then `TOGETHER`, if a run has
      several seeds.

    Raises:
      AvjaxError: there is no run.
    """
    columns, rows, notes = _compared(runs, evidence)
    return _rich_table(columns, [rows], _setting(runs[0][1]), notes)


def compare_markdown(runs: Sequence[tuple[str, Metrics]], evidence: Mapping[str, Evidence] | None = None) -> str:
    """Returns `compare_table` as Markdown: the setting, the table, and the notes as a list; ends with a newline."""
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
    """Returns one row of `run_columns` per fold and seed, with the head beside the epoch if validation selected it."""
    return [
        (
            *(str(fold[key]) for key in ("fold", "seed", "n_train", "n_val", "n_test")),
            f"{fold['best_epoch']} ({fold['head']})" if "head" in fold else str(fold["best_epoch"]),
            *(percent(fold[key]) for key in scores(metrics)),
        )
        for fold in metrics["folds"]
    ]


def summary_rows(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Returns (name, score, score): mean ± std, pooled, seeds together, and of classes chance and majority class."""
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
    """Returns the notes to the scores: clips used and left out, whether speakers overlap, and sentiment measures."""
    counts = metrics["counts"]
    return [
        f"{counts['used']} clips used, {counts['quarantined']} quarantined; "
        f"audio masked in {counts['masked_audio']}, video masked in {counts['masked_video']}.",
        _speakers(metrics["folds"]),
        *_sentiment(metrics.get("sentiment")),
    ]


def _sentiment(measures: Mapping[str, float] | None) -> list[str]:
    """Notes the measures of sentiment (`avjax.tasks.metrics.sentiment`), where there are any."""
    if not measures:
        return []
    p = {k: percent(v) for k, v in measures.items()}
    return [
        f"Sentiment, pooled: two-class accuracy {p['acc2_has0']} with 0 as positive, {p['acc2_non0']} without 0; "
        f"weighted F1 {p['f1_has0']} and {p['f1_non0']}; five-class accuracy {p['acc5']}, seven-class accuracy "
        f"{p['acc7']}; mean absolute error {measures['mae']:.3f}, Pearson correlation {measures['corr']:.3f}."
    ]


def fold_differences(folds: Sequence[Metrics], reference: Sequence[Metrics], key: str = "war") -> dict[str, float]:
    """Subtracts a score of `reference` from that of `folds` by fold; seeds are averaged within their fold first.

    `folds` and `reference` are dicts with "fold" and the score `key` (0–1); both must have the same folds.

    Returns:
      Fold → difference in points, in the order of `reference`.
    """
    ours, theirs = _by_fold(folds, key), _by_fold(reference, key)
    return {fold: 100 * (ours[fold] - war) for fold, war in theirs.items()}


def difference(differences: Sequence[float]) -> str:
    """Formats the mean difference in points, from `ENOUGH_FOLDS` folds with its 95 % interval (Student's t)."""
    count = len(differences)
    mean = sum(differences) / count
    if count < ENOUGH_FOLDS:
        return points(mean)
    from scipy.stats import t

    std = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1))
    half = t.ppf(0.975, count - 1) * std / math.sqrt(count)
    return f"{points(mean)} [{points(mean - half)}, {points(mean + half)}]"


def interval_note(folds: int) -> str:
    """Notes how to read `difference` over so many folds."""
    if folds < ENOUGH_FOLDS:
        return f"With {folds} fold{'s' * (folds > 1)}, an interval of the difference is uninformative; none is given."
    return f"Brackets: 95 % interval over {folds} folds; folds share training clips, so it is somewhat too narrow."


def percent(score: float) -> str:
    """Formats a score between 0 and 1 as percent with one decimal."""
    return f"{100 * score:.1f}"


def points(difference: float) -> str:
    """Formats a difference in percentage points with its sign, a true minus, and no negative zero."""
    return f"{round(difference, 1) + 0.0:+.1f}".replace("-", "−")


def spread(scores: Metrics, key: str) -> str:
    """Formats the mean ± standard deviation of a score over folds and seeds; of a single one the mean alone."""
    mean = percent(scores["mean"][key])
    return f"{mean} ± {percent(scores['std'][key])}" if len(scores["folds"]) > 1 else mean


def _speakers(folds: Iterable[Metrics]) -> str:
    overlaps = {fold["speaker_overlap"] for fold in folds}
    if overlaps == {0}:
        return "No speaker is in both training and test."
    if None in overlaps:
        return "Speakers are unknown: training and test may share some."
    return (
        f"NOT speaker-independent: up to {max(overlaps)} speakers are in both training and test; "
        "the scores say little about people outside the training set."
    )


def _compared(
    runs: Sequence[tuple[str, Metrics]], evidence: Mapping[str, Evidence] | None
) -> tuple[Sequence[str], list[tuple[str, ...]], list[str]]:
    """Returns columns, rows, and the notes below them."""
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
            verdict = "has another protocol than" if tested else "cannot be compared with"
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
    rows = [(*row, spread(scored, keys[0]) if scored else "–") for row, scored in zip(rows, together, strict=True)]
    return (*columns, TOGETHER), rows, [*notes, TOGETHER_NOTE.format(called[0])]


def _evidence(evidence: Evidence | None, differences: Sequence[float]) -> tuple[str, str, str]:
    """Formats the last three of `EVIDENCE_COLUMNS`; without evidence only the mean difference over folds."""
    if evidence is None:
        return "–", points(sum(differences) / len(differences)) if differences else "–", "–"
    interval = "–".join(percent(bound) for bound in evidence.interval)
    if evidence.difference is None:
        return interval, "–", "–"
    mean, low, high = (points(100 * value) for value in evidence.difference)
    return interval, f"{mean} [{low}, {high}]", f"{evidence.p:.4f}" if evidence.p < 0.001 else f"{evidence.p:.3f}"


def _mismatch(metrics: Metrics, first: Metrics) -> list[str]:
    """Lists the reasons why scores of two runs cannot be compared; empty where they can."""
    named = {"dataset": "data set", "protocol": "protocol", "task": "task"}
    ours, theirs = ({key: _but_heads(m[key]) for key in named} for m in (metrics, first))
    reasons = [f"{what} {_apart(ours[key], theirs[key])}" for key, what in named.items() if ours[key] != theirs[key]]
    if metrics["classes"] != first["classes"]:
        reasons.append("different classes")
    tested, expected = ({fold["fold"]: fold["n_test"] for fold in m["folds"]} for m in (metrics, first))
    if not reasons and tested.keys() != expected.keys():
        return [f"folds {', '.join(tested)}, not {', '.join(expected)}"]
    if not reasons and tested != expected:
        return [f"{sum(tested.values())} test clips, not {sum(expected.values())}, or split differently"]
    return reasons


def _but_heads(protocol: str) -> str:
    """Removes the selection of the head from a protocol: other models have one head."""
    return "; ".join(part for part in protocol.split("; ") if not part.startswith("head: "))


def _apart(ours: str, theirs: str) -> str:
    """Describes how two lists, joined by semicolons, differ."""
    ours, theirs = ours.split("; "), theirs.split("; ")
    more, less = ("; ".join(x for x in a if x not in b) for a, b in ((ours, theirs), (theirs, ours)))
    return f"{more}, not {less}" if more and less else f"with {more}" if more else f"without {less}"


def _setting(metrics: Metrics) -> str:
    return f"{metrics['dataset']} · {metrics['protocol']}"


def _by_fold(folds: Iterable[Metrics], key: str) -> dict[str, float]:
    by_fold = defaultdict(list)
    for fold in folds:
        by_fold[fold["fold"]].append(fold[key])
    return {fold: sum(values) / len(values) for fold, values in by_fold.items()}


def _rich_table(
    columns: Sequence[str], sections: Iterable[Iterable[Iterable[str]]], title: str, notes: Iterable[str]
) -> Table:
    from rich.table import Table
    from rich.text import Text

    # Text, not markup: a name such as "etg[lite]" must be shown as it is.
    table = Table(title=Text(title), caption=Text("\n".join(notes)), caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for section in sections:
        for row in section:
            table.add_row(*map(Text, row))
        table.add_section()
    return table


def markdown_row(cells: Iterable[str]) -> str:
    """Formats a row of a Markdown table."""
    return f"| {' | '.join(map(plain, cells))} |"


def plain(text: str) -> str:
    """Escapes text so that Markdown shows it as it is: no cell ends early, no emphasis or tag starts."""
    return re.sub(r"([\\`*_|<\[])", r"\\\1", " ".join(text.split()))

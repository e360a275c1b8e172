"""The plots of a report. The same numbers give the same bytes: no dates, no display, no global state."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avjax.errors import AvjaxError
from avjax.tasks import ONE_CLASS, SCORINGS, metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Perceptually uniform, and reversed so that darker means more, as in the paper's Fig. 2.
_COLOURS = "magma_r"
_EMPTY = "#f6f6f4"  # cells without clips
_INK, _FAINT, _BLUE, _ORANGE = "#1f2430", "#6b7280", "#2563a8", "#c2570c"


def confusion_figure(
    confusion: Sequence[Sequence[float]], classes: Sequence[str], title: str, path: Path, *, note: str = ""
) -> None:
    """Plots a confusion matrix as PNG: cells show the percentage of their row, and the count below it.

    Args:
      confusion: (C, C) counts, rows = true class.
      classes: the C names.
      title: of the plot; WAR and UAR of the matrix are shown below it.
      path: of the PNG.
      note: small print below, such as the protocol.

    Raises:
      AvjaxError: the matrix does not fit the classes, or holds negative or non-finite counts.
    """
    counts = np.asarray(confusion, np.float32)
    if counts.shape != (len(classes), len(classes)) or not (np.isfinite(counts) & (counts >= 0)).all():
        raise AvjaxError(
            f"a confusion matrix of shape {counts.shape} for {len(classes)} classes: "
            f"expected ({len(classes)}, {len(classes)}) finite counts"
        )
    side = 2.2 + 0.62 * len(classes)
    figure = _figure(side + 0.6, side + 0.3)
    axes = figure.add_subplot()
    support = counts.sum(1, keepdims=True)
    rate = np.divide(counts, support, out=np.zeros_like(counts), where=support > 0)
    axes.set_facecolor(_EMPTY)
    image = axes.imshow(np.ma.masked_equal(rate, 0), cmap=_COLOURS, vmin=0, vmax=1)
    _label_cells(axes, counts, rate, image.cmap)
    _name_classes(axes, classes, support[:, 0])
    axes.set_title(title, fontsize=12, fontweight="bold", pad=24)
    scores = f"WAR {100 * metrics.war(counts):.1f} %   ·   UAR {100 * metrics.uar(counts):.1f} %"
    axes.annotate(scores, (0.5, 1), (0, 8), "axes fraction", textcoords="offset points", ha="center", color=_FAINT)
    figure.supxlabel(textwrap.fill(note, int(11 * side)), fontsize=8, color=_FAINT)
    _save(figure, path)


def curves_figure(history: Sequence[Mapping[str, Any]], path: Path, *, note: str = "") -> None:
    """Plots loss and validation score over the epochs as PNG.

    Args:
      history: per epoch `epoch`, `train_loss`, and, where the protocol has a validation set, `val_loss` and the score
        that validation selects by (0–1), each the mean over folds and seeds. Without validation only the training loss
        is plotted.
      path: of the PNG.
      note: small print below, such as the data and the protocol.

    Raises:
      AvjaxError: the history is empty.
    """
    if not history:
        raise AvjaxError("no epochs to plot: expected a history with at least one")
    panels = [("loss", [("train_loss", "training", _BLUE, 1), ("val_loss", "validation", _ORANGE, 1)])]
    for score, name in {scoring.picks: scoring.names[scoring.picks] for scoring in SCORINGS.values()}.items():
        if _series(history, f"val_{score}")[0]:
            panels.append((f"validation {name}, %", [(f"val_{score}", "validation", _ORANGE, 100)]))
    figure = _figure(4.6 * len(panels), 3.2)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_lines(axes, history, lines)
        axes.set_title(title, loc="left", fontsize=11)
    figure.supxlabel(textwrap.fill(note, 60 * len(panels)), fontsize=8, color=_FAINT)
    _save(figure, path)


def scatter_figure(
    label: np.ndarray, prediction: np.ndarray, names: Sequence[str], title: str, path: Path, *, note: str = ""
) -> None:
    """Plots predictions against labels as PNG, one panel per target value, with the identity line.

    `label` and `prediction` are (n, r) of the r values `names`; title, path and note are as for `confusion_figure`.
    """
    figure = _figure(3.4 * len(names), 3.9)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for i, (axes, name) in enumerate(zip(panels, names, strict=True)):
        x, y = label[:, i], prediction[:, i]
        ends = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
        axes.plot(ends, ends, color=_FAINT, linewidth=1)
        axes.scatter(x, y, s=9, alpha=0.5, color=_BLUE, linewidths=0)
        scored = metrics.scoring_sums(x[:, None], y[:, None], np.ones(len(x)))
        axes.set_title(f"{name}: CCC {100 * metrics.ccc(scored)[0]:.1f}", fontsize=10)
        axes.set(xlabel="label", ylabel="prediction")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.supxlabel(textwrap.fill(note, 50 * len(names)), fontsize=8, color=_FAINT)
    _save(figure, path)


def labels_figure(tables: np.ndarray, names: Sequence[str], title: str, path: Path, *, note: str = "") -> None:
    """Plots the recall of positive and of negative clips of each label as PNG.

    `tables` are (c, 2, 2) counts of the c labels `names`, rows = truth, negatives first; title, path and note are as
    for `confusion_figure`.
    """
    figure = _figure(6.4, 1.4 + 0.5 * len(names))
    axes = figure.add_subplot()
    recall = 100 * tables.diagonal(axis1=-2, axis2=-1) / np.maximum(tables.sum(-1), 1)
    for shift, column, called, colour in ((-0.2, 1, "positive", _ORANGE), (0.2, 0, "negative", _BLUE)):
        axes.barh(np.arange(len(names)) + shift, recall[:, column], 0.36, color=colour, label=called)
    axes.set_yticks(range(len(names)), [f"{n} ({t[1].sum():.0f})" for n, t in zip(names, tables, strict=True)])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="recall, %", ylabel="label (positive clips)")
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=12, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(textwrap.fill(note, 80), fontsize=8, color=_FAINT)
    _save(figure, path)


def adaptation_figure(points: Sequence[Mapping[str, Any]], title: str, path: Path, *, note: str = "") -> None:
    """Plots UAR over labelled clips of a person: a thin line for each person, and mean ± std over people.

    `points` are in the order of `shots`, each with `mean`, `std` and `uar` by person, between 0 and 1.
    """
    figure = _figure(6.4, 4.4)
    axes = figure.add_subplot()
    shots = [point["shots"] for point in points]
    for person in points[0]["uar"]:
        axes.plot(shots, [100 * point["uar"][person] for point in points], color=_FAINT, alpha=0.35, linewidth=0.8)
    mean, spread = (np.array([100 * point[key] for point in points]) for key in ("mean", "std"))
    axes.fill_between(shots, mean - spread, mean + spread, color=_BLUE, alpha=0.12, linewidth=0)
    axes.plot(shots, mean, color=_BLUE, marker="o", linewidth=2)
    for x, y in zip(shots, mean, strict=True):
        axes.annotate(f"{y:.1f}", (x, y), (0, 7), textcoords="offset points", ha="center", color=_INK, fontsize=9)
    axes.set_xticks(shots)
    axes.set_xlabel("labelled clips per class of a person not seen in training")
    axes.set_ylabel("UAR on the person's other clips, %")
    axes.set_title(title, fontsize=12, fontweight="bold")
    figure.supxlabel(textwrap.fill(note, 95), fontsize=8, color=_FAINT)
    _save(figure, path)


def predictions_figure(metrics: Mapping[str, Any], rows: Mapping[str, np.ndarray], title: str, workdir: Path) -> None:
    """Plots the predictions of a run in `workdir`, in the form of its task and under the name in `page.PREDICTIONS`.

    `metrics` is the content of metrics.json, `rows` that of predictions.npz.
    """
    classes, note = metrics["classes"], f"{metrics['dataset']} · {metrics['protocol']}"
    prediction = next(v for k, v in rows.items() if k.startswith("logits_"))
    if metrics["task"] in ONE_CLASS:
        confusion_figure(metrics["confusion"], classes, title, workdir / "confusion.png", note=note)
    elif metrics["task"] == "regression":
        scatter_figure(rows["label"], prediction, classes, title, workdir / "scatter.png", note=note)
    else:
        tables = SCORINGS["multilabel"].count(rows["label"], prediction)
        labels_figure(tables, classes, title, workdir / "labels.png", note=note)


def attention_figure(
    clips: Sequence[Mapping[str, Any]],
    streams: Sequence[tuple[str, str, str]],
    title: str,
    path: Path,
    *,
    note: str = "",
) -> None:
    """Plots attention between streams as heat maps (DE-III, Figure 2) as PNG: one row per clip, brighter is stronger.

    `clips` have a `name` and, by the names of `streams`, weights (q, k) of their real steps; `streams` are (name, query
    stream: horizontal, key stream: vertical). Title, path and note are as for `confusion_figure`.
    """
    figure = _figure(4.2 * len(streams), 2.6 * len(clips) + 0.9)
    panels = figure.subplots(len(clips), len(streams), squeeze=False)
    for clip, row in zip(clips, panels, strict=True):
        for (name, query, key), axes in zip(streams, row, strict=True):
            if clip[name].size:
                axes.imshow(clip[name].T, cmap="magma", aspect="auto", origin="lower", interpolation="nearest")
            axes.set(xlabel=f"{query} step (query)", ylabel=f"{key} step (key)")
            axes.set_title(clip["name"], fontsize=9, color=_INK)
            axes.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    note = f"{note}. Each map has its own colour scale."
    figure.supxlabel(textwrap.fill(note, 60 * len(streams)), fontsize=8, color=_FAINT)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    """Makes a figure without pyplot: nothing is left open, and the user's backend is not touched."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _save(figure: Figure, path: Path) -> None:
    # Without the program's version, which differs from machine to machine.
    figure.savefig(path, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.15)


def _label_cells(axes: Axes, counts: np.ndarray, rate: np.ndarray, cmap: Any) -> None:
    for row, column in zip(*np.nonzero(counts), strict=True):
        where = {"xy": (column, row), "textcoords": "offset points", "ha": "center"}
        where["color"] = _ink(cmap(rate[row, column]))
        axes.annotate(f"{100 * rate[row, column]:.0f}", xytext=(0, -1), fontsize=10, **where)
        axes.annotate(f"{counts[row, column]:.0f}", xytext=(0, -11), fontsize=6.5, **where)


def _name_classes(axes: Axes, classes: Sequence[str], support: np.ndarray) -> None:
    """Names the classes on both axes, with the number of clips of the true ones, and draws a white grid."""
    rows = [f"{name} ({count:.0f})" for name, count in zip(classes, support, strict=True)]
    axes.set_xticks(range(len(classes)), classes, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), rows)
    axes.set(xlabel="predicted", ylabel="true (clips)")
    edges = np.arange(len(classes) + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0, labelcolor=_INK)
    axes.spines[:].set_visible(False)


def _ink(background: Sequence[float]) -> str:
    """Returns black or white, whichever contrasts more with `background` (RGB 0–1) by WCAG 2's relative luminance."""
    rgb = np.asarray(background[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    return "black" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "white"


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Returns epochs and values of `key` where it was measured."""
    measured = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
    return [epoch for epoch, _ in measured], [value for _, value in measured]


def _draw_lines(axes: Axes, history: Sequence[Mapping[str, Any]], lines: list[tuple[str, str, str, float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    drawn = 0
    for key, label, colour, scale in lines:
        epochs, values = _series(history, key)
        if epochs:
            marker = "o" if len(epochs) == 1 else None  # a line needs two points
            axes.plot(epochs, np.multiply(values, scale), color=colour, label=label, linewidth=1.8, marker=marker)
            drawn += 1
    if drawn > 1:
        axes.legend(frameon=False)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

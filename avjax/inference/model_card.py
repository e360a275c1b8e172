"""The model card of a bundle: data, scores, limits, licences, and code that runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avjax.evaluation.report import tables
from avjax.tasks import ONE_CLASS

_STEPS = 16  # of the synthetic clips in the card, if their number is free


def markdown(
    name: str, provenance: Mapping[str, Any], metrics: tables.Metrics, published: Any | None, params: Any
) -> str:
    """Renders the card as Markdown.

    Args:
      name: of the bundle's folder.
      provenance: content of `provenance.json`.
      metrics: content of the run's `metrics.json`.
      published: metadata of a public data set (`datasets.metadata.Metadata`), else None.
      params: of one of the networks.
    """
    import jinja2
    from clu import parameter_overview
    from markupsafe import Markup

    # Names come from data: they are shown, never interpreted.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else tables.plain(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = lambda text: Markup("`{}`".format(str(text).replace("`", "")))
    return environment.get_template("model_card.md.j2").render(
        name=name,
        folder=Markup(repr(name)),
        folder_in_shell=Markup(shlex.quote(name)),
        provenance=provenance,
        metrics=metrics,
        published=published,
        kind={"regression": "a value for each of", "multilabel": "the probability of each of"}.get(
            metrics["task"], "one probability for each of these, adding up to 1:"
        ),
        figures=Markup(_table(("", *tables.scores(metrics).values()), tables.summary_rows(metrics))),
        by_class=Markup(_by_class(metrics)),
        references=Markup(_table(tables.reference_columns(metrics), tables.reference_rows(metrics))),
        notes=tables.run_notes(metrics),
        parameters=parameter_overview.count_parameters(params),
        overview=Markup(parameter_overview.get_parameter_overview(params, include_stats=False)),
        measured=bool(provenance["pretrained"]),
        folds=len({lane["fold"] for lane in provenance["lanes"]}),
        lengths=_lengths([array["shape"][1] for array in provenance["inputs"].values()]),
        arrays=[Markup(_synthetic(key, array)) for key, array in provenance["inputs"].items()],
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = tables.markdown_row(["---", *["--:"] * (len(columns) - 1)])
    return "\n".join([tables.markdown_row(columns), line, *map(tables.markdown_row, rows)])


def _by_class(metrics: tables.Metrics) -> str:
    """Tabulates the pooled scores of each class, target or label."""
    if metrics["task"] not in ONE_CLASS:
        return _table(tables.value_columns(metrics), tables.value_rows(metrics))
    confusion = metrics["confusion"]
    rows = []
    for at, name in enumerate(metrics["classes"]):
        clips, predicted, right = sum(confusion[at]), sum(row[at] for row in confusion), confusion[at][at]
        ratios = (right / max(clips, 1), right / max(predicted, 1), 2 * right / max(clips + predicted, 1))
        rows.append((name, str(clips), *map(tables.percent, ratios)))
    return _table(("class", "tested", "recall", "precision", "F1"), rows)


def _lengths(steps: Sequence[int | str]) -> str:
    """Returns how free the numbers of steps are: fixed, grouped or any."""
    if all(isinstance(count, int) for count in steps):
        return "fixed"
    return "grouped" if any("*" in str(count) for count in steps) else "any"


def _synthetic(key: str, array: Mapping[str, Any]) -> str:
    """Returns a line of code with an input of two clips."""
    _, steps, *step = array["shape"]
    shape = (2, steps if isinstance(steps, int) else _STEPS, *step)
    made = f"np.ones({shape}, bool)" if key.endswith("_mask") else f"np.zeros({shape}, np.{array['dtype']})"
    return f'"{key}": {made},  # {", ".join(map(str, array["shape"]))}'

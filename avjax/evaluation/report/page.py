"""The report of a finished run: one self-contained HTML page that can be mailed, printed and archived."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from avjax.errors import AvjaxError
from avjax.evaluation.report import tables
from avjax.utils.storage import read_json, write_text

MOST_SENTENCES = 12
_FILES = ("metrics.json", "config.json", "environment.json", "curves.png")
# The plot of the predictions, by kind of task.
PREDICTIONS = {
    "single": "confusion.png",
    "soft": "confusion.png",
    "regression": "scatter.png",
    "multilabel": "labels.png",
}


def write_report(workdir: Path, *, sentences: Sequence[Mapping[str, str]] = ()) -> Path:
    """Writes `workdir/report.html` from the run's scores and plots.

    Args:
      workdir: a run directory with metrics.json, config.json, environment.json, and the plots of `report.plots`:
        curves.png, that of the predictions (`PREDICTIONS`) and, if there is one, attention.png.
      sentences: examples, dicts with `clip_id`, `label`, `predicted` and `sentence`; the first dozen is shown.

    Returns:
      The path of the page. The same inputs give the same bytes.

    Raises:
      AvjaxError: a file is missing or is not JSON.
    """
    _check_exist(workdir, _FILES)
    metrics = read_json(workdir / "metrics.json")
    predictions = PREDICTIONS[metrics["task"]]
    _check_exist(workdir, (predictions,))
    files = {"predictions": predictions, "curves": "curves.png", "attention": "attention.png"}
    page = template("page.html.j2").render(
        name=workdir.resolve().name,
        metrics=metrics,
        tables=tables,
        run_rows=tables.run_rows(metrics),
        summary_rows=tables.summary_rows(metrics),
        notes=tables.run_notes(metrics),
        shared_speakers=any(fold["speaker_overlap"] != 0 for fold in metrics["folds"]),
        references=tables.reference_rows(metrics),
        fold_count=len({fold["fold"] for fold in metrics["folds"]}),
        plots={n: _embedded(workdir / f) if (workdir / f).is_file() else "" for n, f in files.items()},
        sentences=sentences[:MOST_SENTENCES],
        more_sentences=len(sentences) > MOST_SENTENCES,
        config=list(_flat(read_json(workdir / "config.json"))),
        environment=list(_flat(read_json(workdir / "environment.json"))),
    )
    path = workdir / "report.html"
    write_text(path, page)  # atomic: a run is finished once its report exists
    return path


def _check_exist(workdir: Path, names: Sequence[str]) -> None:
    if missing := [name for name in names if not (workdir / name).is_file()]:
        raise AvjaxError(f"{workdir}: no {', '.join(missing)}; a report needs a finished run with its plots")


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted path, value as JSON) of every leaf; empty containers are leaves."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False)


def _embedded(image: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode('ascii')}"


def template(name: str) -> Any:
    """Returns the Jinja template `name` of this package."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    # Names and sentences come from data files and media: they are escaped, never interpreted.
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template(name)

"""Audit of a data set: opens every clip, checks folds and labels, and writes the findings as a page and as JSON."""

import base64
import dataclasses
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from avjax.checks import clip_facts, findings
from avjax.checks.findings import Finding
from avjax.datasets import published_folds, registry
from avjax.datasets.base import Corpus, Fold
from avjax.datasets.folds import natural_folds
from avjax.datasets.metadata import Metadata, metadata
from avjax.errors import AvjaxError
from avjax.evaluation.report import page
from avjax.utils import worker_pool
from avjax.utils.storage import only_writer, write_text

MOST_STRIPS, _STRIPS_OF_A_KIND = 12, 3
MOST_ROWS = 200  # of a kind on the page; all are in the JSON file


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an audit.

    Attributes:
      folds, fold_count: the protocol (`natural_folds`).
      lists: folder of public fold lists to compare with, or "".
      faces: whether to look for faces.
      processes: number of worker processes; 0 = one per core.
      clip_seconds: time limit of one clip.
    """

    folds: str = "auto"
    fold_count: int = 5
    lists: str = ""
    faces: bool = True
    processes: int = 0
    clip_seconds: float = clip_facts.CLIP_SECONDS


def audit(
    dataset: str, root: str = "", *, out: str = "", options: Options | None = None, console: Console | None = None
) -> dict[str, object]:
    """Audits a data set; clips that were opened before and have not changed are not opened again.

    Args:
      dataset: name of the data set.
      root: folder of the data; "" = the default one.
      out: folder for audit.html, audit.json and clips.jsonl; "" = the default one.
      options: further options.
      console: for progress and results.

    Returns:
      the content of audit.json: the same for the same data.

    Raises:
      AvjaxError: the data set, the lists, a package or the face landmarker is missing, or `out` cannot be written.
    """
    how = options or Options()
    _need_packages(how.faces)
    console = console or Console(soft_wrap=True, markup=False)
    corpus, listed = registry.index(dataset, root), published_folds.fold_lists(Path(how.lists)) if how.lists else []
    folder = Path(out or f"audits/{dataset.replace(':', '_')}")
    with only_writer(folder, "choose another --out"):
        # ---- Clips ------------------------------------------------------------------------------------------------
        limits = {"processes": how.processes, "clip_seconds": how.clip_seconds}
        model = _landmarker() if how.faces else None
        facts = clip_facts.inspect_all(corpus.clips, folder / "clips.jsonl", console, model=model, **limits)
        # ---- Verdicts ---------------------------------------------------------------------------------------------
        published = metadata(dataset)
        made, protocol, problems = _folds(corpus, how.folds, how.fold_count)
        problems += _problems(corpus, facts, made, published)
        problems += findings.of_lists(corpus.clips, listed, published_folds.problems(listed)) if how.lists else []
        problems.sort(key=lambda f: (findings.SEVERITIES.index(f.severity), f.kind))
        # ---- Page -------------------------------------------------------------------------------------------------
        result = {
            "dataset": dataset,
            "protocol": protocol,
            "clips": len(corpus.clips),
            "rejected": len(corpus.rejected),
            "faces": how.faces,
            "counts": _counts(problems),
            "classes": findings.class_table(corpus, published),
            "folds": [_fold_row(fold, corpus) for fold in made],
            "findings": [dataclasses.asdict(f) for f in problems],
        }
        strips = _strips(corpus, facts, problems, how.processes, how.clip_seconds)
        write_text(folder / "audit.json", json.dumps(result, indent=1) + "\n")
        write_text(folder / "audit.html", _page(result, strips))
    _show(result, folder, console)
    return result


def _need_packages(faces: bool) -> None:
    needed = ("av", "pebble", *(("mediapipe",) if faces else ()))
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise AvjaxError(f"opening clips needs {', '.join(missing)}; install with: pip install 'avjax[media]'")


def _landmarker() -> Path:
    from avjax.features import clip as clip_features

    return clip_features.landmarker()


def _folds(corpus: Corpus, kind: str, count: int) -> tuple[list[Fold], str, list[Finding]]:
    """Returns folds, protocol, and a finding if the data do not allow these folds."""
    try:
        return *natural_folds(corpus.clips, corpus.folds, kind, count), []
    except AvjaxError as error:
        return [], "none", [Finding("invalid", "no folds", "", str(error))]


def _problems(
    corpus: Corpus, facts: Mapping[str, clip_facts.Facts], folds: Sequence[Fold], published: Metadata | None
) -> list[Finding]:
    problems = [*findings.of_rejected(corpus.rejected, published), *findings.of_broken(corpus.clips, published)]
    for clip in corpus.clips:
        problems += findings.of_clip(facts[clip.id], corpus.name, apart=clip.audio is not None)
    problems += findings.of_copies(corpus.clips, facts, folds)
    problems += findings.of_folds(corpus, folds)
    problems += findings.of_counts(corpus, published)
    return problems


def _counts(problems: Sequence[Finding]) -> list[dict[str, object]]:
    """Counts the findings of each kind, in their order; each row has the first one as an example."""
    counts, first = Counter((f.severity, f.kind) for f in problems), {}
    for f in problems:
        first.setdefault((f.severity, f.kind), f"{f.clip}: {f.reason}".removeprefix(": "))
    return [{"severity": s, "kind": k, "count": n, "first": first[s, k]} for (s, k), n in counts.items()]


def _fold_row(fold: Fold, corpus: Corpus) -> dict[str, object]:
    """Counts clips and speakers of the parts of a fold; 0 speakers if none is known."""
    clip = {c.id: c for c in corpus.clips}
    trained, tested = (findings.speakers(ids, clip) for ids in ((*fold.train, *fold.val), fold.test))
    parts = {part: len(getattr(fold, part)) for part in ("train", "val", "test")}
    people = {"train_speakers": len(trained), "test_speakers": len(tested), "shared_speakers": len(trained & tested)}
    return {"fold": fold.name} | parts | people


def _strips(
    corpus: Corpus, facts: Mapping[str, clip_facts.Facts], problems: Sequence[Finding], processes: int, seconds: float
) -> list[dict[str, str]]:
    """Returns clip, kind and reason of the worst findings whose clips have frames, and these frames as a data URL."""
    worst: dict[str, Finding] = {}
    shown = Counter()
    for f in problems:
        if f.clip in facts and facts[f.clip].frames and f.clip not in worst and shown[f.kind] < _STRIPS_OF_A_KIND:
            worst[f.clip] = f
            shown[f.kind] += 1
    by_id = {c.id: c for c in corpus.clips}
    jobs = [(by_id[i], facts[i].frames) for i in list(worst)[:MOST_STRIPS]]
    count = processes or os.cpu_count() or 1
    settings = {"count": count, "seconds": seconds, "setup": clip_facts.set_up, "arguments": (None,)}
    made = {clip.id: strip for (clip, _), strip in worker_pool.each(clip_facts.strip, jobs, **settings)}
    return [
        dataclasses.asdict(worst[clip.id])
        | {"url": f"data:image/jpeg;base64,{base64.b64encode(strip).decode('ascii')}"}
        for clip, _ in jobs
        if isinstance(strip := made[clip.id], bytes)
    ]


def _page(result: Mapping[str, object], strips: Sequence[Mapping[str, str]]) -> str:
    rows = {(c["severity"], c["kind"]): [] for c in result["counts"]}
    for finding in result["findings"]:
        rows[finding["severity"], finding["kind"]].append(finding)
    title = registry.title(result["dataset"])
    return page.template("audit.html.j2").render(title=title, rows=rows, most=MOST_ROWS, strips=strips, **result)


def _show(result: Mapping[str, object], folder: Path, console: Console) -> None:
    table = Table("severity", "finding", "number", "the first")
    for row in result["counts"]:
        table.add_row(*(Text(str(row[column])) for column in ("severity", "kind", "count", "first")))
    if result["counts"]:
        console.print(table)
    total = Counter()
    for row in result["counts"]:
        total[row["severity"]] += row["count"]
    totals = ", ".join(f"{total[s]} {s}" for s in findings.SEVERITIES)
    counts = f"{result['clips']} clips, {result['rejected']} rejected"
    console.print(f"{counts}; findings: {totals}; {folder / 'audit.html'}")

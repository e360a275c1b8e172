"""Checks this machine, or a data set, and reports what is wrong and how to fix it.

python -m avjax.doctor [--json]

Checks packages and their versions, devices, disk, codecs, pretrained weights and folders. Downloads nothing.

python -m avjax.doctor data --config configs/etg_folder.py --config.data.root=R [--out DIR] [--workers N] [--no_faces]
    [--lists DIR] [--json]

Opens every clip of a data set and checks its folds and labels under the protocol of the configuration; --lists compares
them with public lists of folds. Writes audit.html and audit.json into DIR, by default audits/<data set>. Run again, it
continues where it stopped; clips that have not changed are not opened again.

python -m avjax.doctor lists DIR [--json]

Checks public lists of folds, without any clip.

Exit status: 1 if something needed is broken or a finding is invalid, 2 for a wrong call, else 0.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from avjax import cli
from avjax import config as configs
from avjax.errors import AvjaxError
from avjax.settings import ProtocolSettings, Settings

if TYPE_CHECKING:
    from rich.table import Table

CONFIG = configs.define_flag()
OUT = flags.DEFINE_string("out", None, "data: folder of audit.html and audit.json; default audits/<data set>.")
WORKERS = flags.DEFINE_integer("workers", 0, "data: worker processes; 0 = one per core.", lower_bound=0)
NO_FACES = flags.DEFINE_bool("no_faces", False, "data: do not look for faces, which takes about half of the time.")
LISTS = flags.DEFINE_string("lists", None, "data: folder of public fold lists to compare the labels with.")
JSON = flags.DEFINE_bool("json", False, "Print the results as JSON.")


def main(argv: list[str]) -> int:
    """Runs the command and returns the exit status."""
    match argv[1:]:
        case []:
            return environment()
        case ["data"]:
            return data()
        case ["lists", folder]:
            return lists(folder)
        case others:
            raise AvjaxError(f"got {' '.join(others)!r}; expected nothing, data, or lists DIR, see --help")


def environment() -> int:
    """Checks this machine; returns 1 if something needed is broken."""
    from avjax.checks import machine as machine_checks

    rows = machine_checks.check()
    _print(machine_checks.as_json(rows), machine_checks.table(rows))
    return int(any(row.state == machine_checks.BROKEN for row in rows))


def data() -> int:
    """Audits the configuration's data set; returns 1 if a finding is invalid."""
    from rich.console import Console

    from avjax.checks import dataset as dataset_checks

    if CONFIG.value is None:
        raise AvjaxError("no --config; expected one such as configs/etg_folder.py, with --config.data.root=R")
    settings = configs.typed(CONFIG.value)
    # A configuration of extraction has no protocol; the default one applies.
    protocol = settings.protocol if isinstance(settings, Settings) else ProtocolSettings()
    options = dataset_checks.Options(
        lists=LISTS.value or "",
        faces=not NO_FACES.value,
        processes=WORKERS.value,
        folds=protocol.folds,
        fold_count=protocol.fold_count,
    )
    console = Console(soft_wrap=True, markup=False, stderr=JSON.value)
    result = dataset_checks.audit(
        settings.dataset, settings.data.root, out=OUT.value or "", options=options, console=console
    )
    if JSON.value:
        print(json.dumps(result, indent=1))
    return int(any(row["severity"] == "invalid" for row in result["counts"]))


def lists(folder: str) -> int:
    """Checks the fold lists in a folder; returns 1 if there is a problem."""
    from avjax.datasets import published_folds

    fold_lists = published_folds.fold_lists(Path(folder))
    problems = published_folds.problems(fold_lists)
    parts = [
        {"fold": part.fold, "part": part.part, "clips": len(part.clips), "labels": _labels(part.clips)}
        for part in fold_lists
    ]
    _print({"parts": parts, "problems": problems}, _lists_table(parts))
    if not JSON.value:
        print("\n".join(f"invalid: {problem}" for problem in problems) or "no problem found")
    return int(bool(problems))


def _labels(clips: Mapping[str, object]) -> dict[str, int]:
    """Returns label → number of clips, sorted by label."""
    return {str(label): count for label, count in sorted(Counter(map(str, clips.values())).items())}


def _lists_table(parts: Sequence[Mapping[str, Any]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    out = Table("fold", "part", "clips", "labels")
    for part in parts:
        labels = ", ".join(f"{label} {count}" for label, count in part["labels"].items())
        out.add_row(*(Text(str(cell)) for cell in (part["fold"] or "–", part["part"], part["clips"], labels)))
    return out


def _print(as_json: dict, table: "Table") -> None:
    from rich.console import Console

    if JSON.value:
        print(json.dumps(as_json, indent=1))
    else:
        Console(markup=False).print(table)


if __name__ == "__main__":
    cli.run(main, takes="data, or lists DIR", needed=False)

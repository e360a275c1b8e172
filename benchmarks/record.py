"""The record of a benchmark: its circumstances, a CSV that keeps other machines' rows, and a table to print."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from avjax.errors import AvjaxError
from avjax.utils.storage import replacing
from avjax.utils.version import VERSION

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, object]

MISSING = "not installed"
_PACKAGES = ("jax", "jaxlib", "flax", "torch")


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def forbid_cached_programs() -> None:
    """Turns the compilation cache off, whatever `JAX_COMPILATION_CACHE_DIR` is: compile times are of a first start."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)


def circumstances() -> dict[str, object]:
    """Returns machine, cores, device, versions and the date."""
    import jax

    return {
        "machine": _cpu_model(),
        "cores": cores(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "avjax": VERSION,
        "date": datetime.date.today().isoformat(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def merge(path: Path, rows: Sequence[Row], key: Sequence[str]) -> None:
    """Writes `rows` into the CSV at `path`, replacing those with the same values of `key`; others stay.

    Args:
      path: the CSV, which may not exist yet.
      rows: at least one, all with the same columns in the same order; floats are written with four digits.
      key: columns that identify a row.

    Raises:
      AvjaxError: the file has other columns.
    """
    columns = list(rows[0])
    new = [{name: _cell(value) for name, value in row.items()} for row in rows]
    written = {tuple(row[k] for k in key) for row in new}
    kept = [row for row in _read(path, columns) if tuple(row[k] for k in key) not in written]
    with replacing(path, "w") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + new)


def _read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != columns:
            raise AvjaxError(
                f"{path} has the columns {', '.join(reader.fieldnames or ['none'])}; expected {', '.join(columns)}; "
                "choose another --out, or move it away"
            )
        return list(reader)


def _cell(value: object, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row], columns: Mapping[str, str], title: str) -> Table:
    """Renders the `columns` (column → heading) of `rows`: text left, numbers right, "–" where a value is missing."""
    from rich.table import Table
    from rich.text import Text

    out = Table(title=Text(title))
    for name, heading in columns.items():
        words = any(row[name] and isinstance(row[name], str) for row in rows)
        out.add_column(heading, justify="left" if words else "right", no_wrap=words)
    for row in rows:
        out.add_row(*(Text(_cell(row[name], 3) or "–") for name in columns))
    return out

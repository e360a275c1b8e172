"""Reads CSV files in UTF-8, separated by commas, semicolons or tabs, completely and strictly."""

import csv
import gzip
import io
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from avjax.errors import AvjaxError

_SEPARATORS = ",;\t"  # spreadsheets of many countries separate by semicolons


def read(
    path: Path,
    columns: Sequence[str] = (),
    *,
    hint: str = "",
    raw: Collection[str] = (),
    name: Callable[[str], str] = str.strip,
    cell: Callable[[str], str] = str.strip,
) -> list[dict[str | None, str]]:
    """Reads the rows of a table with a header, each as column → text.

    A missing cell is ""; the first cell beyond the columns is under None.

    Args:
      path: of the table.
      columns: required columns.
      hint: what the user can do if there is no such file.
      raw: columns, such as file names, that need not be UTF-8: other bytes become lone surrogates.
      name: function of a header cell that returns the name of the column.
      cell: function of the text of a cell that returns its value.

    Raises:
      AvjaxError: there is no such file, it is empty, not UTF-8 or not CSV, or lacks a column.
    """
    (line, header), *rows = _filled(path, hint)
    _check_text(path, line, header)
    names = [name(text) for text in header]
    check_columns(path, names, columns)
    out = []
    for line, cells in rows:
        row = dict.fromkeys(names, "") | dict(zip(names, map(cell, cells), strict=False))
        _check_text(path, line, (text for column, text in row.items() if column not in raw))
        out.append(row | ({None: cells[len(names)]} if len(cells) > len(names) else {}))
    return out


def read_columns(path: Path, header: bool = True) -> dict[str, Sequence[str]]:
    """Reads a table with rows of equal length as column → texts; without a header the columns are "0", "1", ….

    Raises:
      AvjaxError: as `read`, or two columns have the same name, or a row has more or fewer cells.
    """
    rows = _filled(path)
    names = [name.strip() for name in rows.pop(0)[1]] if header else [str(i) for i in range(len(rows[0][1]))]
    _check_text(path, 1, names)
    if len(set(names)) < len(names):
        raise AvjaxError(f"{path}: two columns have one name; set header to False if it has no names")
    for line, cells in rows:
        _check_text(path, line, cells)
        if len(cells) != len(names):
            raise AvjaxError(f"{path}, line {line}: {len(cells)} cells; expected {len(names)}")
    return dict(zip(names, zip(*(cells for _, cells in rows), strict=True) if rows else [()] * len(names), strict=True))


def read_cells(path: Path) -> list[list[str]]:
    """Reads the cells of each line that is not blank; the file may be compressed (`.gz`).

    Raises:
      AvjaxError: as `read`, except for an empty file, which has no lines.
    """
    rows = list(_cells(path))
    for line, cells in rows:
        _check_text(path, line, cells)
    return [cells for _, cells in rows]


def check_columns(path: Path, names: Collection[str], columns: Sequence[str]) -> None:
    """Raises an AvjaxError that names the `columns` that are not among the `names` of a table."""
    if missing := [column for column in columns if column not in names]:
        raise AvjaxError(
            f"{path}: no column {', '.join(missing)}; got {', '.join(names)}; expected {', '.join(columns)}"
        )


def number(text: str) -> float:
    """Converts a text to a number, NaN if it is not one."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _filled(path: Path, hint: str = "") -> list[tuple[int, list[str]]]:
    if not (rows := list(_cells(path, hint))):
        raise AvjaxError(f"{path}: is empty; expected a table")
    return rows


def _cells(path: Path, hint: str = "") -> Iterator[tuple[int, list[str]]]:
    """Yields (number of the last line, cells) of each row that is not blank."""
    if not path.is_file():
        raise AvjaxError(f"{path}: not found; {hint or 'give the path of a table'}")
    with (
        gzip.open(path) if path.suffix == ".gz" else path.open("rb") as content,
        io.TextIOWrapper(content, "utf-8-sig", "surrogateescape") as file,
    ):
        try:
            first = file.readline()
            separator = max(_SEPARATORS, key=first.count)
            reader = csv.reader(itertools.chain([first], file), delimiter=separator, strict=True)
            for row in reader:
                if len(row) > 1 or "".join(row).strip():
                    yield reader.line_num, row
        except csv.Error as error:
            raise AvjaxError(
                f'{path}, line {reader.line_num}: {error}; a cell with a quote in it is written "say ""this"""'
            ) from error
        except (OSError, EOFError) as error:
            raise AvjaxError(f"{path}: cannot be read ({error}); take the file anew") from error


def _check_text(path: Path, line: int, cells: Iterable[str]) -> None:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        raise AvjaxError(f"{path}, line {line}: not UTF-8; save the table as UTF-8") from error

"""Tables with a row per step: CSV and TSV of trackers and of spreadsheets, .xlsx, or a table pasted from a notebook."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from entangle.doctor import names
from entangle.doctor.numbers import has_decimal_comma, number, plain
from entangle.doctor.sources.found import Found, Reader, Row, text_of
from entangle.errors import DataError

Cells = list[list[str]]

_BOUNDS = ("__MIN", "__MAX", "__STD", "__STDERR")
"""What wandb writes beside the mean of a chart's lines."""


def read(files: Sequence[Path]) -> Found:
    """The rows of one table, or of several charts of one run."""
    parts = [_rows(_cells(file), file, _mark(file) == ";") for file in files]
    kind = {".xlsx": "spreadsheet", ".tsv": "TSV"}.get(files[0].suffix, "CSV")
    return Found([row for part in parts for row in part], kind)


def pasted(text: str) -> list[Row]:
    """The rows of the first table in a text that has metrics; none if there is none."""
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if "|" in line or "\t" in line:
            block.append(line)
            continue
        rows = _block(block) if len(block) > 2 else []
        if rows:
            return rows
        block = []
    return []


def chart_of(file: Path) -> tuple[str, str] | None:
    """The run and the step's name of a chart that wandb exported; None for any other file."""
    header = (_cells(file) or [[]])[0]
    runs = {name.rpartition(" - ")[0] for name in header[1:] if not name.endswith(_BOUNDS)}
    return (header[0], runs.pop()) if len(runs) == 1 and "" not in runs else None


def header_of(file: Path) -> list[str]:
    """The first row of a table."""
    return (_cells(file) or [[]])[0]


def _block(block: list[str]) -> list[Row]:
    mark = "|" if "|" in block[0] else "\t"
    cells = [[cell.strip() for cell in line.strip().strip(mark).split(mark)] for line in block]
    cells = [row for row in cells if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    known = {names.metric(name)[0].lower() for name in cells[0]} & {*names.JUDGED, "loss", "rewards/margins"}
    return _rows(_notebook(cells), Path("the text")) if known else []


def _notebook(cells: Cells) -> Cells:
    """A notebook's table: names that it capitalised beside a validation loss are of the evaluation."""
    header = cells[0]
    if not any(name.lower() == "validation loss" for name in header):
        return cells
    sides = ("Rewards", "Logps", "Logits", "Completions")
    return [
        [f"eval_{name[0].lower()}{name[1:]}" if name.startswith(sides) else name for name in header],
        *cells[1:],
    ]


def _cells(file: Path) -> Cells:
    if file.suffix == ".xlsx":
        return _sheet(file)
    text = re.sub(r"\A\s*sep=.*\n", "", text_of(file))  # what spreadsheets write for themselves
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=_mark(file), strict=False)
    return [row for row in rows if any(cell.strip() for cell in row)]


def _mark(file: Path) -> str:
    """What separates a table's cells, by its first line."""
    if file.suffix == ".xlsx":
        return ""
    text = re.sub(r"\A\s*sep=.*\n", "", text_of(file))
    first = next((line for line in text.splitlines() if line.strip()), "")
    bare = re.sub(r'"[^"]*"', "", first)
    return max(",;\t|", key=lambda mark: (bare.count(mark), mark == ","))


def _sheet(file: Path) -> Cells:
    """The first sheet of a workbook.

    Raises:
        DataError: the library that reads it isn't installed.
    """
    import pandas as pd

    try:
        sheet = pd.read_excel(file, header=None, dtype=str, keep_default_na=False)
    except ImportError as error:
        raise DataError(
            f"Reading {file.name} needs openpyxl (pip install openpyxl); or save the sheet as CSV, and give that."
        ) from error
    cells = [[str(cell) for cell in row] for row in sheet.to_numpy().tolist()]
    return [row for row in cells if any(cell.strip() for cell in row)]


def _rows(cells: Cells, file: Path, comma: bool = False) -> list[Row]:
    """A table's rows with their numbers as Python reads them.

    Args:
        cells: all of the table, its names first.
        file: where it is from.
        comma: its decimals are commas, unless a cell says otherwise.
    """
    if not cells:
        return []
    header, below = _header(cells)
    chosen = _columns(header, file)
    decimal_comma = has_decimal_comma((cell for row in below for cell in row), comma)
    rows = [
        {name: plain(row[place], decimal_comma) for name, place in chosen.items() if place < len(row)}
        for row in below
    ]
    return list(_logged(rows))


def _header(cells: Cells) -> tuple[list[str], Cells]:
    """Names of the columns and the rows below; two rows of names (groups over names) are joined."""
    first, rest = cells[0], cells[1:]
    filled = [cell.strip() for cell in first]
    second = [cell.strip() for cell in rest[0]] if rest else []
    is_grouped = (
        len(second) == len(filled)
        and (any(not name or name.startswith("Unnamed") for name in filled) or len(set(filled)) < len(filled))
        and sum(bool(cell) for cell in second) > len(second) / 2
        and not any(number(cell) is not None or re.fullmatch(r"[\d.,\s]+", cell) for cell in second if cell)
    )
    if not is_grouped:
        return filled, rest
    names_, group = [], ""
    for above, name in zip(filled, second, strict=True):
        group = above if above and not above.startswith("Unnamed") else group
        names_.append("/".join(part for part in (group, name) if part) if name else group)
    return names_, rest[1:]


def _columns(header: Sequence[str], file: Path) -> dict[str, int]:
    """Where each metric stands. wandb's charts name `<run> - <metric>`.

    Raises:
        DataError: a metric stands there twice, so the table is of several runs.
    """
    places: dict[str, int] = {}
    for place, column in enumerate(header):
        if not column or column.endswith(_BOUNDS):
            continue
        name = column.rpartition(" - ")[2]
        if name in places:
            raise DataError(
                f"{file} holds {name} of several runs ({header[places[name]]!r}, {column!r}). Export one run at a time."
            )
        places[name] = place
    return places


def _logged(rows: Sequence[dict[str, str]]) -> Iterable[Row]:
    """Rows without the NaN that a table writes for a metric which that row doesn't have.

    A NaN was logged if its row has other metrics of the same set of data; where a table leaves nothing blank, also if
    the metric isn't finite ever after.
    """
    blanks = any(not cell for row in rows for cell in row.values())
    gaps = {} if blanks else _longest_gaps(rows)
    last = {name: place for place, row in enumerate(rows) for name, cell in row.items() if _is_finite(cell)}
    for place, row in enumerate(rows):
        splits = {
            names.metric(name)[1] for name, cell in row.items() if names.is_metric(name) and _is_finite(cell)
        }
        kept = {}
        for name, cell in row.items():
            if not _is_nan(cell):
                kept[name] = cell
                continue
            alone = names.metric(name)[1] not in splits
            spaced = (
                not blanks
                and name in last
                and (place < last[name] or len(rows) - 1 - last[name] <= max(2, 2 * gaps.get(name, 0)))
            )
            if not (alone or spaced):
                kept[name] = cell
        yield kept


def _longest_gaps(rows: Sequence[dict[str, str]]) -> dict[str, int]:
    """The most rows between two finite values of a metric."""
    gaps: dict[str, int] = {}
    before: dict[str, int] = {}
    for place, row in enumerate(rows):
        for name, cell in row.items():
            if _is_finite(cell):
                gaps[name] = max(gaps.get(name, 0), place - before.get(name, place))
                before[name] = place
    return gaps


def _is_nan(cell: str) -> bool:
    return cell.strip().lower() in ("nan", "null", "none", "n/a", "#n/a", "-")


def _is_finite(cell: str) -> bool:
    found = number(cell)
    return found is not None and abs(found) < float("inf")


READER = Reader(lambda file: file.suffix in (".csv", ".tsv", ".xlsx"), read)

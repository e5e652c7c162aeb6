"""Numbers as files write them: also as text, with a decimal comma, with thousands set apart."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
_COMMA = re.compile(r"[+-]?\d{1,3}(\.\d{3})*,\d+([eE][+-]?\d+)?|[+-]?\d*,\d+([eE][+-]?\d+)?")
_POINT = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?|[+-]?\d+[eE][+-]?\d+")
_LARGEST_STEP = 2**53


def number(value: Any) -> float | None:
    """A number, also written as text; None for anything else and for nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def step_number(value: Any) -> int | None:
    """A training step; also `10/250`, as ms-swift writes it. None for what can't be one."""
    value = value.partition("/")[0] if isinstance(value, str) else value
    found = number(value)
    # a NaN compares false to everything
    return int(found) if found is not None and 0 <= found < _LARGEST_STEP else None


def has_decimal_comma(cells: Iterable[str], otherwise: bool = False) -> bool:
    """Whether a table's numbers are written 0,69 rather than 0.69: more of its cells can only be read so.

    Args:
        cells: all of the table.
        otherwise: the answer where no cell says so.
    """
    commas = points = 0
    for cell in cells:
        text = _bare(cell)
        if _COMMA.fullmatch(text) and not _THOUSANDS.fullmatch(text):
            commas += 1
        elif _POINT.fullmatch(text):
            points += 1
    return commas > points if commas or points else otherwise


def plain(cell: str, decimal_comma: bool) -> str:
    """A cell as Python reads numbers; what isn't one comes back as it is."""
    text, percent, _ = _bare(cell).partition("%")
    text = text.strip()
    if decimal_comma and _COMMA.fullmatch(text):
        text = text.replace(".", "").replace(",", ".")
    elif decimal_comma and re.fullmatch(r"[+-]?[1-9]\d{0,2}(\.\d{3})+", text):
        text = text.replace(".", "")
    elif not decimal_comma and _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    found = number(text)
    if found is None:
        return cell.strip()
    return repr(found / 100) if percent else text


def _bare(cell: str) -> str:
    """A cell without the blanks and apostrophes that set thousands apart, and with an ASCII minus."""
    text = cell.strip().strip("'").replace("\u2212", "-")
    return re.sub(r"(?<=\d)[\s\u00a0\u202f'](?=\d{3}(\D|$))", "", text)

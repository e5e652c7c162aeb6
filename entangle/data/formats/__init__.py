"""Formats of preference data that people have: one file each, read as TRL's columns. A file here is taken up."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from entangle.data.formats.base import FORMATS, Format, Row
from entangle.data.formats.refusals import refusal
from entangle.errors import DataError

__all__ = ["FORMATS", "Format", "Row", "choose_format", "sample_of"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def choose_format(name: str, rows: Sequence[Row], source: str) -> Format:
    """The format of this name; `auto`: the one that the rows are of.

    Raises:
        DataError: there is no such format; or the rows are of a kind that can't be read as pairs without being told
            how, with the way to do it.
    """
    if name != "auto":
        if name not in FORMATS:
            raise DataError(f"Unknown format {name!r}. Known: auto, {', '.join(FORMATS)}.")
        return FORMATS[name]
    sample = sample_of(rows)
    tried = sorted(FORMATS.values(), key=lambda form: form.takes_all)
    found = next(form for form in tried if form.is_automatic and form.matches(sample))
    if found.takes_all and (reason := refusal(sample)):
        raise DataError(f"{source} {reason} Its columns are: {', '.join(map(str, sample))}.")
    return found


def sample_of(rows: Sequence[Row], count: int = 20) -> Row:
    """The first value of every column that isn't empty, from the first rows; a column without one holds None."""
    sample: dict[str, object] = {}
    for index in range(min(count, len(rows))):
        for key, value in rows[index].items():
            if sample.get(key) in (None, "", []):
                sample[key] = value
    return sample

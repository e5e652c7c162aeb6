"""What a terminal or a notebook shows: printed rows `{'loss': 0.69, ...}` between other lines, or a table as text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from entangle.doctor import names
from entangle.doctor.sources import lines, tables
from entangle.doctor.sources.found import Found, Reader, Row, text_of
from entangle.errors import DataError

_ROW = re.compile(r"\{\s*['\"][^{}]*\}")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_WORDS = {
    "nan": "NaN",
    "inf": "Infinity",
    "infinity": "Infinity",
    "none": "null",
    "true": "true",
    "false": "false",
}
"""How JSON writes the words that Python prints for values."""

_WORD = re.compile(rf"(?<=[:\s-])({'|'.join(_WORDS)})(?=\s*[,}}])", re.IGNORECASE)


def read(files: Sequence[Path]) -> Found:
    """The rows in one such file.

    Raises:
        DataError: there are none.
    """
    file = files[0]
    text = _COLOURS.sub("", text_of(file))
    rows = [row for found in _ROW.finditer(text) if (row := _row(found[0])) is not None]
    if rows:
        lines.refuse_foreign(rows, {key for row in rows for key in row}, file)
        return Found(rows, "printed rows")
    if re.search(r"\b(actor|critic)/\w+:", text):
        lines.refuse_foreign([{"actor/": 0}], {"actor/"}, file)
    table = tables.pasted(text)
    if table:
        return Found(table, "a table as text")
    raise DataError(
        f"Expected a .json, .jsonl, .csv, .tsv, .xlsx, .db or tensorboard event file, or rows printed by a "
        "trainer; got "
        f"{file}, and found no rows of metrics in it. The run's output_dir has them in checkpoint-*/trainer_state.json."
    )


def _row(text: str) -> Row | None:
    """A printed dict of numbers; None for any other."""
    try:
        row = json.loads(_WORD.sub(lambda word: _WORDS[word[0].lower()], text.replace("'", '"')))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    return (
        row
        if any(names.metric(key)[0] in (*names.JUDGED, "loss", "rewards/margins") for key in row)
        else None
    )


READER = Reader(lambda file: file.suffix in (".log", ".txt", ".out", ".md", ""), read)

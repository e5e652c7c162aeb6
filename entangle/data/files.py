"""Text files as people save them: UTF-8 or refused by the encoding's name, commas or refused by the separator's."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from entangle.errors import DataError

_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def decoded(path: Path) -> str:
    """The text of a file, which has to be in UTF-8.

    Raises:
        DataError: it isn't; with the line, the encoding that it seems to have, and how to convert it.
        OSError: it can't be read.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} isn't {_not_utf8(path, content, line)}") from None


def _not_utf8(path: Path, content: bytes, line: int) -> str:
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "WINDOWS-1252")
    further = ""
    if path.suffix.lower() == ".csv" and (found := separator_of(content.decode(encoding, "replace"))):
        further = f" Its columns are separated by {_SEPARATORS[found]}, not commas, too."
    return (
        f"a readable {path.suffix} file: it isn't in UTF-8 (line {line}), and seems to be in {encoding}.{further} "
        f"Convert it: iconv -f {encoding} -t UTF-8 {path.name} > new{path.suffix}"
        + (
            f" (and the separator, in Python: pd.read_csv(FILE, sep={found!r}, dtype=str).to_csv(FILE, index=False))."
            if further
            else "."
        )
    )


def separator_of(text: str) -> str | None:
    """The separator of a table's heading where it isn't a comma; None where it is, or there is one column."""
    heading = next((line for line in text.splitlines() if line.strip()), "")
    if "," in heading:
        return None
    return next((mark for mark in _SEPARATORS if mark in heading), None)


def read_csv(path: Path, texts: Collection[str]) -> list[Mapping[str, Any]]:
    """Rows of a table with commas; what stands in the columns `texts` is text, letter by letter.

    Raises:
        DataError: another encoding or another separator.
        pandas.errors.ParserError: rows of unlike lengths.
    """
    content = decoded(path)
    if found := separator_of(content):
        raise DataError(
            f"{path} isn't a readable .csv file: its columns are separated by {_SEPARATORS[found]}, not by commas. "
            f"Convert it, in Python: pd.read_csv({path.name!r}, sep={found!r}, dtype=str).to_csv({path.name!r}, "
            "index=False)."
        )
    heading = next(csv.reader(io.StringIO(content)), [])
    types: Any = {name: str for name in heading if name in texts}
    frame = pd.read_csv(io.StringIO(content), dtype=types, keep_default_na=False)
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]

"""Whether the files of a finished run are what the run wrote: checksums.json has the sha256 of each.

config.yaml isn't among them: its options are checked one by one where they are read, and a moved data set may be named
there anew.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from entangle.config.hashing import sha256_of

CHECKSUMS = "checksums.json"

_PATTERNS = ("*.json", "*.parquet", "*/[0-9]*.parquet")
"""Files that a run writes and reads again, its shards included."""


class Damaged(ValueError):
    """A file isn't what it should be: the message says why."""


def checksums_of(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a run by its name in the folder; runs inside the run have their own."""
    files = [file for pattern in _PATTERNS for file in sorted(folder.glob(pattern))]
    own = [file for file in files if file.parent == folder or not (file.parent / "config.yaml").is_file()]
    return {
        file.relative_to(folder).as_posix(): digest(file.read_bytes())
        for file in own
        if file.name != CHECKSUMS
    }


def digest(content: bytes) -> str:
    """The sha256 of a file's content."""
    return sha256_of([content])


def listed_in(folder: Path) -> dict[str, str]:
    """What checksums.json says; empty for a run that isn't finished, or was made without.

    Raises:
        Damaged: it isn't a mapping from names to texts.
    """
    if not (folder / CHECKSUMS).is_file() or not (folder / "summary.json").is_file():
        return {}
    content = parse_json(_read(folder / CHECKSUMS))
    if not all(isinstance(value, str) for value in content.values()):
        raise Damaged("it holds something else than checksums")
    return content


def read_checked(folder: Path, name: str) -> bytes:
    """The content of a file of a run.

    Raises:
        Damaged: it isn't there, can't be read, or isn't what the run wrote.
    """
    content, expected = _read(folder / name), listed_in(folder).get(name)
    if expected is not None and digest(content) != expected:
        raise Damaged("it isn't what the run wrote")
    return content


def parse_json(content: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Damaged: it is something else.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it isn't valid JSON: {error}") from None
    if not isinstance(found, Mapping):
        raise Damaged(f"expected a JSON object; it holds a {type(found).__name__}")
    return dict(found)


def parse_table(content: bytes, columns: list[str] | None = None) -> pd.DataFrame:
    """A table from parquet.

    Raises:
        Damaged: it can't be read, or lacks a column.
    """
    try:
        return pd.read_parquet(io.BytesIO(content), columns=columns)
    except Exception as error:  # whatever the library says of bytes that aren't a table
        raise Damaged(f"it isn't a parquet table: {type(error).__name__}: {str(error)[:200]}") from None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Damaged(
            "it isn't there" if isinstance(error, FileNotFoundError) else str(error.strerror)
        ) from None

"""What a reader makes of a file, and how a file's text is decoded."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """What was read.

    Args:
        rows: metrics by name, with a step, in the order of the file.
        kind: the format, in words.
        notes: what a reader must know of how it was read.
    """

    rows: Sequence[Row]
    kind: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """A kind of file.

    Args:
        takes: whether a file is of this kind, by its name (and, where names don't say, its first line).
        read: what is in such a file, or in several that belong together.
    """

    takes: Callable[[Path], bool]
    read: Callable[[Sequence[Path]], Found]


def text_of(file: Path) -> str:
    """A file's text, in the encoding that its first bytes or its content show: UTF-8, UTF-16, or Windows'."""
    content = file.read_bytes()
    for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if content.startswith(mark):
            return content.decode(encoding)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        if b"\0" in content:
            raise
        return content.decode("cp1252", errors="replace")

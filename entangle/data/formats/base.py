"""What a format of preference data is, and the list of those that are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

Row = Mapping[str, Any]


class Format(ABC):
    """One way in which people write preference pairs down: known by its columns, read as TRL's.

    A subclass stands in a file of its own and is registered once, by `register`.
    """

    name: ClassVar[str]
    """What `--format` calls it."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Columns that it takes texts from, under its own names."""
    reads: ClassVar[str]
    """What is read as what, for people."""
    is_automatic: ClassVar[bool] = True
    """Whether it is taken without being named. One that makes pairs of its own isn't."""
    takes_all: ClassVar[bool] = False
    """Whether every row is of this format: it is tried after all others."""

    @abstractmethod
    def matches(self, sample: Row) -> bool:
        """Whether a row (the first value of every column that isn't empty) is of this format."""

    @abstractmethod
    def convert(self, row: Row, where: str) -> Row:
        """The row under TRL's names: prompt, chosen, rejected, perhaps tools, and further columns.

        Args:
            row: as it was read.
            where: what an error calls the row.

        Raises:
            DataError: it can't be used.
        """

    def expand(self, rows: Sequence[Row]) -> list[tuple[int, Row]] | None:
        """Pairs that are made of several rows or several of one, each with its row's number; None: a row is a pair."""
        return None


FORMATS: dict[str, Format] = {}
"""Every format by its name; they are tried in this order, with those that take every row at the end."""


def register(cls: type[Format]) -> type[Format]:
    """Make a format known; of two that match, the first registered one is taken. Its file here is all that it takes."""
    FORMATS[cls.name] = cls()
    return cls


def rest(row: Row, *used: str) -> dict[str, Any]:
    """The columns that a format doesn't use."""
    return {key: value for key, value in row.items() if key not in used}


def assistant(text: str) -> list[dict[str, str]]:
    """An answer as one message."""
    return [{"role": "assistant", "content": text}]

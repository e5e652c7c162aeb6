"""What a page is made of: sections of blocks, one column of blocks per run. The template draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

NARROW, WIDE = 4.2, 9.2
"""Inches of a figure in half of the page, and over all of it."""


@dataclass(frozen=True)
class Heading:
    """The head of a column: its text, and the key of its definition (empty: none)."""

    text: str
    term: str = ""


@dataclass(frozen=True)
class Table:
    """A small table: the first column names the rows."""

    caption: str
    head: Sequence[Heading]
    rows: Sequence[Sequence[str]]
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Figure:
    """A figure of `entangle.figures`, as it stands on the page and in a file.

    Args:
        name: its file's, without the suffix.
        caption: what it shows.
        alt: the same for those who can't see it, with the main numbers.
        draw: from the width in inches to the drawing.
        width: inches in a file.
        is_wide: whether it takes the page's whole width.
        terms: keys of the definitions it needs.
        table: its numbers.
        live: name of the script's function that draws it on the page, where a reader acts on it.
    """

    name: str
    caption: str
    alt: str
    draw: Callable[[float], Drawing]
    width: float = 7.0
    is_wide: bool = False
    terms: Sequence[str] = ()
    table: Table | None = None
    live: str = ""
    kind: str = field(default="figure", init=False)

    @property
    def page_width(self) -> float:
        """Inches on the page."""
        return WIDE if self.is_wide else NARROW


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str
    is_quiet: bool = False
    kind: str = field(default="prose", init=False)


Block = Table | Figure | Prose


@dataclass(frozen=True)
class Section:
    """A section of the page: per run (by its number) the blocks that stand in that run's column."""

    key: str
    title: str
    lead: str
    columns: Mapping[int, Sequence[Block]]
    terms: Sequence[str] = ()

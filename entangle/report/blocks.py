"""What a page is made of: sections of blocks, one column of blocks per run. The template draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


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
    """A figure that plotly draws.

    Args:
        caption: what it shows.
        alt: the same for those who can't see it, with the main numbers.
        data: plotly's traces. Strings from data must have gone through `plain`.
        layout: plotly's layout, without colours of text and grid: the page's theme sets them.
        height: pixels.
        terms: keys of the definitions it needs.
        table: its numbers.
        live: name of the script's function that draws it from the pairs, instead of `data`.
    """

    caption: str
    alt: str
    data: Sequence[Mapping[str, Any]] = ()
    layout: Mapping[str, Any] = field(default_factory=dict)
    height: int = 360
    terms: Sequence[str] = ()
    table: Table | None = None
    live: str = ""
    kind: str = field(default="figure", init=False)


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


def plain(text: Any) -> str:
    """A string that plotly, which reads some tags, shows as it is."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

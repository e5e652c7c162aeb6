"""The five answers for a terminal of 80 columns: five lines first, then what each rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from entangle.tables.text import visible

WIDTH = 80
"""Columns that are written, at most."""

_NAME = 8
_STYLES = {"yes": "bold red", "no": "green"}


def why_text(found: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> RenderableType:
    """Five lines, the lines to paste, the details of each answer, and what was missing or assumed.

    Args:
        found: answers as plain values: question, verdict, line, details, paste.
        notes: sentences on what was missing, or assumed.
    """
    parts: list[RenderableType] = []
    for answer in found:
        style = _STYLES.get(answer["verdict"], "bold") if answer["question"] == "falling" else "bold"
        line = Text.assemble(
            (f"{answer['question']:<{_NAME}}", "dim"), (visible(answer["line"], None), style)
        )
        parts += [line, *(Text(f"{'':<{_NAME}}{visible(paste, None)}") for paste in answer["paste"])]
    for name, sentences in [*((answer["question"], answer["details"]) for answer in found), ("also", notes)]:
        if sentences:
            parts += [Text(f"\n{name}", "bold"), *map(_paragraph, sentences)]
    return Group(*parts)


def _paragraph(sentence: str) -> Text:
    lines = visible(" ".join(sentence.split()), None)
    return Text(fill(lines, WIDTH, initial_indent="- ", subsequent_indent="  "))

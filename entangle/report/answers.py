"""The five answers on a past run: its verdict, and a section with what each rests on. The words stand in `analysis`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entangle.report.blocks import Block, Prose
from entangle.report.source import Source


def answer_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line per answer, with what is to be pasted."""
    return [
        f"{answer['question'].capitalize()}: {' '.join([answer['line'], '; '.join(answer['paste'])]).rstrip()}"
        for answer in found
    ]


def answer_blocks(source: Source) -> list[Block]:
    """What each answer rests on, and what was missing or assumed."""
    parts = [(answer["question"], answer["details"]) for answer in source.answers]
    if parts:
        parts.append(("also", source.summary["missing"]))
    return [Prose(f"{name.capitalize()}. {' '.join(sentences)}") for name, sentences in parts if sentences]

"""The comparison's table of final numbers, as rows of text and for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.text import Text

from entangle.tables.base import plain_table

COLUMNS: dict[str, tuple[str, float, str]] = {
    "chosen": ("moved_chosen", 1, "+.2f"),
    "rejected": ("moved_rejected", 1, "+.2f"),
    "both fell": ("both_fell", 100, ".0f"),
    "predicted to": ("both_down", 100, ".0f"),
    "drift": ("set_drift", 1, "+.2f"),
    "accuracy": ("accuracy", 100, ".0f"),
    "ROUGE-L": ("rouge_l_greedy", 100, ".1f"),
    "length": ("length_greedy", 1, ".0f"),
}
"""Heads of the columns: the number below, its factor, its format."""

LONGEST = 12
"""Characters of a setting that stand in the table itself; longer ones are numbered and listed above it."""

CAPTION = (
    "Probed pairs (held out, unless probe_trained is given): change of the mean log-probs since the start, nats; "
    "pairs that lost both, pairs predicted to under one step on themselves, pairs whose margin grew, %. Drift: nats by "
    "which both means move per nat of margin, as the set of these pairs foretells; between -1/2 and 1/2 they part. "
    "Greedy summaries: ROUGE-L, %, and tokens."
)


def final_rows(variants: pd.DataFrame, start: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Heads, and one row per loss and setting: the last point of the curves, mean over seeds and half the range.

    Args:
        variants: one row per loss and setting: its last point, over seeds.
        start: quality of the summaries before training.
    """
    columns = COLUMNS | ({"drift": ("set_drift_adamw", 1, "+.2f")} if "set_drift_adamw" in variants else {})
    shown = {title: what for title, what in columns.items() if what[0] in variants}
    rows = [
        [str(row["variant"]), *(_spread(row, *what) for what in shown.values())]
        for row in variants.to_dict("records")
    ]
    if start:
        before = (_plain(start.get(name), scale, form) for name, scale, form in shown.values())
        rows.insert(0, ["(before)", *before])
    return ["", *shown], rows


def comparison_tables(variants: pd.DataFrame, start: Mapping[str, float], seeds: int) -> RenderableType:
    """The final numbers for a terminal.

    Args:
        variants: one row per loss and setting: its last point, over seeds.
        start: quality of the summaries before training.
        seeds: number of seeds.
    """
    title = f"After {int(variants['step'].max())} steps, mean of {seeds} seeds (± half the range)"
    table = plain_table(title, caption=CAPTION, padding=(0, 1, 0, 0))
    heads, rows = final_rows(variants, start)
    for head in heads:  # numbers stay whole
        table.add_column(
            head.replace(" ", "\n"), justify="right" if head else "left", overflow="fold", no_wrap=bool(head)
        )
    if max(len(label) for label, *_ in rows) <= LONGEST:
        for row in rows:
            table.add_row(*map(Text, row))
        return table
    labels = [f"{number:>3}  {label}" for number, (label, *_) in enumerate(rows, 1)]
    for number, (_, *numbers) in enumerate(rows, 1):
        table.add_row(str(number), *map(Text, numbers))
    return Group(Text("\n".join(labels)), "", table)


def _spread(row: Mapping[Any, Any], name: str, scale: float, form: str) -> str:
    """The mean over seeds, and half the range where there is one."""
    if math.isnan(row[name]):
        return ""
    half = scale * (row[f"{name}_high"] - row[f"{name}_low"]) / 2
    return format(scale * row[name], form) + (f"±{half:{form.lstrip('+')}}" if half else "")


def _plain(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else format(scale * value, form)

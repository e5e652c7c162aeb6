"""The comparison's table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text


def comparison_table(variants: pd.DataFrame, start: Mapping[str, float], seeds: int) -> RenderableType:
    """One row per loss and setting: the last point of the curves, mean over seeds and half the range.

    Args:
        variants: rows of `CompareResult.variants`.
        start: quality of the summaries before training.
        seeds: number of seeds.
    """
    title = f"After {int(variants['step'].max())} steps, mean of {seeds} seeds (+- half the range)"
    table = Table(title=title, title_justify="left")
    columns: dict[str, tuple[str, float, str]] = {
        "chosen": ("moved_chosen", 1, "+.2f"), "rejected": ("moved_rejected", 1, "+.2f"),
        "both fell": ("both_fell", 100, ".0f"), "predicted to": ("both_down", 100, ".0f"),
        "accuracy": ("accuracy", 100, ".0f"), "ROUGE-L": ("rouge_l_greedy", 100, ".1f"),
        "length": ("length_greedy", 1, ".0f"),
    }  # fmt: skip
    shown = {title: what for title, what in columns.items() if what[0] in variants}
    table.add_column("", overflow="fold")
    for title in shown:
        table.add_column(title, justify="right")
    if start:
        before = (_plain(start.get(name), scale, form) for name, scale, form in shown.values())
        table.add_row("(before training)", *before)
    for row in variants.to_dict("records"):
        table.add_row(Text(str(row["variant"])), *(_spread(row, *what) for what in shown.values()))
    table.caption = (
        "Held-back pairs: change of the mean log-probs since the start, nats; pairs that lost both, pairs predicted to "
        "under one step on themselves, pairs whose margin grew, %. Greedy summaries: ROUGE-L, %, and tokens."
    )
    return table


def _spread(row: Mapping[Any, Any], name: str, scale: float, form: str) -> str:
    """The mean over seeds, and half the range where there is one."""
    half = scale * (row[f"{name}_high"] - row[f"{name}_low"]) / 2
    return format(scale * row[name], form) + (f" +-{half:{form.lstrip('+')}}" if half else "")


def _plain(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else format(scale * value, form)

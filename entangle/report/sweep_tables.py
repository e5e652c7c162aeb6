"""The sweep's table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.curves import Z
from entangle.report.tables import percent


def sweep_table(points: pd.DataFrame, summary: Mapping[str, Any]) -> RenderableType:
    """One row per checkpoint, and a sentence on the onset.

    Args:
        points: rows of `entangle.curves.curve`.
        summary: the sweep's summary.
    """
    table = Table(title=f"Change since the start, by checkpoint ({summary['loss']})", title_justify="left")
    for column in (
        "step", "pairs", "chosen, nats", "rejected, nats", "both fell, %", "accuracy, %", "cosine",
        "predicted ideal / up / down, %",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    has_adamw = "cosine_adamw" in points
    if has_adamw:
        table.add_column("in AdamW's metric", justify="right")
    for row in points.to_dict("records"):
        table.add_row(
            str(row["step"]), str(row["pairs"]), mean(row, "moved_chosen"), mean(row, "moved_rejected"),
            f"{100 * row['both_fell']:.0f}", f"{100 * row['accuracy']:.0f}", f"{row['cosine']:.2f}", _regimes(row, ""),
            *([_regimes(row, "_adamw")] if has_adamw else []),
        )  # fmt: skip
    table.caption = (
        f"+- {Z} standard errors over pairs; start: {summary['start']}; cosine in the plain (SGD) metric"
    )
    return Group(table, Text(verdict(summary)))


def _regimes(row: Mapping[Any, Any], suffix: str) -> str:
    shares = [row[name + suffix] for name in ("ideal", "both_up", "both_down")]
    return "" if shares[0] != shares[0] else " / ".join(f"{100 * share:.0f}" for share in shares)


def mean(row: Mapping[Any, Any], name: str) -> str:
    """`-1.25 +- 0.31`: a mean and `Z` of its standard errors."""
    return f"{row[name]:+.2f} +- {Z * row[f'{name}_error']:.2f}"


def verdict(summary: Mapping[str, Any]) -> str:
    """When the coupled decrease began, in words."""
    fallen = f"Both log-probs of {percent(summary['fallen_pairs'])} % of the pairs are below their start at the end."
    if summary["onset"] is None:
        return f"No coupled decrease of the means at the last checkpoint. {fallen}"
    return f"Both means are below their start for good from step {summary['onset']} on. {fallen}"

"""Tables of `entangle forecast` for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.analysis.findings import forecast_sentence
from entangle.tables.base import number, plain_table


def forecast_tables(summary: Mapping[str, Any]) -> RenderableType:
    """A row per loss, and how far it may be believed."""
    return Group(ends_table(summary), Text(forecast_sentence(summary)))


def ends_table(summary: Mapping[str, Any]) -> Table:
    """Where both mean log-probs end under each loss."""
    split = "held_out" if summary["held_out"] else "trained"
    count = summary["held_out"] or summary["pairs"]
    table = plain_table(
        f"After {summary['steps']} steps of {summary['batch_size']} pairs: {count} "
        f"{'held-out' if summary['held_out'] else 'trained'} pairs, mean change in nats",
        padding=0,
    )
    table.add_column("loss", overflow="fold")
    for column in (
        "rate",
        "chosen",
        "rejected",
        "margin",
        "both\nfell, %",
        "falls\nat",
        "drift",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for label, row in summary["losses"].items():
        end = row[split]
        falls, drift = end["chosen_falls_at"], row["first_step"]["drift"]
        table.add_row(
            Text(label),
            number(row["learning_rate"], ".2g"),
            *(_with_spread(end[name]) for name in ("chosen", "rejected", "margin")),
            f"{100 * end['both_fell']['mean']:.0f}",
            "-" if falls is None else str(falls),
            number(drift["value"], "+.2g") if drift["has_meaning"] else "?",
        )
    orders = len(summary["seeds"])
    table.caption = (
        f"Means over {orders} orders of the batches, ± half of their range. both fell: % of the pairs. falls at: "
        "the step from which the mean chosen stays below the start. drift: of the set of all pairs, ? where they are "
        "too few."
    )
    return table


def _with_spread(end: Mapping[str, float]) -> str:
    spread = (end["high"] - end["low"]) / 2
    return (
        f"{end['mean']:+.2f} ±{spread:.2f}" if abs(end["mean"]) < 10 else f"{end['mean']:+.1f} ±{spread:.1f}"
    )

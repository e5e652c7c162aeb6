"""A training run's table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.tables.base import plain_table
from entangle.tables.sweep import SET_TITLE, set_caption, set_rows

PROBES = 8
"""Most probes of which the set is shown; of more, as many evenly spread."""


def train_table(
    summary: Mapping[str, Any], log: pd.DataFrame, sets: pd.DataFrame | None = None
) -> RenderableType:
    """What was trained, the held-out pairs at the start and at the end, and the course of the set that was probed.

    Args:
        summary: of the run.
        log: rows of the trainer's log.
        sets: rows of `entangle.analysis.curves.set_row`, by step; None where no set was measured.
    """
    what = summary["loss"] or "cross-entropy of completions"
    mitigated = "".join(
        f", {item if isinstance(item, str) else item['name']}" for item in summary["mitigations"]
    )
    heading = Text(f"{what}{mitigated}: {summary['steps']} steps on {summary['samples']} samples", "bold")
    heading.append(
        f"\n{summary['trained_parameters']:,} parameters trained ({summary['trained']}), "
        f"{summary['seconds']:.0f} s{_losses(log)}\n",
        style="not bold",
    )
    held = summary["held_out"]
    if held is None:
        return Group(heading, "No held-out pairs.")
    table = Table(title=f"Mean log-prob of {held['pairs']} held-out pairs, nats", title_justify="left")
    for column in ("", "start", "end", "change"):
        table.add_column(column, justify="left" if column == "" else "right")
    for side in ("chosen", "rejected"):
        start, end = held[side]["start"], held[side]["end"]
        table.add_row(side, f"{start:.2f}", f"{end:.2f}", f"{end - start:+.2f}")
    table.add_row("margin", "", "", f"{held['margin_change']:+.2f}")
    shares = Text(
        f"Chosen log-prob fell in {held['chosen_fell']:.0%} of them, both fell in {held['both_fell']:.0%}; "
        f"chosen moved up against rejected in {held['accuracy']:.0%}."
    )
    parts: list[RenderableType] = [heading, table, shares]
    for when, regimes in held.get("regimes", {}).items():
        found = ", ".join(f"{share:.0%} {regime}" for regime, share in regimes.items())
        parts.append(Text(f"Predicted of the next step at the {when}: {found}."))
    if sets is not None and "set_drift" in sets:
        parts.append(_course(sets, what))
    return Group(*parts)


def _course(sets: pd.DataFrame, loss: str) -> Table:
    """The set's course, under the preconditioner that the run had at a probe."""
    points = sets.groupby("step", as_index=False).last()
    count = min(PROBES, len(points))
    points = points.iloc[[round(i * (len(points) - 1) / max(count - 1, 1)) for i in range(count)]]
    table = plain_table(SET_TITLE.format(loss=loss), padding=(0, 1, 0, 0))
    heads, rows = set_rows(points)
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    adapted = (
        " From the first step on under Adam's preconditioner." if "adamw" in set(points["metric"]) else ""
    )
    table.caption = set_caption(points) + adapted
    return table


def _losses(log: pd.DataFrame) -> str:
    """First and last logged training loss."""
    losses = log["loss"].dropna() if "loss" in log else pd.Series(dtype=float)
    return f", loss {losses.iloc[0]:.4f} to {losses.iloc[-1]:.4f}" if len(losses) else ""

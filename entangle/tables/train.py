"""A training run's table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def train_table(summary: Mapping[str, Any], log: pd.DataFrame) -> RenderableType:
    """What was trained, and the held-out pairs at the start and at the end."""
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
    return Group(*parts)


def _losses(log: pd.DataFrame) -> str:
    """First and last logged training loss."""
    losses = log["loss"].dropna() if "loss" in log else pd.Series(dtype=float)
    return f", loss {losses.iloc[0]:.4f} to {losses.iloc[-1]:.4f}" if len(losses) else ""

"""How a probe's diagnostics rank its pairs, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from entangle.analysis.wording import is_known
from entangle.tables.base import plain_table

STRONGEST = 8
"""Couples of diagnostics that are shown."""


def correlation_tables(summary: Mapping[str, Any]) -> RenderableType:
    """Diagnostics against the geometry, and the couples of diagnostics that rank pairs most alike."""
    by_couple = {(row["first"], row["second"]): row for row in summary["correlations"]}
    against = plain_table("Rank correlation of diagnostics with the geometry")
    against.add_column("diagnostic", no_wrap=True)
    for name in summary["geometry"]:
        against.add_column(name, justify="right")
    for column in summary["columns"]:
        cells = [_starred(by_couple[column, name]) for name in summary["geometry"]]
        against.add_row(Text(column), *cells)
    against.caption = "* the 95 % interval (in summary.json) excludes 0"
    if summary["loss"] is not None:
        against.caption += f"; change_chosen: predicted change of the chosen log-prob under {summary['loss']}"
    couples = [
        row for couple, row in by_couple.items() if couple[1] in summary["columns"] and is_known(row["rho"])
    ]
    if not couples:
        return against
    alike = plain_table("Diagnostics that rank pairs most alike")
    for name in ("diagnostic", "and", "rank correlation [95 % interval]"):
        alike.add_column(name)
    for row in sorted(couples, key=lambda row: -abs(row["rho"]))[:STRONGEST]:
        alike.add_row(Text(row["first"]), Text(row["second"]), _correlation(row))
    return Group(against, alike)


def _starred(row: Mapping[str, Any]) -> str:
    if not is_known(row["rho"]):
        return "-"
    return f"{row['rho']:+.2f}" + ("*" if row["low"] * row["high"] > 0 else " ")


def _correlation(row: Mapping[str, Any]) -> str:
    return f"{row['rho']:+.2f} [{row['low']:+.2f} {row['high']:+.2f}]"

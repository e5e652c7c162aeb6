"""What a filter takes out of a data set, and why, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from entangle.analysis.regimes import Regime
from entangle.tables.base import percent, plain_table

_SHOWN = (Regime.IDEAL, Regime.BOTH_UP, Regime.BOTH_DOWN)


def filter_tables(summary: Mapping[str, Any]) -> RenderableType:
    """Counts, what each rule matched, and the pairs before and after."""
    line = f"{summary['rows']} rows: {summary['kept']} kept, {summary['dropped']} dropped"
    for name in ("reweighted", "unprobed"):
        line += f", {summary[name]} {name}" if summary[name] else ""
    rules = plain_table("What the rules match")
    for column in ("rule", "pairs", "no other rule does"):
        rules.add_column(column, justify="left" if column == "rule" else "right")
    for text, counts in summary["rules"].items():
        rules.add_row(Text(text), str(counts["matched"]), str(counts["alone"]))
    pairs = plain_table(f"Pairs under {summary['loss']}, % [95 % interval]")
    for column in ("", "scored", "median cosine", *_SHOWN):
        pairs.add_column(column, justify="right" if column else "left")
    for name in ("before", "after"):
        look = summary[name]
        shares = [percent(look["regimes"][regime]) if look["regimes"] else "-" for regime in _SHOWN]
        pairs.add_row(name, str(look["scored"]), f"{look['median_cosine']:.2f}", *shares)
    return Group(Text(line, "bold"), rules, pairs)

"""What a filter takes out of a data set, and why, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from entangle.analysis.regimes import Regime
from entangle.tables.base import percent, plain_table
from entangle.tables.text import visible

_SHOWN = (Regime.IDEAL, Regime.BOTH_UP, Regime.BOTH_DOWN)

_FORMULAS = {
    "say": "{count} texts begin with =, +, - or @: a spreadsheet would run them, so write one for it with --formulas "
    "quote. They are left as they are, for training.",
    "quote": "{count} texts that begin with =, +, - or @ have an apostrophe before them: a spreadsheet shows them.",
}
"""What becomes of texts that a spreadsheet would run."""


def filter_tables(summary: Mapping[str, Any]) -> RenderableType:
    """Counts, what each rule matched, and the pairs before and after."""
    line = f"{summary['rows']} rows: {summary['kept']} kept, {summary['dropped']} dropped"
    for name in ("reweighted", "unprobed"):
        line += f", {summary[name]} {name}" if summary[name] else ""
    rules = plain_table("What the rules match")
    for column in ("rule", "pairs", "no other rule does"):
        rules.add_column(column, justify="left" if column == "rule" else "right")
    for text, counts in summary["rules"].items():
        rules.add_row(Text(visible(text)), str(counts["matched"]), str(counts["alone"]))
    pairs = plain_table(f"Pairs under {summary['loss']}, % [95 % interval]")
    for column in ("", "scored", "median cosine", *_SHOWN):
        pairs.add_column(column, justify="right" if column else "left")
    for name in ("before", "after"):
        look = summary[name]
        shares = [percent(look["regimes"][regime]) if look["regimes"] else "-" for regime in _SHOWN]
        pairs.add_row(name, str(look["scored"]), f"{look['median_cosine']:.2f}", *shares)
    parts = [Text(line, "bold"), rules, pairs]
    if count := summary.get("formulas"):
        parts.append(Text(_FORMULAS[summary["formulas_are"]].format(count=count)))
    return Group(*parts)

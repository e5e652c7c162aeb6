"""The sweep's table for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.text import Text

from entangle.analysis.agreement import drift_sentence
from entangle.analysis.findings import cosine_text, onset_sentence
from entangle.analysis.geometry import SIDES
from entangle.analysis.statistics import Z
from entangle.tables.base import plain_table
from entangle.tables.sets import interval_text


def sweep_tables(points: pd.DataFrame, summary: Mapping[str, Any]) -> RenderableType:
    """One row per checkpoint, and a sentence on the onset.

    Args:
        points: rows of `entangle.analysis.curves.curve`.
        summary: the sweep's summary.
    """
    table = plain_table(f"Change since the start, by checkpoint ({summary['loss']})", padding=(0, 1, 0, 0))
    for column in (
        "step",
        "chosen,\nnats",
        "rejected,\nnats",
        "both\nfell, %",
        "margin\ngrew, %",
        "cosine",
        "predicted\n(SGD), %",
    ):
        table.add_column(column, justify="right")
    has_adamw = "cosine_adamw" in points
    if has_adamw:
        table.add_column("predicted\n(AdamW), %", justify="right")
    for row in points.to_dict("records"):
        table.add_row(
            str(row["step"]),
            mean(row, "moved_chosen"),
            mean(row, "moved_rejected"),
            f"{100 * row['both_fell']:.0f}",
            f"{100 * row['accuracy']:.0f}",
            f"{row['cosine']:.2f}",
            _regimes(row, ""),
            *([_regimes(row, "_adamw")] if has_adamw else []),
        )
    table.caption = (
        f"{span(points['pairs'])} pairs, ± {Z:.2f} standard errors over them; start: {summary['start']}. Predicted for "
        "one step on each pair alone: ideal/both up/both down; cosine in the plain (SGD) metric."
    )
    parts = [table, Text(onset_sentence(summary))]
    if "set_cosine" in points:
        heads, rows = set_rows(points)
        parts.insert(1, below := plain_table(SET_TITLE.format(**summary), padding=(0, 1, 0, 0)))
        for head in heads:
            below.add_column(head, justify="right")
        for row in rows:
            below.add_row(*row)
        below.caption = set_caption(points)
    if summary.get("drift_agreement"):
        parts.append(Text(drift_sentence(summary["drift_agreement"], "checkpoints")))
    return Group(*parts)


SET_TITLE = "All pairs as one, by mean scores ({loss})"


def set_caption(points: pd.DataFrame) -> str:
    """What the table of the set's course shows."""
    others = ""
    if "set_chosen" in points:
        others = (
            " Others: what all other pairs do to the mean log-prob over an epoch of these pairs, nats per learning "
            f"rate / batch size, ± {Z:.2f} standard errors."
        )
    return (
        "Outside the band the mean log-probs move together: both fall if rho is below it. Drift: nats by which both "
        f"move per nat of margin, with its 95 % interval; between -1/2 and 1/2 they part.{others}"
    )


def set_rows(points: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the set's course: cosine of mean scores, its band, drift, and what the others do to the means.

    Args:
        points: rows of a sweep's curve with the set's columns.
    """
    heads = ["step", "cosine", "ideal for rho between", "rho", "drift", "95 % interval"]
    others = SIDES if "set_chosen" in points else ()
    heads += [f"others on {side}" for side in others]
    rows = []
    for row in points.to_dict("records"):
        cells = _set_cells(row) if row["set_rho"] == row["set_rho"] else [""] * 5
        beside = (f"{row[f'set_{side}']:+.0f} ± {Z * row[f'set_{side}_error']:.0f}" for side in others)
        rows.append([str(row["step"]), *cells, *beside])
    return heads, rows


def _set_cells(row: Mapping[Any, Any]) -> list[str]:
    low, high, drift = row["set_low"], row["set_high"], row["set_drift"]
    ends = {"low": row["set_drift_low"], "high": row["set_drift_high"]}
    ends = {name: end if math.isfinite(end) else None for name, end in ends.items()}
    band = f"{low:.3g} and {high:.3g}" if low < high else "none"
    return [
        "" if low != low else cosine_text(row["set_cosine"]),
        "" if low != low else band,
        f"{row['set_rho']:.3g}",
        "" if drift != drift else f"{drift:+.2g}",
        interval_text(ends),
    ]


def _regimes(row: Mapping[Any, Any], suffix: str) -> str:
    shares = [row[name + suffix] for name in ("ideal", "both_up", "both_down")]
    return "" if shares[0] != shares[0] else "/".join(f"{100 * share:.0f}" for share in shares)


def span(numbers: pd.Series) -> str:
    """`32`, or `30 to 32` where they differ."""
    low, high = numbers.min(), numbers.max()
    return f"{low}" if low == high else f"{low} to {high}"


def mean(row: Mapping[Any, Any], name: str) -> str:
    """`-1.25 ±0.31`: a mean and `Z` of its standard errors."""
    return f"{row[name]:+.2f} ±{Z * row[f'{name}_error']:.2f}"

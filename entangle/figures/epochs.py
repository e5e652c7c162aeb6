"""Figure of an epoch: what moves the mean log-probs, loss by loss, all other pairs of the set included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from entangle.analysis.curves import SIDES
from entangle.analysis.statistics import Z
from entangle.figures.style import (
    AMBER,
    BLUE,
    FAINT,
    GREEN,
    INK,
    RED,
    SIDE_COLOURS,
    legend_below,
    names_beside,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {
    "own": ("its own score", GREEN),
    "partner": ("its partner", AMBER),
    "pull": ("other pairs' chosen", BLUE),
    "push": ("other pairs' rejected", RED),
}
"""What acts on a log-prob: in words, and its colour."""


def parts_figure(summary: Mapping[str, Any], width: float = 9.0) -> Figure:
    """Stacked bars of the four parts with the sum and its 95 % interval, both sides; relative to the size of the parts.

    Args:
        summary: of `entangle across`.
        width: inches; the two sides stand below each other where there is little.
    """
    losses, is_narrow = summary["losses"], width < 7
    height = 0.4 + 0.32 * len(losses)
    rows, columns = (2, 1) if is_narrow else (1, 2)
    figure, axes = panels(rows, columns, width, 1.2 + height * rows, sharey=True)
    for each, side in zip(axes, SIDES, strict=True):
        _parts(each, {loss: row[side] for loss, row in losses.items()}, SIDE_COLOURS[side])
        each.set_title(f"{side} log-prob", fontsize=10, loc="left")
    axes[0].invert_yaxis()
    for each in axes[-1:] if is_narrow else axes:
        each.set_xlabel("% of all that acts on it")
    legend_below(figure)
    return figure


def _parts(axes: Axes, rows: Mapping[str, Mapping[str, float]], colour: str) -> None:
    for place, row in enumerate(rows.values()):
        size = sum(abs(row[part]) for part in PARTS) / 100 or 1.0
        ends = {1: 0.0, -1: 0.0}
        for part, (words, shade) in PARTS.items():
            share, sign = row[part] / size, 1 if row[part] > 0 else -1
            axes.barh(place, share, left=ends[sign], color=shade, height=0.62, label=words)
            ends[sign] += share
        axes.errorbar(
            row["change"] / size,
            place,
            xerr=Z * row["error"] / size,
            fmt="D",
            ms=5,
            capsize=3,
            color=INK,
            mfc=colour,
            label="sum, 95 %",
        )
    axes.axvline(0, color=FAINT, lw=0.8)
    axes.set_yticks(range(len(rows)), names_beside(axes, rows))

"""Figure of `entangle across`: what moves the mean log-probs over an epoch, loss by loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entangle.analysis.statistics import Z
from entangle.figures.curves import SIDE_COLOURS, panels, write

PART_COLOURS = {"own": "#2a9d6f", "partner": "#e0a526", "pull": "#5b8fd0", "push": "#b5533c"}
NAMES = {
    "own": "its own score",
    "partner": "its partner",
    "pull": "other pairs' chosen",
    "push": "other pairs' rejected",
}


def parts_figure(summary: Mapping[str, Any], path: Path) -> None:
    """Stacked bars of the four parts with the sum and its 95 % interval, both sides; relative to the size of the parts.

    Args:
        summary: of an `AcrossResult`.
        path: where to; the suffix decides the format.
    """
    losses = list(summary["losses"])
    figure, axes = panels(1, 2, 9.0, 1.4 + 0.32 * len(losses), sharey=True)
    for each, side in zip(axes, ("chosen", "rejected"), strict=True):
        for place, loss in enumerate(losses):
            row = summary["losses"][loss][side]
            whole = sum(abs(row[part]) for part in PART_COLOURS) or 1.0
            ends = {1: 0.0, -1: 0.0}
            for part, colour in PART_COLOURS.items():
                width, sign = row[part] / whole, 1 if row[part] > 0 else -1
                each.barh(place, width, left=ends[sign], color=colour, height=0.62,
                          label=NAMES[part] if place == 0 else None)  # fmt: skip
                ends[sign] += width
            each.errorbar(row["change"] / whole, place, xerr=Z * row["error"] / whole, fmt="D", ms=5, capsize=3,
                          color="black", mfc=SIDE_COLOURS[side], label="sum, 95 %" if place == 0 else None)  # fmt: skip
        each.axvline(0, color="#555555", lw=0.8)
        each.set_title(f"{side} log-prob", fontsize=10, loc="left")
        each.set_xlabel("share of all that acts on it")
        each.set_yticks(range(len(losses)), losses)
    axes[0].invert_yaxis()
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8
    )
    write(figure, path)

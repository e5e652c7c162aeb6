"""Figure of a forecast: both mean log-probs over the steps, loss by loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd

from entangle.figures.style import FAINT, SIDE_COLOURS, legend_below, panels, whole_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def forecast_figure(curves: pd.DataFrame, width: float = 9.0) -> Figure:
    """A panel per loss: means of the held-out pairs (of the trained ones where none is) since the start.

    Args:
        curves: of `entangle forecast`; the line is the mean over seeds, the band its lowest and highest.
        width: inches.
    """
    split = "held_out" if (curves["split"] == "held_out").any() else "trained"
    parts = list(curves[curves["split"] == split].groupby("loss", sort=False))
    columns = min(3, len(parts))
    rows = math.ceil(len(parts) / columns)
    figure, axes = panels(rows, columns, width, 2.6 * rows, sharex=False)
    for each, (label, part) in zip(axes, parts, strict=False):
        _course(each, part)
        each.set_title(str(label), fontsize=10, loc="left")
        each.set_xlabel("optimiser step")
        whole_steps(each)
    for each in axes[len(parts) :]:
        each.set_axis_off()
    axes[0].set_ylabel(f"change of the mean log-prob\nof {split.replace('_', '-')} pairs, nats")
    legend_below(figure)
    return figure


def _course(axes: Axes, part: pd.DataFrame) -> None:
    for side, colour in SIDE_COLOURS.items():
        over_seeds = part.groupby("step")[side].agg(["mean", "min", "max"])
        axes.plot(over_seeds.index, over_seeds["mean"], "-", color=colour, lw=1.6, label=side)
        axes.fill_between(
            over_seeds.index, over_seeds["min"], over_seeds["max"], color=colour, alpha=0.18, lw=0
        )
    axes.axhline(0, color=FAINT, lw=0.8, zorder=0)

"""Figures of a run's course: log-probs of chosen and rejected, predicted regimes, cosine, over steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from entangle.analysis.regimes import REGIMES, Regime
from entangle.analysis.statistics import Z
from entangle.figures.probe import COLOURS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE_COLOURS = {"chosen": "#2b5c8a", "rejected": "#c8382e"}


def panels(
    rows: int, columns: int, width: float, height: float, *, sharex: bool = True, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` x `columns` axes, row by row; sizes in inches."""
    figure = new_axes(width, height).get_figure(root=True)
    assert figure is not None
    figure.clear()
    axes = list(figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).flat)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def change_lines(axes: Axes, points: pd.DataFrame) -> Axes:
    """Mean change of both log-probs since the start, with 95 % bands.

    Args:
        axes: where to draw.
        points: rows of `entangle.analysis.curves.curve`.
    """
    for side, colour in SIDE_COLOURS.items():
        middle, error = points[f"moved_{side}"], Z * points[f"moved_{side}_error"]
        axes.plot(points["step"], middle, "-", color=colour, lw=1.6, marker="o", ms=3, label=side)
        axes.fill_between(points["step"], middle - error, middle + error, color=colour, alpha=0.18, lw=0)
    axes.axhline(0, color="#999999", lw=0.8, zorder=0)
    axes.set_ylabel("change of log-prob, nats")
    return axes


def regime_areas(axes: Axes, points: pd.DataFrame, suffix: str = "") -> Axes:
    """Stacked shares of the predicted regimes over steps; `suffix` chooses the columns of another metric."""
    points = points.dropna(subset=[f"{REGIMES[0]}{suffix}"])
    shown = [regime for regime in REGIMES if (points[f"{regime}{suffix}"] > 0).any()]
    axes.stackplot(
        points["step"], *(100 * points[f"{regime}{suffix}"] for regime in shown), alpha=0.85,
        colors=[COLOURS[regime] for regime in shown], labels=[regime.replace("_", " ") for regime in shown],
    )  # fmt: skip
    axes.set_ylim(0, 100)
    axes.set_ylabel("predicted regime, % of pairs")
    return axes


def cosine_band(axes: Axes, points: pd.DataFrame) -> Axes:
    """Median cosine of the two gradients, with quartiles."""
    axes.plot(points["step"], points["cosine"], "-", color="#333333", lw=1.6, marker="o", ms=3)
    axes.fill_between(
        points["step"], points["cosine_q25"], points["cosine_q75"], color="#333333", alpha=0.15, lw=0
    )
    axes.set_ylabel("cosine, median and quartiles")
    return axes


def set_band(axes: Axes, points: pd.DataFrame) -> Axes:
    """The rho for which the set as one pair is ideal, and the loss's own rho: below the band both means fall."""
    low, high = (points[name].clip(0.1, 10) for name in ("set_low", "set_high"))
    colour = COLOURS[Regime.IDEAL]
    axes.fill_between(
        points["step"], low, high, where=low < high, color=colour, alpha=0.3, lw=0, label="set ideal"
    )
    axes.plot(points["step"], low, "-", color=colour, lw=1.2, marker="o", ms=3)
    axes.plot(points["step"], high, "-", color=colour, lw=1.2, marker="o", ms=3)
    axes.plot(points["step"], points["set_rho"], "--", color="#222222", lw=1.2, label="the loss")
    axes.set_yscale("log")
    axes.set_ylabel("rho = d_w / d_l")
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    return axes


def trajectory(points: pd.DataFrame, onset: int | None = None) -> Figure:
    """Log-probs, regimes and cosine below each other; the onset of the coupled decrease is marked."""
    draws = [change_lines, regime_areas, cosine_band]
    if "cosine_adamw" in points:
        draws.append(lambda axes, points: regime_areas(axes, points, "_adamw"))
    if "set_cosine" in points:
        draws.append(set_band)
    figure, axes = panels(len(draws), 1, 7.0, 2.7 * len(draws))
    for draw, each in zip(draws, axes, strict=True):
        draw(each, points)
        if onset is not None:
            each.axvline(onset, color="#222222", lw=1, ls="--", label=f"onset, step {onset}")
    for each in axes[:2]:
        each.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5)
    if "cosine_adamw" in points:
        axes[3].set_ylabel("predicted in AdamW's metric, %")
    axes[-1].set_xlabel("optimiser step")
    return figure


def write(figure: Figure, path: str | Path) -> None:
    """Write a figure; the suffix decides the format."""
    figure.savefig(path, dpi=130)

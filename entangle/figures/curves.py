"""Figures of a run's course: log-probs of chosen and rejected, predicted regimes, cosine, over steps."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from entangle.analysis.regimes import REGIMES
from entangle.analysis.statistics import Z
from entangle.figures import regimes
from entangle.figures.style import (
    FAINT,
    GREEN,
    INK,
    QUIET,
    SIDE_COLOURS,
    legend_below,
    panels,
    plain_log,
    whole_steps,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    axes.axhline(0, color=FAINT, lw=0.8, zorder=0)
    axes.set_ylabel("change of\nlog-prob, nats")
    return axes


def regime_areas(axes: Axes, points: pd.DataFrame, suffix: str = "") -> Axes:
    """Stacked shares of the predicted regimes over steps; `suffix` chooses the columns of another metric."""
    points = points.dropna(subset=[f"{REGIMES[0]}{suffix}"])
    shares = pd.DataFrame({regime: 100 * points[f"{regime}{suffix}"] for regime in REGIMES})
    regimes.regime_areas(axes, points["step"], shares)
    axes.set_ylabel("predicted,\n% of pairs" if not suffix else "predicted in\nAdamW's metric, %")
    return axes


def cosine_band(axes: Axes, points: pd.DataFrame) -> Axes:
    """Median cosine of the two gradients, with quartiles."""
    axes.plot(points["step"], points["cosine"], "-", color=INK, lw=1.6, marker="o", ms=3)
    axes.fill_between(points["step"], points["cosine_q25"], points["cosine_q75"], color=INK, alpha=0.15, lw=0)
    axes.set_ylabel("cosine, median\nand quartiles")
    return axes


def set_band(axes: Axes, points: pd.DataFrame) -> Axes:
    """The rho for which the set as one pair is ideal, and the loss's own rho: below the band both means fall.

    Dark: inside the band whichever ends of their 95 % intervals its edges are at; light: inside for some of them. An
    empty band is drawn as empty, and one that these pairs don't determine isn't drawn: marks at the bottom say so.
    """
    low, high = points["set_low"], points["set_high"]
    is_known = np.isfinite(points["set_low_high"]) & (points["set_high_low"] > 0)
    is_open = is_known & (low < high)
    for bottom, top, alpha, words in (
        ("set_low_low", "set_high_high", 0.14, "set may be ideal"),
        ("set_low_high", "set_high_low", 0.4, "set ideal, 95 %"),
    ):
        is_there = is_open & (points[bottom] < points[top])
        ends = [points[name].clip(0.1, 10).where(is_there) for name in (bottom, top)]
        if is_there.any():
            axes.fill_between(
                points["step"], *ends, where=is_there, color=GREEN, alpha=alpha, lw=0, label=words
            )
            axes.vlines(points["step"], ends[0], ends[1], color=GREEN, alpha=min(1, 2 * alpha), lw=3)
    for edge in (low, high):
        axes.plot(
            points["step"], edge.clip(0.1, 10).where(is_open), "-", color=GREEN, lw=1.2, marker="o", ms=3
        )
    for mark, steps, words in (
        ("x", points.loc[is_known & ~is_open, "step"], "no rho is ideal"),
        (".", points.loc[~is_known, "step"], "band not known from these pairs"),
    ):
        if len(steps):
            places = np.full(len(steps), 0.04)
            axes.plot(
                steps, places, mark, color=QUIET, ms=5, label=words, transform=axes.get_xaxis_transform()
            )
    axes.plot(points["step"], points["set_rho"], "--", color=INK, lw=1.2, label="rho of the loss")
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    axes.set_ylabel("rho = d_w / d_l")
    return axes


def trajectory(
    points: pd.DataFrame, onset: int | None = None, width: float = 7.0, height: float = 2.7
) -> Figure:
    """Log-probs, regimes and cosine below each other; the onset of the coupled decrease is marked.

    Args:
        points: rows of `entangle.analysis.curves.curve`.
        onset: the step from which on both means stay below their start.
        width: inches.
        height: inches of each panel.
    """
    draws = [change_lines]
    if "ideal" in points:
        draws.append(regime_areas)
    if "cosine" in points:
        draws.append(cosine_band)
    if "cosine_adamw" in points:
        draws.append(partial(regime_areas, suffix="_adamw"))
    if "set_low_high" in points:
        draws.append(set_band)
    figure, axes = panels(len(draws), 1, width, height * len(draws))
    for draw, each in zip(draws, axes, strict=True):
        draw(each, points)
        if onset is not None:
            each.axvline(onset, color=INK, lw=1, ls="--", label=f"onset, step {onset}")
    axes[-1].set_xlabel("optimiser step")
    whole_steps(axes[-1])
    legend_below(figure)
    return figure

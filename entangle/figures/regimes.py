"""Shares of the regimes: bars per loss, areas over something that grows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from entangle.analysis.regimes import REGIMES, Regime
from entangle.analysis.wording import spoken
from entangle.figures.style import HATCHES, INK, REGIME_COLOURS, figure_of, legend_below, names_beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Shares = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Loss -> regime -> share, as in a summary's `regimes`."""


def regime_bars(axes: Axes, shares: Shares) -> Axes:
    """Stacked shares of the regimes, one bar per loss; the line is the 95 % interval of the ideal share.

    Args:
        axes: where to draw.
        shares: loss -> regime -> share.
    """
    losses = list(shares)
    rows = pd.DataFrame([{r: shares[loss][r]["share"] for r in REGIMES} for loss in losses])
    stacked_bars(axes, rows, losses)
    ideal = {
        end: np.array([100 * shares[loss][Regime.IDEAL][end] for loss in losses])
        for end in ("share", "low", "high")
    }
    reach = np.stack([ideal["share"] - ideal["low"], ideal["high"] - ideal["share"]]).clip(min=0)
    places = range(len(losses))
    axes.errorbar(ideal["share"], places, xerr=reach, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    legend_below(figure_of(axes))
    return axes


def stacked_bars(axes: Axes, shares: pd.DataFrame, labels: list[str]) -> None:
    """A bar per row of shares (0 to 1, a column per regime), the first on top, hatched so that they need no colour."""
    left, places = np.zeros(len(shares)), range(len(shares))
    for regime in REGIMES:
        part = 100 * shares[regime].to_numpy(dtype=float)
        if part.any():
            axes.barh(
                places,
                part,
                left=left,
                height=0.75,
                color=REGIME_COLOURS[regime],
                hatch=HATCHES[regime],
                edgecolor="white",
                lw=0,
                label=spoken(regime),
            )
        left += part
    axes.set_yticks(places, names_beside(axes, labels))
    axes.invert_yaxis()
    axes.set_xlim(0, 100.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of pairs, %")


def regime_areas(axes: Axes, places: pd.Series | pd.Index, shares: pd.DataFrame) -> None:
    """Stacked areas of the regimes that occur.

    Args:
        axes: where to draw.
        places: where each row stands, rising.
        shares: one column per regime, %.
    """
    used = [regime for regime in REGIMES if (shares[regime] > 0).any()]
    drawn = axes.stackplot(
        places,
        [shares[regime] for regime in used],
        colors=[REGIME_COLOURS[regime] for regime in used],
        labels=[spoken(regime) for regime in used],
        alpha=0.85,
        lw=0,
    )
    for area, regime in zip(drawn, used, strict=True):
        area.set(hatch=HATCHES[regime], edgecolor="white")
    axes.margins(x=0, y=0)
    axes.set_ylim(0, 100)

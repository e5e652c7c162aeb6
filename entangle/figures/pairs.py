"""Pairs as points: in the plane of norm ratio and cosine, and by what one step does to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from entangle.analysis.regimes import REGIMES, Regime
from entangle.analysis.summary import derived
from entangle.analysis.wording import spoken
from entangle.figures.style import FAINT, INK, MARKERS, REGIME_COLOURS, figure_of, legend_below, safe

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plane(
    axes: Axes,
    pairs: pd.DataFrame,
    regimes: pd.Series,
    ratios: Mapping[str, float],
    whole: Mapping[str, Any] | None = None,
) -> Axes:
    """Every pair in the plane of norm ratio and cosine, with the border of the ideal region of each loss.

    A loss with incentive ratio rho is ideal below the tent cos = exp(-|ln r* - ln rho|) (the band |ln rho - ln r*|
    < -ln cos read the other way round); left of its peak, above it, both rise; right of it both fall.

    Args:
        axes: where to draw.
        pairs: scored rows of a run folder.
        regimes: the regime of each row, in the order of `pairs`.
        ratios: rho by loss label; at most three read well.
        whole: the set's block, as in a summary's `set`: it gets a mark of its own, with its intervals.
    """
    points = derived(pairs).assign(regime=regimes.to_numpy(), log_ratio=lambda d: np.log(d["norm_ratio"]))
    _scatter(axes, points, "log_ratio", "cosine")
    known = points["log_ratio"].abs().replace(np.inf, np.nan).max()  # a zero score has no place here
    reach = max(1.0, 1.08 * float(known)) if known == known else 1.0
    grid = np.sort(
        np.append(np.linspace(-reach, reach, 400), np.log(list(ratios.values())))
    )  # peaks included
    for (loss, rho), style in zip(ratios.items(), ("-", "--", ":"), strict=False):
        label = f"border of ideal, {safe(loss)} (rho = {rho:.3g})"
        axes.plot(grid, np.exp(-np.abs(grid - np.log(rho))), style, color=INK, lw=1.2, label=label)
    ticks = np.array([0.125, 0.25, 0.5, 1, 2, 4, 8, 16])
    ticks = ticks[np.abs(np.log(ticks)) <= reach]
    axes.set_xticks(np.log(ticks), [f"{tick:g}" for tick in ticks])
    axes.set_xlim(-reach, reach)
    lowest = min(-0.1, float(points["cosine"].min()) - 0.05)
    angle = (lambda cosine: -np.arccos(np.clip(cosine, -1, 1)), lambda angle: np.cos(angle))
    axes.set_yscale("function", functions=angle)  # near 1, where entangled pairs are, cosines crowd
    axes.set_ylim(lowest, 1.0)
    ticks = np.array([1, 0.99, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0, -0.25, -0.5, -0.75])
    axes.set_yticks(ticks[ticks >= lowest], [f"{tick:g}" for tick in ticks[ticks >= lowest]])
    axes.axhline(0, color=FAINT, lw=0.8, zorder=0)
    if whole is not None and (spread := set_spread(whole)) is not None:
        _set_mark(axes, *spread, whole)
    axes.set_xlabel("norm ratio  |rejected gradient| / |chosen gradient|")
    axes.set_ylabel("cosine of the two gradients")
    legend_below(figure_of(axes))
    return axes


def set_spread(whole: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    """Norm ratio and cosine of the mean scores, each as (value, low, high); None where an interval has no end.

    Args:
        whole: the set's block, as in a summary's `set`.
    """
    found = [[whole[name][key] for key in ("value", "low", "high")] for name in ("norm_ratio", "cosine")]
    if any(value is None for row in found for value in row) or not min(found[0]) > 0:
        return None
    return found[0], found[1]


def _set_mark(axes: Axes, ratio: list[float], cosine: list[float], whole: Mapping[str, Any]) -> None:
    """A diamond with both intervals; hollow where the mean scores may as well be parallel."""
    x, y = np.log(ratio), np.clip(cosine, axes.get_ylim()[0], 1.0)
    axes.plot(x[1:], [y[0]] * 2, "-", color=INK, lw=1.6)
    axes.plot([x[0]] * 2, y[1:], "-", color=INK, lw=1.6)
    inside = "none" if whole["may_be_parallel"] else INK
    label = f"the set of {whole['pairs']} pairs, with 95 % intervals"
    axes.plot(x[:1], y[:1], "D", color=INK, mfc=inside, ms=8, mew=1.6, label=label, zorder=5)


def changes(axes: Axes, judged: pd.DataFrame) -> Axes:
    """Every pair's two predicted changes; the quadrants are the regimes. Both axes bend (asinh) around zero.

    Args:
        axes: where to draw.
        judged: rows with change_chosen, change_rejected and regime, of one loss.
    """
    columns = ["change_chosen", "change_rejected"]
    sizes = judged[columns].abs().to_numpy()
    unit = float(np.quantile(sizes[sizes > 0], 0.2)) if (sizes > 0).any() else 1.0
    _scatter(axes, judged, *columns)
    axes.set_xscale("asinh", linear_width=unit)
    axes.set_yscale("asinh", linear_width=unit)
    powers = np.arange(np.ceil(np.log10(unit)), np.log10(sizes.max(initial=unit)) + 1e-9)
    powers = powers[:: -(-len(powers) // 3) or 1]
    ticks = [*-(10 ** powers[::-1]), 0, *10**powers]
    labels = [*(f"$-10^{{{p:.0f}}}$" for p in powers[::-1]), "0", *(f"$10^{{{p:.0f}}}$" for p in powers)]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, labels)
    axes.minorticks_off()
    axes.axhline(0, color=FAINT, lw=0.8, zorder=0)
    axes.axvline(0, color=FAINT, lw=0.8, zorder=0)
    axes.set_xlabel("change of the chosen log-prob, nats per unit learning rate")
    axes.set_ylabel("change of the rejected log-prob")
    legend_below(figure_of(axes))
    return axes


def _scatter(axes: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    """A point per row, by regime."""
    for regime in REGIMES:
        part = rows[rows["regime"] == regime]
        if len(part):
            axes.scatter(
                part[x],
                part[y],
                s=16,
                c=REGIME_COLOURS[regime],
                marker=MARKERS[regime],
                alpha=0.75,
                linewidths=0.6 if regime is Regime.DEGENERATE else 0,
                label=f"{spoken(regime)} ({len(part)})",
            )

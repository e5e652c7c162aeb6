"""Figures of prompts by two signals: what their pair and what their rewards have to teach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from entangle.analysis.findings import SIGNALS
from entangle.analysis.regimes import Regime
from entangle.analysis.wording import spoken
from entangle.figures.style import (
    AMBER,
    BLUE,
    GREEN,
    MARKERS,
    QUIET,
    RED,
    REGIME_COLOURS,
    figure_of,
    legend_below,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIGNAL_COLOURS = {"both": GREEN, "dpo_only": BLUE, "rft_only": AMBER, "neither": RED}


def quadrants(axes: Axes, prompts: pd.DataFrame, summary: Mapping[str, Any]) -> Axes:
    """Every prompt by what its pair and its rewards have to teach: right the pair, up the rewards, lower left neither.

    Across, the pair's effect: incentive over the one at the start of training, times the smaller of the cosines
    between the step and the two directions that it is meant to go (chosen up, rejected down). Left of 0 one
    log-prob moves the wrong way, near 0 there is hardly a step. Up, the std of the reward over the half-range.

    Args:
        axes: where to draw.
        prompts: measured rows of prompts.parquet.
        summary: the run's aggregates.
    """
    for name, colour in SIGNAL_COLOURS.items():
        rows = prompts[prompts["verdict"] == name]
        if len(rows):
            label = f"{SIGNALS[name]} ({len(rows)})"
            axes.scatter(
                rows["pair_effect"], rows["rft_signal"], s=18, c=colour, alpha=0.75, linewidths=0, label=label
            )
    axes.axvline(0, color=QUIET, lw=0.8, ls=":")
    axes.axhline(summary["thresholds"]["rft_signal"], color=QUIET, lw=0.8, ls=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"effect of a {summary['loss']} step on the prompt's pair")
    axes.set_ylabel("std of the reward / half-range")
    legend_below(figure_of(axes))
    return axes


def entanglement(axes: Axes, prompts: pd.DataFrame, summary: Mapping[str, Any]) -> Axes:
    """Every prompt's pair cosine against the std of its answers' reward: are entangled pairs the low-std prompts?

    Args:
        axes: where to draw.
        prompts: measured rows of prompts.parquet.
        summary: the run's aggregates.
    """
    for regime in Regime:
        rows = prompts[prompts["pair_regime"] == regime]
        if len(rows):
            label = f"{spoken(regime)} ({len(rows)})"
            axes.scatter(
                rows["pair_cosine"],
                rows["reward_std"],
                s=18,
                c=REGIME_COLOURS[regime],
                marker=MARKERS[regime],
                alpha=0.75,
                linewidths=0.6 if regime is Regime.DEGENERATE else 0,
                label=label,
            )
    rho = summary["rank_correlations"]["cosine_and_std"]
    if rho["rho"] is not None and rho["rho"] == rho["rho"]:
        found = f"rank correlation {rho['rho']:.2f} [{rho['low']:.2f}, {rho['high']:.2f}]"
        axes.set_title(found, fontsize=9)
    axes.axhline(summary["thresholds"]["std"], color=QUIET, lw=0.8, ls=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("cosine of the pair's two gradients")
    axes.set_ylabel("standard deviation of the reward within the prompt")
    legend_below(figure_of(axes))
    return axes

"""Figures of an `entangle joint` run, as functions that draw on a matplotlib axes. Needs entangle[plots]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from entangle.analysis.regimes import Regime
from entangle.figures.probe import COLOURS, MARKERS
from entangle.tables.joint import VERDICTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VERDICT_COLOURS = {"both": "#2a9d6f", "dpo_only": "#2b6cb0", "rft_only": "#e0a526", "neither": "#c8382e"}
LINE = "#333333"


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
    for name, colour in VERDICT_COLOURS.items():
        rows = prompts[prompts["verdict"] == name]
        if len(rows):
            label = f"{VERDICTS[name]} ({len(rows)})"
            axes.scatter(
                rows["pair_effect"], rows["rft_signal"], s=18, c=colour, alpha=0.75, linewidths=0, label=label
            )
    axes.axvline(0, color=LINE, lw=0.8, ls=":")
    axes.axhline(summary["thresholds"]["rft_signal"], color=LINE, lw=0.8, ls=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"effect of a {summary['loss']} step on the prompt's pair")
    axes.set_ylabel("std of the reward / half-range")
    _legend(axes)
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
            label = f"{regime.replace('_', ' ')} ({len(rows)})"
            axes.scatter(
                rows["pair_cosine"], rows["reward_std"], s=18, c=COLOURS[regime], marker=MARKERS[regime], alpha=0.75,
                linewidths=0.6 if regime is Regime.DEGENERATE else 0, label=label,
            )  # fmt: skip
    rho = summary["rank_correlations"]["cosine_and_std"]
    if rho["rho"] is not None and rho["rho"] == rho["rho"]:
        found = f"rank correlation {rho['rho']:.2f} [{rho['low']:.2f}, {rho['high']:.2f}]"
        axes.set_title(found, fontsize=9)
    axes.axhline(summary["thresholds"]["std"], color=LINE, lw=0.8, ls=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("cosine of the pair's two gradients")
    axes.set_ylabel("standard deviation of the reward within the prompt")
    _legend(axes)
    return axes


def _legend(axes: Axes) -> None:
    figure = axes.get_figure(root=True)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)  # pyright: ignore[reportOptionalMemberAccess]

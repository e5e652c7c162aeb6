"""Figures of rewards: their spread over a prompt's answers, and the gradient that it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from entangle.figures.style import BLUE, GREY, INK, QUIET, RED, figure_of, legend_below, plain_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def scatter(axes: Axes, prompts: pd.DataFrame, summary: Mapping[str, Any]) -> Axes:
    """Every prompt's reward std against the norm of its expected reward gradient, with the bounds.

    Grey: the gradient isn't above two standard errors, so its place is noise; estimates of the squared norm that aren't
    above 0 can't be drawn, and count in the pooled points alone. Lines: std x sqrt(tr F) with the median trace, and the
    paper's form where gamma was estimated.

    Args:
        axes: where to draw.
        prompts: measured rows of prompts.parquet.
        summary: the run's aggregates.
    """
    rows = prompts[prompts["grad_norm"].notna() & (prompts["reward_std"] > 0) & (prompts["grad_norm"] > 0)]
    certain = rows["grad_sq"] > 2 * rows["grad_sq_error"]
    for chosen, colour, label in (
        (certain, BLUE, "above two errors"),
        (~certain, GREY, "within two errors of 0"),
    ):
        if chosen.any():
            axes.scatter(
                rows.loc[chosen, "reward_std"],
                rows.loc[chosen, "grad_norm"],
                s=18,
                c=colour,
                alpha=0.75,
                linewidths=0,
                label=f"{label} ({int(chosen.sum())})",
            )
    _pooled(axes, prompts)
    if len(rows):
        ends = rows["reward_std"].min() / 1.3, rows["reward_std"].max() * 1.3
        grid = np.geomspace(*ends, 100)
        trace = float(np.sqrt(rows["score_trace"].median()))
        axes.plot(
            grid,
            trace * grid,
            "-",
            color=INK,
            lw=1.2,
            label="std x sqrt(tr F), median trace",
        )
        gamma, half = (
            summary["setting"]["gamma"],
            (summary["setting"]["high"] or 0) - (summary["setting"]["low"] or 0),
        )
        if gamma is not None and gamma == gamma and half == half and half > 0:
            paper = 6 * summary["setting"]["max_length"] * gamma * (half / 2) ** (1 / 3) * grid ** (2 / 3)
            axes.plot(
                grid, paper, "--", color=INK, lw=1.2, label="the paper's form, gamma estimated from below"
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_log(axes.xaxis)
        plain_log(axes.yaxis)
    left_out = len(prompts) - len(rows)
    if left_out:
        words = f"{left_out} of {len(prompts)} prompts not drawn alone: std or estimate not above 0"
        axes.set_title(fill(words, int(figure_of(axes).get_figwidth() / 0.085)), fontsize=9)
    axes.set_xlabel("standard deviation of the reward within a prompt")
    axes.set_ylabel("norm of the expected reward gradient")
    legend_below(figure_of(axes))
    return axes


def _pooled(axes: Axes, prompts: pd.DataFrame, groups: int = 4) -> None:
    """Root of the mean squared norm of groups of prompts by std, +- 2 errors: the mean counts estimates below 0 too."""
    known = prompts[prompts["grad_sq"].notna() & (prompts["reward_std"] > 0)]
    label = "root mean square of a quarter of the prompts, two errors"
    for part in np.array_split(np.argsort(known["reward_std"].to_numpy()), groups):
        squares = known["grad_sq"].to_numpy()[part]
        if len(squares) < 2 or squares.mean() <= 0:
            continue
        mean, error = float(squares.mean()), 2 * float(squares.std(ddof=1)) / len(squares) ** 0.5
        low, high = np.sqrt(max(mean - error, 0.0)), np.sqrt(mean + error)
        middle, value = known["reward_std"].to_numpy()[part].mean(), np.sqrt(mean)
        axes.errorbar(
            [middle],
            [value],
            [[value - low], [high - value]],
            fmt="D",
            color=RED,
            ms=5,
            capsize=3,
            label=label,
        )
        label = None


def reward_map(axes: Axes, prompts: pd.DataFrame, summary: Mapping[str, Any]) -> Axes:
    """Every prompt's mean reward against its std: low and flat is the harmful corner.

    Args:
        axes: where to draw.
        prompts: measured rows of prompts.parquet.
        summary: the run's aggregates.
    """
    limits = summary["thresholds"]
    harmful = (prompts["reward_std"] < limits["std"]) & (prompts["reward_mean"] < limits["mean"])
    for chosen, colour, label in ((harmful, RED, "small std, low mean"), (~harmful, BLUE, "others")):
        if chosen.any():
            axes.scatter(
                prompts.loc[chosen, "reward_mean"],
                prompts.loc[chosen, "reward_std"],
                s=18,
                c=colour,
                alpha=0.7,
                linewidths=0,
                label=f"{label} ({int(chosen.sum())})",
            )
    axes.axhline(limits["std"], color=QUIET, lw=0.8, ls=":")
    axes.axvline(limits["mean"], color=QUIET, lw=0.8, ls=":")
    axes.set_xlabel("mean reward of a prompt's answers")
    axes.set_ylabel("standard deviation of the reward")
    legend_below(figure_of(axes))
    return axes


def change(axes: Axes, changes: pd.DataFrame, summary: Mapping[str, Any]) -> Axes:
    """Every prompt's initial reward std against the change of its mean reward; groups of one size with intervals.

    Args:
        axes: where to draw.
        changes: rows of changes.parquet.
        summary: their aggregates.
    """
    axes.axhline(0, color=QUIET, lw=0.8)
    axes.scatter(
        changes["reward_std_before"],
        changes["change"],
        s=14,
        c=GREY,
        alpha=0.6,
        linewidths=0,
        label=f"prompts ({len(changes)}); error of one about {summary['typical_error']:.2g}",
    )
    for number, group in enumerate(summary["groups"]):
        middle, value = (group["std_low"] + group["std_high"]) / 2, group["change"]
        errors = [[value - group["low"]], [group["high"] - value]]
        label = "mean by initial std, 95 % interval" if number == 0 else None
        axes.errorbar([middle], [value], errors, fmt="o", color=BLUE, ms=5, capsize=3, label=label)
    axes.set_xlabel("standard deviation of the reward before")
    axes.set_ylabel("change of the mean reward")
    legend_below(figure_of(axes))
    return axes

"""Figures of a run's ledger: what each cause has contributed to a log-prob so far, stacked over training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from entangle.analysis.ledger import MEANINGS, PARTS, cumulate, over_time
from entangle.figures.style import CAUSE_COLOURS, INK, figure_of, legend_below, new_axes, save, whole_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_figures(ledger: pd.DataFrame, folder: Path) -> list[str]:
    """Write the figures as PNG: both sides, means over pairs, and the pair whose chosen log-prob fell most.

    Returns:
        The file names.

    Raises:
        UserError: matplotlib isn't installed.
    """
    written = []
    for side in ("chosen", "rejected"):
        save(stacked(new_axes(8, 4.6), ledger, side), folder / f"ledger-{side}.png")
        written.append(f"ledger-{side}.png")
    sums = cumulate(ledger)
    chosen = sums[sums["side"] == "chosen"]
    worst = int(chosen["index"].iloc[chosen["measured"].to_numpy().argmin()])
    save(stacked(new_axes(8, 4.6), ledger[ledger["index"] == worst], "chosen"), folder / "ledger-pair.png")
    return [*written, "ledger-pair.png"]


def running_sums(ledger: pd.DataFrame, side: str) -> tuple[pd.DataFrame, list[str]]:
    """`over_time` from 0 before the first step on, and the causes that ever come to a hundredth of the largest one."""
    sums = over_time(ledger, side)
    sums.loc[sums.index.min() - 1] = 0.0
    sums = sums.sort_index()
    size = sums[list(PARTS)].abs().max()
    return sums, [part for part in PARTS if size[part] >= 0.01 * size.max()]


def stacked(axes: Axes, ledger: pd.DataFrame, side: str) -> Axes:
    """Running sums of the causes: those that have raised the log-prob above zero, those that lowered it below.

    The black line is the measured change, which is the height above zero minus the depth below it. Causes that never
    come to a hundredth of the largest one are left out.

    Args:
        axes: where to draw.
        ledger: rows of a run; those of one pair for that pair's own figure.
        side: `chosen` or `rejected`.
    """
    sums, used = running_sums(ledger, side)
    steps, heights = sums.index.to_numpy(), sums[used].to_numpy().T
    colours = [CAUSE_COLOURS[part] for part in used]
    axes.stackplot(
        steps,
        np.clip(heights, 0, None),
        colors=colours,
        labels=[MEANINGS[part] for part in used],
        lw=0,
        alpha=0.85,
    )
    axes.stackplot(steps, np.clip(heights, None, 0), colors=colours, lw=0, alpha=0.85)
    axes.plot(steps, sums["measured"], color=INK, lw=1.8, label="measured change")
    axes.axhline(0, color=INK, lw=0.6)
    axes.set_xlim(steps[0], steps[-1])
    axes.set_xlabel("optimiser step")
    whole_steps(axes)
    axes.set_ylabel("nats since the start")
    pairs = ledger["index"].unique()
    who = f"pair {pairs[0]}" if len(pairs) == 1 else f"mean over {len(pairs)} pairs"
    axes.set_title(f"{side} log-prob, {who}", loc="left", fontsize=10)
    legend_below(figure_of(axes))
    return axes

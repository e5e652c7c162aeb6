"""Figures of a comparison: curves per variant over seeds, final numbers, and the check of the condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from entangle.analysis.curves import over_seeds
from entangle.analysis.ledger import MEANINGS, PARTS
from entangle.figures.curves import regime_areas
from entangle.figures.style import (
    BLUE,
    CAUSE_COLOURS,
    FAINT,
    INK,
    QUIET,
    SIDE_COLOURS,
    SMALL,
    VIOLET,
    legend_below,
    names_beside,
    panels,
    safe,
    save,
    whole_steps,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 3.0
"""Inches that a panel needs at least to be read."""

FINAL = {
    "moved_chosen": ("chosen, nats", 1),
    "moved_rejected": ("rejected, nats", 1),
    "accuracy": ("accuracy, %", 100),
    "rouge_l_greedy": ("ROUGE-L, %", 100),
    "length_greedy": ("length, tokens", 1),
}
"""Columns of the figure of final numbers: what they show, and the factor."""


def write_figures(
    curves: pd.DataFrame,
    variants: pd.DataFrame,
    start: Mapping[str, float],
    agreement: pd.DataFrame,
    ledger: pd.DataFrame,
    folder: Path,
) -> None:
    """Write every figure of a comparison as PNG.

    Args:
        curves: one row per run and probe.
        variants: one row per loss and setting: its last point, over seeds.
        start: quality of the summaries before training.
        agreement: how often the predicted direction was the measured one, per variant and side; may be empty.
        ledger: one row per run and side: what the mean change came from; may be empty.
        folder: where they go.

    Raises:
        UserError: matplotlib isn't installed.
    """
    bands = over_seeds(curves)
    save(per_variant(bands, side_bands), folder / "logps.png")
    save(per_variant(bands, margin_and_accuracy), folder / "margin.png")
    if bands["ideal"].notna().any():
        save(per_variant(bands, regime_areas), folder / "regimes.png")
    save(final_dots(variants, start), folder / "final.png")
    if len(agreement):
        save(agreement_dots(agreement), folder / "agreement.png")
    if len(ledger):
        save(ledger_bars(ledger), folder / "ledger.png")


def per_variant(
    bands: pd.DataFrame, draw: Callable[[Axes, pd.DataFrame], Axes], width: float = 12.0
) -> Figure:
    """One panel per variant on shared axes, as many side by side as have room.

    Args:
        bands: rows of `entangle.analysis.curves.over_seeds`.
        draw: draws a variant's rows.
        width: inches that the figure may have.
    """
    groups = list(bands.groupby("variant", sort=False))
    columns = max(1, min(int(width / PANEL), len(groups)))
    rows = -(-len(groups) // columns)
    figure, axes = panels(rows, columns, min(width, 4.4 * columns), 2.2 * rows + 0.5, sharey=True)
    for number, (each, (variant, own)) in enumerate(zip(axes, groups, strict=False)):
        draw(each, own)
        each.set_title(safe(variant, 40), fontsize=9, loc="left")
        if number % columns:
            each.set_ylabel("")
    for each in axes[len(groups) :]:
        each.set_visible(False)
    for each in axes[max(0, len(groups) - columns) : len(groups)]:  # the lowest of each column
        each.set_xlabel("optimiser step", fontsize=9)
        each.tick_params(labelbottom=True)
        whole_steps(each)
    legend_below(figure, axes[: len(groups)])
    return figure


def side_bands(axes: Axes, own: pd.DataFrame) -> Axes:
    """Mean change of both log-probs over seeds, with the range over seeds."""
    for side, colour in SIDE_COLOURS.items():
        name = f"moved_{side}"
        axes.plot(own["step"], own[name], "-", color=colour, lw=1.6, label=side)
        axes.fill_between(own["step"], own[f"{name}_low"], own[f"{name}_high"], color=colour, alpha=0.2, lw=0)
    axes.axhline(0, color=QUIET, lw=0.8, zorder=0)
    axes.set_ylabel("change, nats", fontsize=9)
    return axes


def margin_and_accuracy(axes: Axes, own: pd.DataFrame) -> Axes:
    """Growth of the margin (nats, left) and accuracy (right, dashed), mean and range over seeds."""
    axes.plot(own["step"], own["moved_margin"], "-", color=INK, lw=1.6)
    axes.fill_between(
        own["step"], own["moved_margin_low"], own["moved_margin_high"], color=INK, alpha=0.2, lw=0
    )
    axes.set_ylabel("margin, nats", fontsize=9)
    right = axes.twinx()
    later = own[own["step"] > own["step"].min()]  # at the start nothing has moved yet
    right.plot(later["step"], 100 * later["accuracy"], "--", color=VIOLET, lw=1.2)
    right.set_ylim(0, 100)
    right.set_ylabel("accuracy, %", fontsize=8, color=VIOLET)
    right.tick_params(labelsize=7, colors=VIOLET)
    right.spines[["top"]].set_visible(False)
    return axes


def final_dots(variants: pd.DataFrame, start: Mapping[str, float], width: float = 12.5) -> Figure:
    """The last point of every variant, mean and range over seeds; the dashed line is the policy before training.

    Args:
        variants: one row per loss and setting: its last point, over seeds.
        start: quality of the summaries before training.
        width: inches that the figure may have.
    """
    shown = {name: what for name, what in FINAL.items() if name in variants}
    labels = [safe(name, int(0.4 * width / 0.075)) for name in variants["variant"]]
    beside = 0.07 * max(map(len, labels)) + 0.3
    columns = max(1, min(int((width - beside) / 1.6), len(shown)))
    rows = -(-len(shown) // columns)
    height = rows * (0.3 * len(variants) + 0.9)
    figure, axes = panels(
        rows, columns, min(width, beside + 2.2 * columns), height, sharex=False, sharey=True
    )
    places = range(len(variants), 0, -1)
    for each, (name, (title, scale)) in zip(axes, shown.items(), strict=False):
        middle = scale * variants[name]
        spread = [middle - scale * variants[f"{name}_low"], scale * variants[f"{name}_high"] - middle]
        each.errorbar(middle, places, xerr=spread, fmt="o", ms=4, color=BLUE, elinewidth=1.4)
        before = start.get(name, 0.0 if name.startswith("moved") else None)
        if before is not None:
            each.axvline(scale * before, color=QUIET, lw=0.9, ls="--")
        each.set_xlabel(title)
        each.grid(axis="y", color=FAINT)
    for each in axes[len(shown) :]:
        each.set_visible(False)
    for each in axes[::columns]:
        each.set_yticks(list(places), labels)
        each.set_ylim(0.5, len(variants) + 0.5)
    return figure


def agreement_dots(agreement: pd.DataFrame) -> Figure:
    """How often the predicted direction of the mean log-prob was the measured one, per variant and response.

    Bars: 95 % intervals over runs; the crosses are how often the intended direction (chosen up, rejected down) was the
    measured one, a forecast that needs no probe.
    """
    variants = list(dict.fromkeys(agreement["variant"]))
    figure, axes = panels(1, 2, 9.0, 0.3 * len(variants) + 1.4)
    for each, (side, own) in zip(axes, agreement.groupby("side", sort=False), strict=True):
        own = own.set_index("variant").reindex(variants)
        places = list(range(len(variants), 0, -1))
        middle = 100 * own["agrees"]
        spread = [middle - 100 * own["low"], 100 * own["high"] - middle]
        each.errorbar(
            middle,
            places,
            xerr=spread,
            fmt="o",
            ms=4,
            color=SIDE_COLOURS[str(side)],
            label="inner-product condition",
        )
        each.plot(
            100 * own["ideal_agrees"],
            places,
            "x",
            color=QUIET,
            ms=5,
            label="always the intended direction",
        )
        each.axvline(50, color=QUIET, lw=0.9, ls="--")
        each.set_xlim(-3, 103)
        each.set_title(f"{side} log-prob", fontsize=10, loc="left")
        each.set_xlabel("directions agree, % of intervals between probes")
        each.set_yticks(places, names_beside(each, variants))
    axes[1].set_yticklabels([])
    legend_below(figure, axes[:1])
    return figure


def ledger_bars(ledger: pd.DataFrame, width: float = 10.0) -> Figure:
    """What the mean change of both log-probs came from, per variant: causes that raised it right of 0, others left.

    Args:
        ledger: one row per run and side; means over seeds are drawn, relative to the size of all causes of a variant
            together. The line is the measured change, whose nats stand beside it.
        width: inches; the two sides stand below each other where there is little.
    """
    variants = list(dict.fromkeys(ledger["variant"]))
    means = ledger.groupby(["side", "variant"], sort=False)[["measured", *PARTS]].mean()
    is_narrow = width < 7
    rows, columns = (2, 1) if is_narrow else (1, 2)
    figure, axes = panels(rows, columns, width, rows * (0.34 * len(variants) + 0.6) + 1.0)
    places = list(range(len(variants), 0, -1))
    for each, side in zip(axes, SIDE_COLOURS, strict=True):
        nats = means.loc[side].reindex(variants)
        sizes = np.abs(nats[list(PARTS)].to_numpy()).sum(1)
        own = nats.div(np.where(sizes > 0, sizes, 1.0), axis=0) * 100
        right, left = np.zeros(len(variants)), np.zeros(len(variants))
        for part in PARTS:
            value = own[part].to_numpy()
            if not value.any():
                continue
            edge = np.where(value > 0, right, left)
            each.barh(places, value, left=edge, height=0.7, color=CAUSE_COLOURS[part], label=MEANINGS[part])
            right, left = right + value.clip(min=0), left + value.clip(max=0)
        each.plot(own["measured"], places, "|", color=INK, ms=14, mew=2, label="measured change")
        each.axvline(0, color=QUIET, lw=0.8)
        each.set_title(f"{side} log-prob", fontsize=10, loc="left")
        for place, change, edge in zip(places, nats["measured"], right, strict=True):
            each.text(edge + 2, place, f"{change:+.3g}", va="center", fontsize=SMALL)
        each.margins(x=0.12)
        names = names_beside(each, variants)
        each.set_yticks(places, names if is_narrow or each is axes[0] else [])
    for each in axes[-1:] if is_narrow else axes:
        each.set_xlabel("% of all that moved it (beside: nats)")
    legend_below(figure)
    return figure

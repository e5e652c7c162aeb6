"""Figures of a comparison: curves per variant over seeds, final numbers, and the check of the condition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from entangle.analysis.ledger import MEANINGS, PARTS
from entangle.figures.curves import SIDE_COLOURS, panels, regime_areas, write
from entangle.figures.ledger import SHADES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from entangle.commands.compare import CompareResult

COLUMNS = 4
"""Panels side by side."""

FINAL = {
    "moved_chosen": ("chosen, nats", 1), "moved_rejected": ("rejected, nats", 1), "accuracy": ("accuracy, %", 100),
    "rouge_l_greedy": ("ROUGE-L, %", 100), "length_greedy": ("length, tokens", 1),
}  # fmt: skip
"""Columns of the figure of final numbers: what they show, and the factor."""


def write_figures(result: CompareResult, folder: Path) -> None:
    """Write every figure of a comparison as PNG.

    Raises:
        UserError: matplotlib isn't installed.
    """
    bands = result.bands
    write(per_variant(bands, side_bands, legend=True), folder / "logps.png")
    write(per_variant(bands, margin_and_accuracy, legend=False), folder / "margin.png")
    if bands["ideal"].notna().any():
        write(per_variant(bands, regime_areas, legend=True), folder / "regimes.png")
    write(final_dots(result.variants, result.start), folder / "final.png")
    if len(result.directions):
        write(agreement_bars(result.agreement("variant")), folder / "agreement.png")
    if len(result.ledger):
        write(ledger_bars(result.ledger), folder / "ledger.png")


def per_variant(bands: pd.DataFrame, draw: Callable[[Axes, pd.DataFrame], Axes], *, legend: bool) -> Figure:
    """One panel per variant on shared axes.

    Args:
        bands: rows of `entangle.analysis.curves.over_seeds`.
        draw: draws a variant's rows.
        legend: one for the whole figure, from the first panel.
    """
    groups = list(bands.groupby("variant", sort=False))
    columns = min(COLUMNS, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = panels(rows, columns, 3.0 * columns, 2.2 * rows + 0.5, sharey=True)
    for number, (each, (variant, own)) in enumerate(zip(axes, groups, strict=False)):
        draw(each, own)
        each.set_title(str(variant), fontsize=9, loc="left")
        if number % columns:
            each.set_ylabel("")
    for each in axes[len(groups) :]:
        each.set_visible(False)
    figure.supxlabel("optimiser step", fontsize=10)
    if legend:
        handles, labels = axes[0].get_legend_handles_labels()
        for each in axes[1 : len(groups)]:
            for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
                if label not in labels:
                    handles.append(handle)
                    labels.append(label)
        figure.legend(handles, labels, fontsize=9, frameon=False, loc="outside upper right", ncols=5)
    return figure


def side_bands(axes: Axes, own: pd.DataFrame) -> Axes:
    """Mean change of both log-probs over seeds, with the range over seeds."""
    for side, colour in SIDE_COLOURS.items():
        name = f"moved_{side}"
        axes.plot(own["step"], own[name], "-", color=colour, lw=1.6, label=side)
        axes.fill_between(own["step"], own[f"{name}_low"], own[f"{name}_high"], color=colour, alpha=0.2, lw=0)
    axes.axhline(0, color="#999999", lw=0.8, zorder=0)
    axes.set_ylabel("change, nats", fontsize=9)
    return axes


def margin_and_accuracy(axes: Axes, own: pd.DataFrame) -> Axes:
    """Growth of the margin (nats, left) and accuracy (right, dashed), mean and range over seeds."""
    axes.plot(own["step"], own["moved_margin"], "-", color="#333333", lw=1.6)
    axes.fill_between(
        own["step"], own["moved_margin_low"], own["moved_margin_high"], color="#333333", alpha=0.2, lw=0
    )
    axes.set_ylabel("margin, nats", fontsize=9)
    right = axes.twinx()
    later = own[own["step"] > own["step"].min()]  # at the start nothing has moved yet
    right.plot(later["step"], 100 * later["accuracy"], "--", color="#8a4fbf", lw=1.2)
    right.set_ylim(0, 100)
    right.set_ylabel("accuracy, %", fontsize=8, color="#8a4fbf")
    right.tick_params(labelsize=7, colors="#8a4fbf")
    right.spines[["top"]].set_visible(False)
    return axes


def final_dots(variants: pd.DataFrame, start: dict[str, float]) -> Figure:
    """The last point of every variant, mean and range over seeds; the dashed line is the policy before training."""
    shown = {name: what for name, what in FINAL.items() if name in variants}
    width, height = 2.2 * len(shown) + 1.5, 0.32 * len(variants) + 1.2
    figure, axes = panels(1, len(shown), width, height, sharex=False, sharey=True)
    places = range(len(variants), 0, -1)
    for each, (name, (title, scale)) in zip(axes, shown.items(), strict=True):
        middle = scale * variants[name]
        spread = [middle - scale * variants[f"{name}_low"], scale * variants[f"{name}_high"] - middle]
        each.errorbar(middle, places, xerr=spread, fmt="o", ms=4, color="#2b5c8a", elinewidth=1.4)
        before = start.get(name, 0.0 if name.startswith("moved") else None)
        if before is not None:
            each.axvline(scale * before, color="#999999", lw=0.9, ls="--")
        each.set_xlabel(title)
        each.grid(axis="y", color="#eeeeee")
    axes[0].set_yticks(list(places), variants["variant"])
    return figure


def agreement_bars(agreement: pd.DataFrame) -> Figure:
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
            color="#555555",
            ms=5,
            label="always the intended direction",
        )
        each.axvline(50, color="#999999", lw=0.9, ls="--")
        each.set_xlim(-3, 103)
        each.set_title(f"{side} log-prob", fontsize=10, loc="left")
        each.set_xlabel("directions agree, % of intervals between probes")
        each.set_yticks(places, variants)
    axes[1].set_yticklabels([])
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside upper right", ncols=2
    )
    return figure


def ledger_bars(ledger: pd.DataFrame) -> Figure:
    """What the mean change of both log-probs came from, per variant: causes that raised it right of 0, others left.

    Args:
        ledger: rows of `CompareResult.ledger`; means over seeds are drawn, relative to the size of all causes of a
            variant together. The black line is the measured change, whose nats stand beside it.
    """
    variants = list(dict.fromkeys(ledger["variant"]))
    means = ledger.groupby(["side", "variant"], sort=False)[["measured", *PARTS]].mean()
    figure, axes = panels(1, 2, 10.0, 0.34 * len(variants) + 1.6)
    places = list(range(len(variants), 0, -1))
    for each, side in zip(axes, SIDE_COLOURS, strict=True):
        nats = means.loc[side].reindex(variants)
        own = nats.div(np.abs(nats[list(PARTS)].to_numpy()).sum(1), axis=0) * 100
        right, left = np.zeros(len(variants)), np.zeros(len(variants))
        for part in PARTS:
            value = own[part].to_numpy()
            edge = np.where(value > 0, right, left)
            each.barh(places, value, left=edge, height=0.7, color=SHADES[part], label=MEANINGS[part])
            right, left = right + value.clip(min=0), left + value.clip(max=0)
        each.plot(own["measured"], places, "|", color="black", ms=14, mew=2)
        each.axvline(0, color="#999999", lw=0.8)
        each.set_title(f"{side} log-prob", fontsize=10, loc="left")
        each.set_xlabel("% of all that moved it (beside: nats)")
        for place, change, edge in zip(places, nats["measured"], right, strict=True):
            each.text(edge + 2, place, f"{change:+.3g}", va="center", fontsize=8)
        each.set_yticks(places, variants if each is axes[0] else [])
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=3
    )
    return figure

"""The set of pairs as one pair: drift by loss, the layers and the kinds of pairs that it comes from, its course.

A number stands here with its interval or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from entangle.analysis.geometry import SIDES
from entangle.analysis.set_verdict import FALL, IDEAL, INVERTED, RISE, UNKNOWN, UNSURE, finding
from entangle.analysis.sets import EDGE
from entangle.figures.heat import heat_map
from entangle.figures.style import (
    AMBER,
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    LINES,
    QUIET,
    RED,
    SMALL,
    VIOLET,
    figure_of,
    legend_below,
    names_beside,
    panels,
    safe,
    whole_steps,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

REACH = 10.0
"""Size of the largest drift that is drawn at its place; a larger one stands at the edge."""

TICKS = (-10, -3, -1, -0.5, 0, 0.5, 1, 3, 10)

FINDINGS = {
    FALL: ("both fall", RED, "v"),
    RISE: ("both rise", AMBER, "^"),
    IDEAL: ("they part", GREEN, "o"),
    INVERTED: ("chosen falls, rejected rises", VIOLET, "s"),
    UNSURE: ("one of two, these pairs can't tell", GREY, "D"),
    UNKNOWN: ("too few pairs to tell", GREY, "x"),
}
"""What is found of a set: in words, its colour, its mark."""

_SIDES = {FALL: -2.6, RISE: 2.6}
"""Where on the axis of drifts words stand that say so."""


def drift_scale(axes: Axes, axis: Axis, *, is_sparse: bool = False) -> None:
    """An axis of drifts: bent around 0, from -REACH to REACH, with the lines at ±1/2."""
    draw = axes.axvline if axis is axes.xaxis else axes.axhline
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("asinh", linear_width=EDGE)
    (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(-1.25 * REACH, 1.25 * REACH)
    shown = [tick for tick in TICKS if not is_sparse or abs(tick) in (0.5, 3, 10)]
    axis.set_ticks(shown, [f"{tick:+g}" if tick else "0" for tick in shown])
    axis.minorticks_off()
    for edge in (-EDGE, EDGE):
        draw(edge, color=INK, lw=1.0, ls="--", zorder=1)
    draw(0, color=FAINT, lw=0.8, zorder=0)


def drift_bars(axes: Axes, losses: Mapping[str, Mapping[str, Any]]) -> Axes:
    """The drift of every loss with its 95 % interval, between and beyond the lines at -1/2 and 1/2.

    Where no interval is known there is no mark; a word says what is known all the same.

    Args:
        axes: where to draw.
        losses: loss -> its move, as in a summary's `set`.
    """
    drift_scale(axes, axes.xaxis, is_sparse=figure_of(axes).get_figwidth() < 7)
    named: set[str] = set()
    for place, move in enumerate(losses.values()):
        drift, what = move["drift"], finding(move)
        words, colour, mark = FINDINGS[what]
        ends = (drift["low"], drift["high"])
        if drift["value"] is None or None in ends:
            axes.text(
                _SIDES.get(what, 0.0),
                place,
                _unknown(move),
                ha="center",
                va="center",
                fontsize=SMALL,
                zorder=5,
            )
            continue
        value, low, high = (_within(end) for end in (drift["value"], *ends))
        axes.plot([low, high], [place, place], "-", color=colour, lw=2, solid_capstyle="butt")
        label = None if what in named else words
        named.add(what)
        axes.plot([value], [place], mark, color=colour, ms=7, label=label, mew=1.5)
        for end, at in zip(ends, (low, high), strict=True):
            if at != end:
                axes.plot([at], [place], "<" if at < 0 else ">", color=colour, ms=5)
    axes.set_yticks(range(len(losses)), names_beside(axes, losses))
    axes.set_ylim(len(losses) - 0.4, -1.1)
    axes.tick_params(axis="y", length=0)
    for at, words in ((_SIDES[FALL], "both fall"), (0, "they part"), (_SIDES[RISE], "both rise")):
        axes.text(at, -0.75, words, ha="center", va="center", fontsize=SMALL, color=QUIET)
    axes.set_xlabel("drift: nats of both log-probs per nat of margin")
    legend_below(figure_of(axes))
    return axes


def _within(value: float) -> float:
    return max(-REACH, min(REACH, value))


def _unknown(move: Mapping[str, Any]) -> str:
    """Why a move's drift isn't drawn."""
    if move["is_certain"] and finding(move) in (FALL, RISE):
        return FINDINGS[finding(move)][0]
    if move["margin"]["high"] is not None and move["margin"]["high"] < 0:
        return "the margin shrinks"
    return "not known"


def set_layers(content: Mapping[str, Any], width: float = 8.0) -> Figure:
    """Where the set is entangled: each layer's share of the product of the mean scores, and its own cosine.

    Both with 95 % intervals; a layer whose interval isn't known is left empty.

    Args:
        content: what set.json holds.
        width: inches; the two stand below each other where there is little.
    """
    layers = dict(sorted(content["layers"].items(), key=lambda item: _order(item[0])))
    is_narrow = width < 6
    rows, columns = (2, 1) if is_narrow else (1, 2)
    figure, axes = panels(rows, columns, width, 2.6 * rows, sharex=True)
    whole = content["inner"]["value"]
    _dots(axes[0], {name: _share(block["inner"], whole) for name, block in layers.items()}, BLUE)
    _dots(axes[1], {name: block["cosine"] for name, block in layers.items()}, GREEN, 1.0)
    axes[0].axhline(0, color=FAINT, lw=0.8, zorder=0)
    axes[0].set_ylabel("share of U_wl, %")
    axes[1].set_ylabel("cosine of mean scores")
    axes[1].axhline(1, color=FAINT, lw=0.8, zorder=0)
    for each in axes[-columns:]:
        every = max(1, len(layers) // 12)
        each.set_xticks(range(len(layers))[::every], [safe(name, 12) for name in list(layers)[::every]])
        each.set_xlabel("layer")
    return figure


def _order(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() else (10**6, name)


def _share(inner: Mapping[str, Any], whole: float) -> dict[str, Any]:
    ends = {
        name: None if inner[name] is None else 100 * inner[name] / whole for name in ("value", "low", "high")
    }
    return {"value": ends["value"]} | dict(
        zip(("low", "high"), sorted_ends(ends["low"], ends["high"]), strict=True)
    )


def sorted_ends(low: float | None, high: float | None) -> tuple[float | None, float | None]:
    """Both ends in their order; unknown ones as they are."""
    return (low, high) if low is None or high is None or low <= high else (high, low)


def _dots(axes: Axes, numbers: Mapping[str, Mapping[str, Any]], colour: str, most: float = np.inf) -> None:
    """Intervals, and a dot in each but where the number was cut to `most`."""
    for place, found in enumerate(numbers.values()):
        if any(found[name] is None for name in ("value", "low", "high")):
            continue
        axes.plot([place, place], [found["low"], found["high"]], "-", color=colour, lw=1.6)
        if found["value"] < most:
            axes.plot([place], [found["value"]], "o", color=colour, ms=4)


def kind_blocks(content: Mapping[str, Any], loss: str, width: float = 9.0) -> Figure:
    """What a step on pairs of one kind does to the mean log-probs of another, for both responses.

    A cell stands for a change whose sign is known; the others are empty.

    Args:
        content: set.json's `kinds`.
        loss: label of the loss.
        width: inches; the two sides stand below each other where there is little.
    """
    block, kinds = content["block"], list(dict.fromkeys(row["of"] for row in content["block"]))
    is_narrow = width < 7
    rows, columns = (2, 1) if is_narrow else (1, 2)
    height = 1.5 + 0.42 * len(kinds)
    figure, axes = panels(rows, columns, width, rows * height, sharex=False)
    tables = {side: known_changes(block, kinds, loss, side) for side in SIDES}
    most = max((float(np.nanmax(np.abs(t))) for t in tables.values() if np.isfinite(t).any()), default=1.0)
    for each, (side, values) in zip(axes, tables.items(), strict=True):
        heat_map(each, values, kinds, kinds, 1.5 * most, "nats per lr", is_red_below=True)
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                each.text(column + 0.5, row + 0.5, f"{value:+.2g}", ha="center", va="center", fontsize=SMALL)
        each.set_title(f"{side} log-prob", fontsize=10, loc="left")
        each.set_ylabel("what happens to")
        each.set_xlabel("a step on")
    return figure


def known_changes(block: list[Mapping[str, Any]], kinds: list[str], loss: str, side: str) -> np.ndarray:
    """`(of, by)`: mean change of a side; NaN where its sign isn't known."""
    values = np.full((len(kinds), len(kinds)), np.nan)
    for row in block:
        found = row["losses"][loss][side]
        if found["has_meaning"] and found["value"] is not None:
            values[kinds.index(row["of"]), kinds.index(row["by"])] = found["value"]
    return values


def drift_course(axes: Axes, table: pd.DataFrame) -> Axes:
    """The drift that was predicted at every look, beside the one that was measured until the next, with 95 % intervals.

    Where no margin was gained there is no drift: a cross at the bottom says so. A drift whose interval has no end is
    not drawn.

    Args:
        axes: where to draw.
        table: of `entangle.analysis.drift.beside_predicted`.
    """
    drift_scale(axes, axes.yaxis, is_sparse=True)
    middle = (table["step"] + table["until"]) / 2
    reach = 0.12 * float((table["until"] - table["step"]).min())
    for name, colour, mark, aside in (("predicted", BLUE, "o", -reach), ("measured", RED, "D", reach)):
        ends = table[[name, f"{name}_low", f"{name}_high"]].clip(-REACH, REACH)
        is_known = is_bounded(table, name) & table[name].notna()
        for at, (value, low, high) in zip(middle[is_known] + aside, ends[is_known].to_numpy(), strict=True):
            axes.plot([at, at], [low, high], "-", color=colour, lw=1.6)
            axes.plot([at], [value], mark, color=colour, ms=5)
        if is_known.any():
            of = f" from {table['of'].iloc[0]}" if name == "predicted" else " until the next look"
            axes.plot([], [], mark, color=colour, ms=5, label=f"{name}{of}")
    no_margin = middle[~(table["measured_margin"] > 0)]
    if len(no_margin):
        axes.plot(
            no_margin,
            np.full(len(no_margin), 0.04),
            "x",
            color=QUIET,
            ms=5,
            transform=axes.get_xaxis_transform(),
            label="no margin was gained: no drift",
        )
    axes.set_ylabel("drift: nats of both\nper nat of margin")
    axes.set_xlabel("optimiser step")
    axes.set_xlim(table["step"].min(), table["until"].max())
    whole_steps(axes)
    legend_below(figure_of(axes))
    return axes


def _is_drift(name: str) -> bool:
    return name.split("_")[0] in ("predicted", "measured") and not name.endswith("margin")


def is_bounded(table: pd.DataFrame, name: str) -> pd.Series:
    """Whether the interval of a column has both ends."""
    return table[[f"{name}_low", f"{name}_high"]].map(math.isfinite).all(axis=1)


def drift_dots(axes: Axes, table: pd.DataFrame) -> Axes:
    """Measured against predicted drift, a mark per run of a comparison: on the line they agree.

    Args:
        axes: where to draw.
        table: of `entangle.analysis.drift.of_runs`, or of `of_probes` with the interval of the prediction, too.
    """
    for axis in (axes.xaxis, axes.yaxis):
        drift_scale(axes, axis, is_sparse=True)
    axes.plot([-REACH, REACH], [-REACH, REACH], "-", color=QUIET, lw=0.8, zorder=0)
    known = table[is_bounded(table, "measured") & np.isfinite(table["predicted"])]
    if "predicted_low" in known:
        known = known[is_bounded(known, "predicted")]
    for number, (variant, own) in enumerate(known.groupby("variant", sort=False)):
        own = own.assign(**{str(name): own[name].clip(-REACH, REACH) for name in own if _is_drift(str(name))})
        across = None
        if "predicted_low" in own:
            across = [own["predicted"] - own["predicted_low"], own["predicted_high"] - own["predicted"]]
        axes.errorbar(
            own["predicted"],
            own["measured"],
            xerr=across,
            yerr=[own["measured"] - own["measured_low"], own["measured_high"] - own["measured"]],
            fmt="osD^v"[number // len(LINES) % 5],
            ms=5,
            color=LINES[number % len(LINES)],
            elinewidth=1.2,
            label=safe(variant, 40),
        )
    axes.set_xlabel("predicted drift")
    axes.set_ylabel("measured drift")
    legend_below(figure_of(axes))
    return axes

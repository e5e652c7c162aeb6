"""Figures of a what-if: regime shares over a knob or a grid, verdicts side by side, the plane of pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from entangle.analysis.regimes import REGIMES
from entangle.figures.probe import COLOURS, new_axes, plane, save
from entangle.tables.whatif import names, short_labels, verdicts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from entangle.commands.whatif import WhatIf

LINES = ("#2b5c8a", "#c8382e", "#2a9d6f", "#e0a526", "#8a4fbf", "#5f6b73", "#d1699e", "#7a5230")
VERDICTS = 16


def write_figures(result: WhatIf, folder: Path) -> list[str]:
    """Write every figure of a result as PNG.

    Returns:
        The file names.

    Raises:
        UserError: matplotlib isn't installed.
    """
    written, base = [], result.summary["base"]

    def put(axes: Axes, name: str) -> None:
        save(axes, folder / name)
        written.append(name)

    put(verdict_bars(new_axes(9, 0.9 + 0.33 * _bars(result.settings)), result.settings, base), "losses.png")
    put(pair_plane(new_axes(8, 5.4), result), "plane.png")
    for change in result.summary["changes"]:
        put(
            knob_curve(new_axes(), result.curves, change, result.summary["target"]),
            f"knob-{change['knob']}.png",
        )
    for field in grid_fields(result.settings):
        put(grid_lines(new_axes(8, 4.6), result.settings, field, base), f"grid-{field}.png")
    return written


def knob_curve(axes: Axes, curves: pd.DataFrame, change: Mapping[str, Any], target: float) -> Axes:
    """Stacked regime shares along a knob; the setting found and the target are marked.

    Args:
        axes: where to draw.
        curves: rows of `WhatIf.curves`.
        change: the knob's entry of `summary["changes"]`.
        target: the share asked for.
    """
    shares, is_even = knob_shares(curves, change["knob"])
    used = [regime for regime in REGIMES if shares[regime].any()]
    axes.stackplot(
        shares.index, [shares[regime] for regime in used], alpha=0.85,
        colors=[COLOURS[regime] for regime in used],
        labels=[regime.replace("_", " ") for regime in used], linewidth=0,
    )  # fmt: skip
    axes.set_xscale("linear" if is_even else "log")
    if starts_right(shares, change, is_even):
        axes.invert_xaxis()
    axes.axhline(100 * target, color="white", lw=1.2, ls=":")
    if change["setting"] != change["start"]:
        verb = "smallest that reaches the target" if change["reaches"] else "most ideal pairs"
        axes.axvline(change["setting"], color="black", lw=1.2, label=f"{change['setting']:.3g}: {verb}")
    axes.margins(x=0, y=0)
    axes.set_ylim(0, 100)
    axes.set_xlabel(change["title"])
    axes.set_ylabel(f"share of pairs, %   ({change['start']:g} is {change['at_start']['label']})")
    _legend_above(axes)
    return axes


def knob_shares(curves: pd.DataFrame, knob: str) -> tuple[pd.DataFrame, bool]:
    """Shares of the regimes in % by setting of a knob, in its order, and whether the settings are evenly spaced.

    Uneven ones are geometric: they are drawn on a log axis, which a setting of 0 has no place on.
    """
    rows = curves[curves["knob"] == knob].set_index("setting").sort_index()
    steps = np.diff(rows.index)
    is_even = bool(len(steps) and np.allclose(steps, steps[0]))
    counts = rows.loc[rows.index > (-np.inf if is_even else 0.0), [str(regime) for regime in REGIMES]]
    return 100 * counts.div(counts.sum(axis=1), axis=0), is_even


def starts_right(shares: pd.DataFrame, change: Mapping[str, Any], is_even: bool) -> bool:
    """Whether a knob starts at its largest setting: then the axis is turned, so that the start stands on the left."""
    return is_even and change["start"] == shares.index.max()


def verdict_bars(axes: Axes, settings: pd.DataFrame, base: str) -> Axes:
    """One stacked bar per verdict, most ideal on top; losses with equal verdicts share a bar."""
    groups = verdicts(settings, VERDICTS, base)
    labels = [names(short_labels(group, settings), base, 2, 28) for group in groups]
    left = np.zeros(len(groups))
    for regime in REGIMES:
        shares = np.array([100 * group[str(regime)].iloc[0] for group in groups])
        if shares.any():
            axes.barh(
                labels, shares, left=left, color=COLOURS[regime], label=regime.replace("_", " "), height=0.75
            )
        left += shares
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.set_xlabel("share of pairs, %")
    _legend_above(axes)
    return axes


def _bars(settings: pd.DataFrame) -> int:
    return min(VERDICTS, settings["verdict"].nunique())


def pair_plane(axes: Axes, result: WhatIf) -> Axes:
    """The pairs in the plane of norm ratio and cosine, coloured by the base's regime, with loss lines.

    The other lines are those of losses whose rho is the same for every pair: the ones with most ideal pairs.
    """
    settings, base = result.settings, result.summary["base"]
    flat = settings[(settings["rho_spread"] <= 1e-9) & (settings["rho"] > 0)].sort_values(
        "ideal", ascending=False
    )
    flat = pd.concat([settings[settings["label"] == base], flat]).drop_duplicates("label")
    flat = flat[~flat["rho"].round(9).duplicated()].head(3)
    known = flat[np.isfinite(flat["rho"])]
    return plane(
        axes,
        result.pairs,
        result.regimes[base].astype(str),
        dict(zip(known["label"], known["rho"], strict=True)),
    )


def grid_fields(settings: pd.DataFrame) -> list[str]:
    """Hyper-parameters that some loss was judged at more than one value of."""
    return [
        field
        for field in dict.fromkeys(key for row in settings["setting"] for key in json.loads(row))
        if any(len(line) > 1 for _, line in _lines(settings, field))
    ]


def grid_lines(axes: Axes, settings: pd.DataFrame, field: str, base: str) -> Axes:
    """Share of ideal pairs over a hyper-parameter, one line per loss; equal lines are drawn once."""
    lines: dict[tuple[Any, ...], list[str]] = {}
    for name, points in _lines(settings, field):
        if len(points) > 1:
            lines.setdefault(tuple(points), []).append(name)
    ordered = sorted(lines.items(), key=lambda item: -max(y for _, y in item[0]))
    positive = all(x > 0 for points in lines for x, _ in points)
    for (points, losses), colour in zip(ordered, LINES, strict=False):
        axes.plot(
            *zip(*points, strict=True), "o-", color=colour, ms=4, lw=1.4, label=names(losses, base, 3, 34)
        )
    if len(ordered) > len(LINES):
        axes.plot([], [], " ", label=f"and {len(ordered) - len(LINES)} more in whatif.parquet")
    axes.set_xscale("log" if positive else "linear")
    axes.set_ylim(0, min(102.0, 10 + 1.1 * max(y for points in lines for _, y in points)))
    axes.set_xlabel(field)
    axes.set_ylabel("ideal pairs, %")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return axes


def _lines(settings: pd.DataFrame, field: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """Per loss and its other hyper-parameters: (value, ideal share in %) in order of the value."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in settings.to_dict("records"):
        setting = json.loads(row["setting"])
        value = setting.pop(field, None)
        if isinstance(value, int | float):
            others = ", ".join(
                f"{key}={item:g}" for key, item in setting.items() if isinstance(item, int | float)
            )
            points.setdefault((row["loss"], others), []).append((value, 100 * row["ideal"]))
    variants = Counter(loss for loss, _ in points)
    return [
        (f"{loss}({others})" if variants[loss] > 1 else loss, sorted(line))
        for (loss, others), line in points.items()
    ]


def _legend_above(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4)

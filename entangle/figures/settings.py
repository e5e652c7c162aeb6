"""Figures of settings: regime shares over a knob or a grid, verdicts side by side, the plane of pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from entangle.analysis.regimes import REGIMES
from entangle.analysis.settings import by_verdict, listed, short_labels
from entangle.figures.pairs import plane
from entangle.figures.regimes import regime_areas, stacked_bars
from entangle.figures.style import INK, LINES, figure_of, legend_below, new_axes, safe, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VERDICTS = 16
"""Bars that are drawn, at most."""


def write_figures(
    pairs: pd.DataFrame,
    settings: pd.DataFrame,
    regimes: pd.DataFrame,
    curves: pd.DataFrame,
    summary: Mapping[str, Any],
    folder: Path,
) -> list[str]:
    """Write every figure of a what-if as PNG.

    Args:
        pairs: the scored rows that were judged.
        settings: one row per loss and setting.
        regimes: one row per pair, one column per loss and setting.
        curves: one row per knob and setting of a grid.
        summary: the smallest changes, the base and the target.
        folder: where they go.

    Returns:
        The file names.

    Raises:
        UserError: matplotlib isn't installed.
    """
    written, base = [], summary["base"]

    def put(axes: Axes, name: str) -> None:
        save(axes, folder / name)
        written.append(name)

    bars = min(VERDICTS, settings["verdict"].nunique())
    put(verdict_bars(new_axes(9, 1.2 + 0.33 * bars), settings, base), "losses.png")
    put(pair_plane(new_axes(8, 5.4), pairs, settings, regimes[base].astype(str), base), "plane.png")
    for change in summary["changes"]:
        if change["setting"] == change["start"]:
            continue  # no setting does better, which is said in a line
        put(knob_curve(new_axes(), curves, change, summary["target"]), f"knob-{change['knob']}.png")
    for field in grid_fields(settings):
        put(grid_lines(new_axes(8, 4.6), settings, field, base), f"grid-{field}.png")
    return written


def knob_curve(axes: Axes, curves: pd.DataFrame, change: Mapping[str, Any], target: float) -> Axes:
    """Stacked regime shares along a knob; the setting found and the target are marked.

    Settings that aren't evenly spaced stand on a log axis, with the 0 that they start from at its left end.

    Args:
        axes: where to draw.
        curves: one row per knob and setting: pairs per regime.
        change: the knob's entry of `summary["changes"]`.
        target: the share asked for.
    """
    shares = knob_shares(curves, change["knob"])
    regime_areas(axes, shares.index, shares)
    if is_even(shares.index):
        if change["start"] == shares.index.max():  # the start stands on the left
            axes.invert_xaxis()
    else:
        least = float(shares.index[shares.index > 0].min())
        axes.set_xscale("symlog", linthresh=least, linscale=0.4)
        powers = np.arange(np.ceil(np.log10(least)), np.log10(shares.index.max()) + 1e-9)
        axes.set_xticks([0.0, *10**powers], ["0", *(f"{10**power:g}" for power in powers)])
        axes.minorticks_off()
    axes.axhline(100 * target, color=INK, lw=1.2, ls=":", label=f"asked for: {100 * target:g} % ideal")
    if change["setting"] != change["start"]:
        verb = "smallest that reaches it" if change["reaches"] else "most ideal pairs"
        axes.axvline(change["setting"], color=INK, lw=1.2, label=f"{change['setting']:.3g}: {verb}")
    start = safe(change["at_start"]["label"])
    words = f"{change['knob']}: {change['title']} ({change['start']:g}: {start})"
    axes.set_xlabel(fill(words, int(figure_of(axes).get_figwidth() / 0.09)))
    axes.set_ylabel("share of pairs, %")
    legend_below(figure_of(axes))
    return axes


def knob_shares(curves: pd.DataFrame, knob: str) -> pd.DataFrame:
    """Shares of the regimes in % by setting of a knob, in its order."""
    rows = curves[curves["knob"] == knob].set_index("setting").sort_index()
    counts = rows[[str(regime) for regime in REGIMES]]
    return 100 * counts.div(counts.sum(axis=1), axis=0)


def is_even(settings: pd.Index) -> bool:
    """Whether settings are evenly spaced; others are geometric, but for a 0."""
    steps = np.diff(settings)
    return bool(len(steps) and np.allclose(steps, steps[0]))


def verdict_bars(axes: Axes, settings: pd.DataFrame, base: str) -> Axes:
    """One stacked bar per verdict, most ideal on top; losses with equal verdicts share a bar."""
    groups = by_verdict(settings, VERDICTS, base)
    labels = [listed(short_labels(group, settings), base, 2, 28) for group in groups]
    stacked_bars(axes, pd.DataFrame([group.iloc[0] for group in groups]), labels)
    axes.tick_params(axis="y", labelsize=8)
    legend_below(figure_of(axes))
    return axes


def pair_plane(
    axes: Axes, pairs: pd.DataFrame, settings: pd.DataFrame, regimes: pd.Series, base: str
) -> Axes:
    """The pairs in the plane of norm ratio and cosine, coloured by the base's regime, with loss lines.

    The other lines are those of losses whose rho is the same for every pair: the ones with most ideal pairs.
    """
    flat = settings[(settings["rho_spread"] <= 1e-9) & (settings["rho"] > 0)]
    flat = flat.sort_values("ideal", ascending=False)
    flat = pd.concat([settings[settings["label"] == base], flat]).drop_duplicates("label")
    flat = flat[~flat["rho"].round(9).duplicated()].head(3)
    known = flat[np.isfinite(flat["rho"])]
    return plane(axes, pairs, regimes, dict(zip(known["label"], known["rho"], strict=True)))


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
            *zip(*points, strict=True),
            "o-",
            color=colour,
            ms=4,
            lw=1.4,
            label=safe(listed(losses, base, 3, 34), 110),
        )
    if len(ordered) > len(LINES):
        axes.plot([], [], " ", label=f"and {len(ordered) - len(LINES)} more in whatif.parquet")
    axes.set_xscale("log" if positive else "linear")
    axes.set_ylim(0, min(102.0, 10 + 1.1 * max(y for points in lines for _, y in points)))
    axes.set_xlabel(field)
    axes.set_ylabel("ideal pairs, %")
    legend_below(figure_of(axes))
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

"""The figures of a page, as plotly's traces and layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from entangle.analysis.regimes import REGIMES
from entangle.analysis.statistics import rank_correlation
from entangle.figures.curves import SIDE_COLOURS
from entangle.figures.probe import COLOURS, module_grid
from entangle.figures.whatif import knob_shares, starts_right
from entangle.report.blocks import Figure, Heading, Table, plain
from entangle.report.glossary import definition_key
from entangle.tables.probe import percent

MARKS = {"ideal": "circle", "both_up": "triangle-up", "both_down": "triangle-down", "inverted": "square"}
"""Marks of the regimes, so that colour isn't needed to tell them apart; a degenerate pair has an x."""

PATTERNS = {"both_up": "/", "both_down": "\\", "inverted": "x", "degenerate": "."}
"""Hatching of the regimes' bars, for the same reason."""


ROW_LEGEND = {
    "orientation": "h",
    "x": 0,
    "xanchor": "left",
    "y": 1,
    "yanchor": "bottom",
    "traceorder": "normal",
}


UNSEEN = {"hoverinfo": "skip", "showlegend": False}


def spoken(name: str) -> str:
    """A name of the code as words: `both_up` as `both up`."""
    return name.replace("_", " ")


def regime_bars(summary: Mapping[str, Any]) -> Figure:
    """Stacked shares of the regimes, one bar per loss, the interval of the ideal share on it."""
    shares = summary["regimes"]
    losses = list(shares)
    used = [str(r) for r in REGIMES if any(shares[loss][str(r)]["count"] for loss in losses)]
    data = []
    for regime in used:
        column = [shares[loss][regime] for loss in losses]
        bars: dict[str, Any] = {
            "type": "bar", "orientation": "h", "name": spoken(regime), "y": [plain(loss) for loss in losses],
            "x": [_percent(s["share"]) for s in column],
            "customdata": [percent(s) for s in column],
            "hovertemplate": "%{y}: " + spoken(regime) + " %{customdata} %<extra></extra>",
            "marker": {
                "color": COLOURS[regime],
                "pattern": {
                    "shape": PATTERNS.get(regime, ""), "size": 6, "solidity": 0.2, "fgcolor": "#ffffff",
                    "fillmode": "overlay",
                },
            },
        }  # fmt: skip
        data.append(bars)
    ideal = [shares[loss]["ideal"] for loss in losses]
    data.append({  # above the bars, none of which would let an error bar of another be seen
        "type": "scatter", "mode": "markers", "y": [plain(loss) for loss in losses],
        "x": [_percent(s["share"]) for s in ideal],
        "marker": {"size": 1, "color": "#111111"},
        "error_x": {
            "type": "data", "symmetric": False, "thickness": 1.3, "width": 3, "color": "#111111",
            "array": [_percent(s["high"] - s["share"]) for s in ideal],
            "arrayminus": [_percent(s["share"] - s["low"]) for s in ideal],
        },
    } | UNSEEN)  # fmt: skip
    first = shares[losses[0]]
    rho = summary.get("incentive_ratio", {})
    head = [Heading("loss"), Heading("rho (median)", "rho"), *(Heading(spoken(r), "regime") for r in used)]
    rows = [[loss, _rho(rho.get(loss)), *(percent(shares[loss][r]) for r in used)] for loss in losses]
    said = ", ".join(f"{spoken(r)} {percent(first[r])} %" for r in used)
    return Figure(
        caption="Share of pairs per regime and loss, with the 95 % interval of the ideal share",
        alt=f"Stacked bars of {len(losses)} losses. Under {losses[0]}: {said}. All shares are in the table below.",
        data=data, height=130 + 27 * len(losses), terms=("regime", "interval"),
        layout={
            "barmode": "stack", "bargap": 0.25,
            "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False},
            "xaxis": {"title": {"text": "share of pairs, %"}, "range": [0, 100.5]}, "hovermode": "closest",
            "legend": ROW_LEGEND,
        },
        table=Table("Share of pairs per regime, % [95 % interval]", head, rows),
    )  # fmt: skip


def knob_curve(curves: pd.DataFrame, change: Mapping[str, Any], target: float) -> Figure:
    """Stacked regime shares along one knob, with the setting that was found and the target."""
    shares, is_even = knob_shares(curves, change["knob"])
    data: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "stackgroup": "one", "name": spoken(regime), "line": {"width": 0},
            "x": rounded(shares.index), "y": rounded(shares[regime]), "fillcolor": COLOURS[regime],
            "hovertemplate": spoken(regime) + " %{y:.0f} %<extra></extra>",
        }
        for regime in map(str, REGIMES) if shares[regime].any()
    ]  # fmt: skip
    is_moved = change["setting"] != change["start"]
    shapes: list[dict[str, Any]] = [
        line(y0=100 * target, y1=100 * target, x0=0, x1=1, xref="paper", dash="dot")
    ]
    if is_moved:
        shapes.append(line(x0=change["setting"], x1=change["setting"], y0=0, y1=1, yref="paper"))
    x_axis: dict[str, Any] = {
        "title": {"text": f"setting of {plain(change['knob'])}"},
        "type": "linear" if is_even else "log",
    }
    if starts_right(shares, change, is_even):
        x_axis["autorange"] = "reversed"
    before, after = change["at_start"]["regimes"]["ideal"], change["at_setting"]["regimes"]["ideal"]
    found = "no setting does better than the start"
    if is_moved:
        verb = "reaches the target" if change["reaches"] else "has most ideal pairs"
        found = f"{change['setting']:.3g} (line) {verb}: {percent(after)} % ideal"
    return Figure(
        caption=f"{change['title'][:1].upper()}{change['title'][1:]}, from {change['at_start']['label']}: {found}",
        alt=f"Stacked areas of the regimes' shares along {change['title']}. Ideal at the start: {percent(before)} %; "
        f"{found}.",
        data=data, terms=("knob", "regime"),
        layout={
            "xaxis": x_axis, "yaxis": {"title": {"text": "share of pairs, %"}, "range": [0, 100]}, "shapes": shapes,
            "hovermode": "x unified", "legend": ROW_LEGEND,
        },
    )  # fmt: skip


def module_map(shares: pd.DataFrame) -> Figure:
    """What every module adds to the mean cosine: layers to the right, kinds of modules downwards.

    Args:
        shares: rows of `entangle.report.source.module_shares`.
    """
    grid, bound = module_grid(shares)
    top = shares.nlargest(3, "share").to_dict("records")
    said = ", ".join(f"{_layer(row['layer'])} {row['kind']} {100 * row['share']:.1f} %" for row in top)
    return Figure(
        caption="Where the entanglement lives: each module's share of the mean cosine, %",
        alt=f"Heat map of kinds of modules over layers. Largest: {said}.",
        data=[{
            "type": "heatmap", "x": [_layer(layer) for layer in map(int, grid.columns)],
            "y": [plain(kind) for kind in grid.index], "z": [rounded(row) for row in grid.to_numpy()],
            "zmin": -bound, "zmax": bound, "colorscale": DIVERGING,
            "colorbar": {"title": {"text": "%"}, "thickness": 12}, "xgap": 1, "ygap": 1,
            "hovertemplate": "%{x}, %{y}: %{z:.2f} % of the mean cosine<extra></extra>",
        }],
        layout={
            "xaxis": {"type": "category", "showgrid": False},
            "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False},
        },
        height=150 + 24 * len(grid), terms=("module_share",),
    )  # fmt: skip


def _layer(number: int) -> str:
    return "outside" if number < 0 else f"layer {number}"


def module_table(summary: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Layers and kinds of modules with what they contribute (`summary["modules"]` of a run)."""
    head = [
        Heading("share of c, %", "module_share"), Heading("norms, %", "module_norms"),
        Heading("cosine [5 %, 95 %]", "module_cosine"), Heading("chosen falls, %", "module_falls"),
    ]  # fmt: skip
    return [
        Table(caption, [Heading(first), *head], [
            [
                name, number(_hundred(row["inner_share"]), ".1f"), number(_hundred(row["norm_share"]), ".1f"),
                f"{number(row['cosine'], '.3f')} [{number(row['low'], '.2f')}, {number(row['high'], '.2f')}]",
                percent(row["chosen_falls"]),
            ]
            for name, row in summary[key].items()
        ])
        for key, first, caption in (("layers", "layer", "By layer"), ("kinds", "module", "By kind of module"))
    ]  # fmt: skip


def _hundred(share: float | None) -> float | None:
    return None if share is None else 100 * share


DIVERGING = [[0, "#2b5c8a"], [0.5, "#f4f4f2"], [1, "#c8382e"]]


def correlation_map(rows: pd.DataFrame, columns: Sequence[str]) -> Figure:
    """Rank correlations of columns of pairs with all of `rows`, each with its interval in the table."""
    found = {name: {other: rank_correlation(rows[name], rows[other]) for other in rows} for name in columns}
    names = [plain(spoken(str(name))) for name in rows]
    cells = [[spoken(name), *map(_with_interval, row.values())] for name, row in found.items()]
    return Figure(
        caption=f"Rank correlations of the columns with the geometry and with each other ({len(rows)} pairs)",
        alt="Heat map of Spearman's rank correlations. The numbers are in the table below.",
        data=[{
            "type": "heatmap", "x": names, "y": [plain(spoken(name)) for name in columns], "xgap": 1, "ygap": 1,
            "z": [rounded([r["rho"] for r in row.values()]) for row in found.values()], "zmin": -1, "zmax": 1,
            "colorscale": DIVERGING, "colorbar": {"thickness": 12},
            "hovertemplate": "%{x}, %{y}: %{z:.2f}<extra></extra>",
        }],
        layout={"yaxis": {"autorange": "reversed", "automargin": True}, "xaxis": {"automargin": True}},
        height=210 + 24 * len(columns), terms=("rank_correlation",),
        table=Table(
            "Spearman's rank correlations [95 % interval]",
            [Heading("column"), *(Heading(spoken(str(name)), definition_key(str(name))) for name in rows)], cells,
        ),
    )  # fmt: skip


def prompt_scatter(
    prompts: pd.DataFrame, x: tuple[str, str], y: tuple[str, str], *, caption: str, terms: Sequence[str],
    logarithmic: bool = False, groups: tuple[str, Mapping[Any, str], Mapping[Any, str]] | None = None,
    limits: tuple[float | None, float | None] = (None, None),
) -> Figure | None:  # fmt: skip
    """Prompts in the plane of two columns, each given as (column, label); None where none can be drawn.

    Args:
        prompts: rows of prompts.
        x: across.
        y: upwards.
        caption: what it shows.
        terms: keys of definitions.
        logarithmic: both axes; what isn't above 0 is left out, and counted.
        groups: a column, and for its values their names and their colours.
        limits: dotted lines at these x and y.
    """
    if not {x[0], y[0], "index"} <= set(prompts):
        return None
    rows = prompts.replace([np.inf, -np.inf], np.nan).dropna(subset=[x[0], y[0]])
    if logarithmic:
        rows = rows[(rows[[x[0], y[0]]].to_numpy(float) > 0).all(axis=1)]
    if rows.empty:
        return None
    kind = "log" if logarithmic else "linear"
    left = (
        f"; {len(prompts) - len(rows)} of {len(prompts)} aren't above 0 and can't be drawn"
        if len(rows) < len(prompts)
        else ""
    )
    found = rank_correlation(rows[x[0]], rows[y[0]])
    parts = [("", SIDE_COLOURS["chosen"], rows)]
    if groups is not None and groups[0] in rows:
        column, names, colours = groups
        parts = [(names[value], colours[value], rows[rows[column] == value]) for value in names]
    return Figure(
        caption=f"{caption}{left}",
        alt=f"{len(rows)} prompts; rank correlation of {x[1]} and {y[1]}: {_with_interval(found)}.",
        data=[
            {
                "type": "scatter", "mode": "markers", "x": rounded(part[x[0]]), "y": rounded(part[y[0]]),
                "customdata": part["index"].tolist(), "name": f"{name} ({len(part)})", "showlegend": bool(name),
                "marker": {"size": 7, "color": colour, "opacity": 0.7},
                "hovertemplate": "prompt %{customdata}<br>" + f"{x[1]} %{{x:.3g}}<br>{y[1]} %{{y:.3g}}<extra></extra>",
            }
            for name, colour, part in parts if len(part)
        ],
        layout={
            "xaxis": {"title": {"text": x[1]}, "type": kind}, "yaxis": {"title": {"text": y[1]}, "type": kind},
            "hovermode": "closest", "legend": ROW_LEGEND,
            "shapes": [
                line(dash="dot", **{f"{a}0": at, f"{a}1": at, f"{b}0": 0, f"{b}1": 1, f"{b}ref": "paper"})
                for at, a, b in ((limits[0], "x", "y"), (limits[1], "y", "x")) if at is not None
            ],
        },
        terms=(*terms, "rank_correlation"), height=400,
    )  # fmt: skip


def number(value: float | None, form: str = ".3g") -> str:
    """A number for a table cell; a dash for none."""
    return "-" if value is None or value != value else format(value, form)


def _with_interval(correlation: Mapping[str, float]) -> str:
    rho, low, high = (number(correlation[name], ".2f") for name in ("rho", "low", "high"))
    return f"{rho} [{low}, {high}]"


def _rho(value: float | None) -> str:
    """A summary's incentive ratio: JSON holds none for infinity."""
    return "inf" if value is None else number(value)


def _percent(share: float) -> float:
    return round(100 * share, 2)


def rounded(values: Any) -> list[float | None]:
    """Four digits each, None for what isn't finite."""
    return [float(f"{v:.4g}") if np.isfinite(v) else None for v in np.asarray(values, dtype=float)]


def line(dash: str = "solid", **place: Any) -> dict[str, Any]:
    """A straight line of a layout in the theme's ink; `place` are its ends, in plotly's names."""
    return {"type": "line", "line": {"color": "theme", "width": 1.4, "dash": dash}, **place}

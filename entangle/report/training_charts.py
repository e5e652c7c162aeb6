"""Figures of what was measured over training, of losses compared, and of what other pairs do; as in `figures`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from entangle.analysis.ledger import MEANINGS, PARTS
from entangle.analysis.regimes import REGIMES
from entangle.analysis.statistics import Z
from entangle.figures.across import NAMES, PART_COLOURS
from entangle.figures.curves import SIDE_COLOURS
from entangle.figures.ledger import SHADES, running_sums
from entangle.figures.probe import COLOURS
from entangle.figures.whatif import LINES
from entangle.report.blocks import Figure, Heading, Table, plain
from entangle.report.charts import ROW_LEGEND, UNSEEN, line, rounded, spoken

DASHES = ("solid", "dash", "dot", "dashdot")
"""Told apart by these where there are more lines than colours."""


def change_curves(points: pd.DataFrame, onset: int | None) -> Figure:
    """Mean changes of both log-probs since the start of training, with bands."""
    data: list[dict[str, Any]] = []
    steps = points["step"].tolist()
    for side, colour in SIDE_COLOURS.items():
        middle, error = points[f"moved_{side}"], Z * points[f"moved_{side}_error"].fillna(0)
        edge = {"type": "scatter", "mode": "lines", "x": steps, "line": {"width": 0}} | UNSEEN
        data += [
            edge | {"y": rounded(middle - error)},
            edge | {"y": rounded(middle + error), "fill": "tonexty", "fillcolor": f"{colour}2e"},
            {
                "type": "scatter", "mode": "lines+markers", "name": side, "x": steps, "y": rounded(middle),
                "line": {"color": colour, "dash": "solid" if side == "chosen" else "dash"}, "marker": {"size": 5},
                "hovertemplate": side + " %{y:.3g} nats at step %{x}<extra></extra>",
            },
        ]  # fmt: skip
    last = points.iloc[-1]
    began = "" if onset is None else f" Both fall for good from step {onset} on."
    return Figure(
        caption=f"Log-probs since the start, mean over {int(last['pairs'])} pairs and its 95 % band.{began}",
        alt=f"At step {last['step']}: chosen {last['moved_chosen']:+.3g} nats, rejected {last['moved_rejected']:+.3g} "
        f"nats.{began}",
        data=data, terms=("logps",),
        layout={
            "xaxis": {"title": {"text": "optimiser step"}}, "yaxis": {"title": {"text": "change, nats"}},
            "legend": ROW_LEGEND,
            "shapes": [] if onset is None else [line(x0=onset, x1=onset, y0=0, y1=1, yref="paper", dash="dash")],
        },
    )  # fmt: skip


def regime_areas(points: pd.DataFrame) -> Figure:
    """Shares of the predicted regimes over training."""
    points = points.dropna(subset=["ideal"])
    used = [str(r) for r in REGIMES if points[str(r)].any()]
    last = points.iloc[-1]
    return Figure(
        caption="Predicted regimes over training, % of pairs",
        alt=f"At step {last['step']}: " + ", ".join(f"{spoken(r)} {100 * last[r]:.0f} %" for r in used) + ".",
        data=[
            {
                "type": "scatter", "mode": "lines", "stackgroup": "one", "name": spoken(r), "line": {"width": 0},
                "x": points["step"].tolist(), "y": rounded(100 * points[r]), "fillcolor": COLOURS[r],
                "hovertemplate": spoken(r) + " %{y:.0f} %<extra></extra>",
            }
            for r in used
        ],
        layout={
            "xaxis": {"title": {"text": "optimiser step"}}, "hovermode": "x unified",
            "yaxis": {"title": {"text": "share of pairs, %"}, "range": [0, 100]},
        },
        terms=("regime",),
    )  # fmt: skip


def ledger_areas(ledger: pd.DataFrame, side: str) -> Figure:
    """What the measured change of one response's log-prob came from, cumulated over the steps.

    Causes that have raised it stand above zero, those that have lowered it below; the line is the measured change.
    """
    sums, used = running_sums(ledger, side)
    steps = sums.index.tolist()
    data: list[dict[str, Any]] = []
    for part in used:
        for group, values in (("up", sums[part].clip(lower=0)), ("down", sums[part].clip(upper=0))):
            data.append({
                "type": "scatter", "mode": "lines", "stackgroup": group, "line": {"width": 0}, "x": steps,
                "y": rounded(values), "fillcolor": SHADES[part], "name": MEANINGS[part], "legendgroup": part,
                "showlegend": group == "up", "hoverinfo": "skip",
            })  # fmt: skip
    data.append({
        "type": "scatter", "mode": "lines", "name": "measured", "x": steps, "y": rounded(sums["measured"]),
        "line": {"color": "theme", "width": 2}, "hovertemplate": "%{y:.3g} nats by step %{x}<extra></extra>",
    })  # fmt: skip
    last = sums.iloc[-1]
    rows = [[MEANINGS[part], f"{last[part]:+.3g}"] for part in PARTS] + [
        ["measured", f"{last['measured']:+.3g}"]
    ]
    return Figure(
        caption=f"What moved the {side} log-prob: causes so far, mean over {ledger['index'].nunique()} pairs",
        alt="By the last step, in nats: " + ", ".join(" ".join(row) for row in rows) + ".",
        data=data, terms=("ledger",), height=400,
        layout={
            "xaxis": {"title": {"text": "optimiser step"}}, "yaxis": {"title": {"text": "nats since the start"}},
            "hovermode": "closest", "legend": ROW_LEGEND,
        },
        table=Table(
            f"The {side} log-prob by the last step, nats per pair", [Heading("from", "ledger"), Heading("change")], rows
        ),
    )  # fmt: skip


def across_bars(summary: Mapping[str, Any], side: str) -> Figure:
    """What acts on one log-prob over an epoch: a bar per loss, the parts that raise it right of 0; the mark is the sum.

    Args:
        summary: the aggregates of `entangle across`.
        side: `chosen` or `rejected`.
    """
    rows = {loss: row[side] for loss, row in summary["losses"].items()}
    sizes = {loss: sum(abs(row[part]) for part in NAMES) / 100 or 1.0 for loss, row in rows.items()}
    names = [plain(loss) for loss in rows]
    data: list[dict[str, Any]] = [
        {
            "type": "bar", "orientation": "h", "name": NAMES[part], "y": names, "marker": {"color": PART_COLOURS[part]},
            "x": rounded([row[part] / sizes[loss] for loss, row in rows.items()]),
            "hovertemplate": "%{y}: " + NAMES[part] + " %{x:+.1f} %<extra></extra>",
        }
        for part in NAMES
    ]  # fmt: skip
    data.append({
        "type": "scatter", "mode": "markers", "name": "sum, 95 %", "y": names,
        "x": rounded([row["change"] / sizes[loss] for loss, row in rows.items()]),
        "marker": {"symbol": "diamond", "size": 9, "color": "theme"},
        "error_x": {
            "type": "data", "array": rounded([Z * row["error"] / sizes[loss] for loss, row in rows.items()]),
            "thickness": 1.4, "width": 4, "color": "theme",
        },
        "hovertemplate": "%{y}: all together %{x:+.1f} %<extra></extra>",
    })  # fmt: skip
    said = ", ".join(f"{loss} {row['change'] / sizes[loss]:+.0f} %" for loss, row in rows.items())
    return Figure(
        caption=f"What acts on the mean {side} log-prob over an epoch, % of all that does",
        alt=f"Stacked bars of {len(rows)} losses. The sums: {said}.",
        data=data, height=150 + 30 * len(rows), terms=("across",),
        layout=_bars(f"lowers the {side}  |  raises it, %"),
    )  # fmt: skip


def variant_causes(causes: pd.DataFrame, side: str) -> Figure:
    """What one log-prob's mean change came from, a bar per loss and setting; the mark is the measured change.

    Args:
        causes: `causes` of a `Source`.
        side: `chosen` or `rejected`.
    """
    rows = causes[causes["side"] == side].groupby("variant", sort=False)[["measured", *PARTS]].mean()
    shares = rows.div(rows[list(PARTS)].abs().sum(axis=1), axis=0) * 100  # variants differ in size by far
    names = [plain(variant) for variant in rows.index]
    data: list[dict[str, Any]] = [
        {
            "type": "bar", "orientation": "h", "name": MEANINGS[part], "y": names, "x": rounded(shares[part]),
            "customdata": rounded(rows[part]), "marker": {"color": SHADES[part]},
            "hovertemplate": "%{y}: %{customdata:+.3g} nats (%{x:+.0f} %) from " + MEANINGS[part] + "<extra></extra>",
        }
        for part in PARTS if rows[part].any()
    ]  # fmt: skip
    data.append({
        "type": "scatter", "mode": "markers", "name": "measured", "y": names, "x": rounded(shares["measured"]),
        "customdata": rounded(rows["measured"]), "marker": {"symbol": "diamond", "size": 9, "color": "theme"},
        "hovertemplate": "%{y}: %{customdata:+.3g} nats<extra></extra>",
    })  # fmt: skip
    said = ", ".join(f"{variant} {value:+.2g}" for variant, value in rows["measured"].items())
    return Figure(
        caption=f"What moved the {side} log-prob, mean over pairs and seeds",
        alt=f"Stacked bars of {len(rows)} losses and settings. Measured, in nats: {said}.",
        data=data, height=190 + 30 * len(rows), terms=("ledger",),
        layout=_bars(f"lowered the {side}  |  raised it, % of all that moved it"),
    )  # fmt: skip


def _bars(title: str) -> dict[str, Any]:
    """The layout of horizontal bars, positive parts right of 0 and negative ones left, the first on top."""
    return {
        "barmode": "relative", "xaxis": {"title": {"text": title}, "zeroline": True},
        "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False, "type": "category"},
        "hovermode": "closest", "legend": ROW_LEGEND,
    }  # fmt: skip


def variant_dots(variants: pd.DataFrame) -> Figure:
    """Both log-probs' changes at the last step of every loss and setting of a comparison, with the range over seeds."""
    names = [plain(name) for name in variants["variant"]]
    data = []
    for side, colour in SIDE_COLOURS.items():
        middle, low, high = (variants[f"moved_{side}{end}"] for end in ("", "_low", "_high"))
        data.append({
            "type": "scatter", "mode": "markers", "name": side, "x": rounded(middle), "y": names,
            "marker": {"color": colour, "size": 9, "symbol": "circle" if side == "chosen" else "diamond"},
            "error_x": {
                "type": "data", "symmetric": False, "array": rounded(high - middle),
                "arrayminus": rounded(middle - low), "thickness": 1.3, "width": 3,
            },
            "hovertemplate": "%{y}: " + side + " %{x:.3g} nats<extra></extra>",
        })  # fmt: skip
    said = ", ".join(f"{row['variant']} {row['moved_chosen']:+.2g}" for row in variants.to_dict("records"))
    return Figure(
        caption="Where both log-probs have got to, mean over seeds and the range over seeds",
        alt=f"Change of the chosen log-prob in nats: {said}. All numbers are in the table below.",
        data=data, height=130 + 30 * len(variants), terms=("moved",),
        layout={
            "xaxis": {"title": {"text": "change since the start, nats"}, "zeroline": True},
            "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"}, "hovermode": "closest",
            "legend": ROW_LEGEND,
        },
    )  # fmt: skip


def variant_curves(bands: pd.DataFrame, side: str) -> Figure:
    """One log-prob over training, a line per loss and setting.

    Args:
        bands: rows of `entangle.analysis.curves.over_seeds`.
        side: `chosen` or `rejected`.
    """
    groups = list(bands.groupby("variant", sort=False))
    data = [
        {
            "type": "scatter", "mode": "lines", "name": plain(variant), "x": own["step"].tolist(),
            "y": rounded(own[f"moved_{side}"]),
            "line": {"color": LINES[number % len(LINES)], "dash": DASHES[number // len(LINES) % len(DASHES)]},
            "hovertemplate": plain(variant) + ": %{y:.3g} nats at step %{x}<extra></extra>",
        }
        for number, (variant, own) in enumerate(groups)
    ]  # fmt: skip
    return Figure(
        caption=f"The {side} log-prob over training, mean over seeds",
        alt=f"{len(groups)} curves of the {side} log-prob; where they end is in the table below.",
        data=data, terms=("moved",), height=400,
        layout={
            "xaxis": {"title": {"text": "optimiser step"}},
            "yaxis": {"title": {"text": "change since the start, nats"}}, "hovermode": "closest",
            "legend": {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"},
        },
    )  # fmt: skip

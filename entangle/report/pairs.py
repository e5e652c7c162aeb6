"""Sections of a run of pairs: regimes, the plane, predicted changes, modules, diagnostics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from entangle.analysis.statistics import rank_correlation
from entangle.analysis.summary import derived
from entangle.analysis.wording import spoken
from entangle.figures.correlations import correlation_map
from entangle.figures.modules import layers, module_map
from entangle.figures.pairs import changes, plane, set_spread
from entangle.figures.regimes import regime_bars
from entangle.figures.style import figure_of, new_axes
from entangle.report.blocks import Block, Figure, Heading, Table
from entangle.report.glossary import definition_key
from entangle.report.rows import extra_columns
from entangle.report.source import Source, module_shares
from entangle.tables.base import number, percent


def has_pairs(source: Source) -> bool:
    """Whether a run has pairs that were scored."""
    return source.pairs is not None and bool(source.summary.get("regimes"))


def regime_blocks(source: Source) -> list[Block]:
    """Shares of the regimes per loss."""
    if not has_pairs(source):
        return []
    shares, rho = source.summary["regimes"], source.summary.get("incentive_ratio", {})
    losses = list(shares)
    used = [regime for regime in shares[losses[0]] if any(shares[loss][regime]["count"] for loss in losses)]
    head = [Heading("loss"), Heading("rho (median)", "rho"), *(Heading(spoken(r), "regime") for r in used)]
    rows = [
        [
            loss,
            "inf" if rho.get(loss) is None else number(rho[loss]),
            *(percent(shares[loss][r]) for r in used),
        ]
        for loss in losses
    ]
    said = ", ".join(f"{spoken(r)} {percent(shares[losses[0]][r])} %" for r in used)
    return [
        Figure(
            name="regimes",
            caption="Share of pairs per regime and loss, with the 95 % interval of the ideal share",
            alt=f"Stacked bars of {len(losses)} losses. Under {losses[0]}: {said}. All shares are in the table below.",
            draw=lambda width: figure_of(regime_bars(new_axes(width, 1.2 + 0.3 * len(losses)), shares)),
            width=8.0,
            terms=("regime", "interval"),
            table=Table("Share of pairs per regime, % [95 % interval]", head, rows),
        )
    ]


def plane_blocks(source: Source) -> list[Block]:
    """The plane of norm ratio and cosine."""
    if not has_pairs(source):
        return []
    loss = source.losses[0]
    shares, rho = source.summary["regimes"][loss], source.summary["incentive_ratio"].get(loss)
    judged = source.judged(loss)
    said = ", ".join(
        f"{spoken(regime)} {share['count']}" for regime, share in shares.items() if share["count"]
    )
    middle = derived(source.scored).median()
    whole = source.summary.get("set")
    mark = "" if whole is None or set_spread(whole) is None else "; the diamond is the set as one pair"
    return [
        Figure(
            name="plane",
            caption=f"Every pair: norm ratio against cosine. Below the line of the loss a pair is ideal{mark}",
            alt=f"Scatter plot of {len(judged)} pairs; under {loss}: {said}. Median cosine "
            f"{middle['cosine']:.3f}, median norm ratio {middle['norm_ratio']:.3f}. The table of all pairs has all "
            "numbers.",
            draw=lambda width: figure_of(
                plane(new_axes(width, 5.4), judged, judged["regime"], {loss: rho} if rho else {}, whole)
            ),
            width=8.0,
            is_wide=True,
            live="plane",
            terms=("cosine", "norm_ratio", "band", "rho", "regime"),
        )
    ]


def change_blocks(source: Source) -> list[Block]:
    """What one step does to every pair, and how it compares with real steps where those were made."""
    if not has_pairs(source):
        return []
    assert source.predictions is not None
    judged = source.judged(source.losses[0])
    rows = []
    for loss, part in source.predictions.groupby("loss", sort=False):
        cells = [str(loss)]
        for column in ("change_chosen", "change_rejected"):
            low, middle, high = part[column].quantile([0.05, 0.5, 0.95])
            cells.append(f"{middle:+.3g} [{low:+.3g}, {high:+.3g}]")
        rows.append([*cells, percent(source.summary["regimes"][loss]["ideal"])])
    head = [
        Heading("loss"),
        Heading("chosen", "change"),
        Heading("rejected", "change"),
        Heading("ideal %", "interval"),
    ]
    blocks: list[Block] = [
        Figure(
            name="changes",
            caption="What one step does to every pair: change of the chosen against change of the rejected log-prob",
            alt="Scatter plot of the predicted changes; its quadrants are the regimes. Medians are in the table below.",
            draw=lambda width: figure_of(changes(new_axes(width, 0.84 * width), judged)),
            width=6.4,
            is_wide=True,
            live="changes",
            terms=("change", "regime"),
            table=Table(
                "Predicted change in nats by a step of learning rate 1: median [5 %, 95 % of the pairs]",
                head,
                rows,
            ),
        )
    ]
    if "verification" in source.summary:
        blocks.append(_verification(source.summary["verification"]))
    return blocks


def _verification(verification: Mapping[str, Mapping[str, Any]]) -> Table:
    head = [Heading(text, "verification") for text in ("steps", "signs agree", "slope", "R^2", "error ratio")]
    rows = [
        [
            loss,
            str(row["steps"]),
            f"{row['signs_agree']} of {row['signs_compared']}",
            *(number(row[key], ".4g") for key in ("slope", "r_squared", "error_ratio")),
        ]
        for loss, row in verification.items()
    ]
    return Table("Predictions against one real SGD step per pair and loss", [Heading("loss"), *head], rows)


def module_blocks(source: Source) -> list[Block]:
    """Where the entanglement lives."""
    if source.modules is None or not has_pairs(source):
        return []
    blocks: list[Block] = []
    if (shares := module_shares(source.modules, source.scored)) is not None:
        blocks.append(_module_map(shares))
    if "modules" in source.summary:
        blocks += [_layers(source.summary["modules"]), *_module_tables(source.summary["modules"])]
    return blocks


def _module_map(shares: pd.DataFrame) -> Figure:
    top = shares.nlargest(3, "share").to_dict("records")
    said = ", ".join(f"layer {row['layer']} {row['kind']} {100 * row['share']:.1f} %" for row in top)
    height = 1.4 + 0.25 * shares["kind"].nunique()
    return Figure(
        name="modules",
        caption="Where the entanglement lives: each module's share of the mean cosine, %",
        alt=f"Heat map of kinds of modules over layers (-1: outside). Largest: {said}.",
        draw=lambda width: figure_of(module_map(new_axes(width, height), shares)),
        width=8.0,
        terms=("module_share",),
    )


def _layers(summary: Mapping[str, Any]) -> Figure:
    return Figure(
        name="layers",
        caption="What each layer adds to the mean cosine, and the cosine that it would have alone",
        alt=f"Bars and dots of {len(summary['layers'])} layers. The numbers are in the table of layers.",
        draw=lambda width: figure_of(layers(new_axes(width, 3.2), summary)),
        terms=("module_share", "module_cosine"),
    )


def _module_tables(summary: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Layers and kinds of modules with what they contribute."""
    head = [
        Heading("share of c, %", "module_share"),
        Heading("norms, %", "module_norms"),
        Heading("cosine [5 %, 95 %]", "module_cosine"),
        Heading("chosen falls, %", "module_falls"),
    ]
    return [
        Table(
            caption, [Heading(first), *head], [_module_row(name, row) for name, row in summary[key].items()]
        )
        for key, first, caption in (("layers", "layer", "By layer"), ("kinds", "module", "By kind of module"))
    ]


def _module_row(name: str, row: Mapping[str, Any]) -> list[str]:
    inner, norms = (None if row[key] is None else 100 * row[key] for key in ("inner_share", "norm_share"))
    return [
        name,
        number(inner, ".1f"),
        number(norms, ".1f"),
        f"{number(row['cosine'], '.3f')} [{number(row['low'], '.2f')}, {number(row['high'], '.2f')}]",
        percent(row["chosen_falls"]),
    ]


def column_blocks(source: Source) -> list[Block]:
    """How columns that came with the pairs go with their geometry."""
    extra = extra_columns(source.scored) if has_pairs(source) else []
    if not extra:
        return []
    judged = source.judged(source.losses[0])
    geometry = derived(judged)[["cosine", "norm_ratio", "ratio_chosen", "length_ratio"]]
    geometry = geometry.assign(change_chosen=judged["change_chosen"])
    rows = pd.concat([geometry[[name for name in geometry if name not in extra]], judged[extra]], axis=1)
    found = {name: {other: rank_correlation(rows[name], rows[other]) for other in rows} for name in extra}
    rho = pd.DataFrame({name: {o: rank["rho"] for o, rank in row.items()} for name, row in found.items()}).T
    cells = [[spoken(name), *map(_interval, row.values())] for name, row in found.items()]
    return [
        Figure(
            name="correlations",
            caption=f"Rank correlations of the columns with the geometry and with each other ({len(rows)} pairs)",
            alt="Heat map of Spearman's rank correlations. The numbers are in the table below.",
            draw=lambda width: figure_of(correlation_map(new_axes(width, 2.2 + 0.25 * len(extra)), rho)),
            width=9.0,
            is_wide=True,
            terms=("rank_correlation",),
            table=Table(
                "Spearman's rank correlations [95 % interval]",
                [Heading("column"), *(Heading(spoken(str(n)), definition_key(str(n))) for n in rows)],
                cells,
            ),
        )
    ]


def _interval(correlation: Mapping[str, float]) -> str:
    rho, low, high = (number(correlation[name], ".2f") for name in ("rho", "low", "high"))
    return f"{rho} [{low}, {high}]"

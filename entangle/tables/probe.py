"""The probe's tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.analysis.real_steps import is_refuted, verification_sentences
from entangle.analysis.regimes import REGIMES, Regime
from entangle.analysis.verdict import probe_verdict
from entangle.tables.base import IDEAL_MEANS, REGIME_STYLES, heading, number, percent, plain_table
from entangle.tables.diagnostics import correlation_tables
from entangle.tables.modules import module_tables
from entangle.tables.pairs import pair_cards
from entangle.tables.sets import set_tables


def probe_tables(
    summary: Mapping[str, Any],
    provenance: Mapping[str, Any],
    pairs: pd.DataFrame,
    predictions: pd.DataFrame,
    texts: pd.DataFrame | None,
    worst: int = 3,
) -> RenderableType:
    """All tables of a probe: regimes, groups, distributions, what else was measured, the worst pairs, the verdict.

    Args:
        summary: the run's aggregates.
        provenance: what its numbers were computed from.
        pairs: its rows of pairs.
        predictions: its rows of predictions.
        texts: texts of the pairs, where they were kept.
        worst: pairs that are shown.
    """
    parts: list[RenderableType] = [heading(summary, provenance)]
    losses = list(summary["regimes"])
    if not losses:
        return Group(*parts, "No pair could be scored.")
    if "set" in summary:
        parts.append(set_tables(summary["set"]))
    parts.append(regime_table(summary))
    if "groups" in summary:
        parts.append(group_table(summary))
    parts.append(quantile_table(summary))
    if "modules" in summary:
        parts.append(module_tables(summary["modules"]))
    if "diagnostics" in summary:
        parts.append(correlation_tables(summary["diagnostics"]))
    if "verification" in summary:
        parts.append(verification_table(summary["verification"]))
    parts.append(pair_cards(pairs, predictions, texts, losses[0], worst))
    parts.append(Text(probe_verdict(summary, losses[0]), "bold"))
    if "verification" in summary:
        style = "bold red" if is_refuted(summary["verification"]) else "bold"
        parts += [Text(sentence, style) for sentence in verification_sentences(summary["verification"])]
    return Group(*parts)


def verification_table(verification: Mapping[str, Any]) -> Table:
    """Predicted against measured changes of real SGD steps, per loss."""
    table = Table(title="Predictions against one real SGD step per pair and loss", title_justify="left")
    for column in (
        "loss",
        "steps",
        "signs agree",
        "slope",
        "at first order",
        "R^2",
        "error ratio on halving",
    ):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for loss, row in verification.items():
        table.add_row(
            Text(loss),
            str(row["steps"]),
            f"{row['signs_agree']} of {row['signs_compared']}",
            *(number(row[key], ".4g") for key in ("slope", "slope_first_order", "r_squared", "error_ratio")),
        )
    return table


def regime_table(summary: Mapping[str, Any]) -> Table:
    """Share of pairs per regime and loss, with 95 % intervals."""
    shares = summary["regimes"]
    shown = _occurring(shares)
    table = Table(title=f"Share of pairs per regime, % [95 % interval]\n{IDEAL_MEANS}", title_justify="left")
    table.add_column("loss")
    table.add_column("rho", justify="right")
    for regime in shown:
        table.add_column(regime, justify="right", style=REGIME_STYLES[regime])
    for loss, row in shares.items():
        rho = summary["incentive_ratio"].get(loss)
        table.add_row(Text(loss), "inf" if rho is None else f"{rho:.3g}", *(percent(row[r]) for r in shown))
    return table


def group_table(summary: Mapping[str, Any], losses: int = 3) -> Table:
    """Regimes for each value of the grouping column, under the losses whose verdicts differ most."""
    groups = summary["groups"]
    title = f"By {groups['column']}: ideal / both up / both down, %"
    table = plain_table(title)
    table.add_column(Text(groups["column"]), no_wrap=True)
    table.add_column("cosine", justify="right")
    table.add_column("ideal rho", justify="right", no_wrap=True)
    shown = most_different(groups["values"], losses)
    for loss in shown:
        table.add_column(Text(loss), justify="right")
    for value, group in groups["values"].items():
        band = "-".join("inf" if edge is None else number(edge, ".2f") for edge in group["band"])
        cells = (_split(group["regimes"][loss]) for loss in shown)
        table.add_row(Text(value), number(group["cosine"], ".2f"), band, *cells)
    table.caption = "medians of the two gradients' cosine and of the edges of the ideal band, c/A and B/c"
    return table


def most_different(groups: Mapping[str, Mapping[str, Any]], count: int) -> list[str]:
    """The first loss, then each time the one whose regime counts are farthest from those already chosen."""
    losses = list(next(iter(groups.values()))["regimes"])
    counts = {
        loss: [group["regimes"][loss][regime]["count"] for group in groups.values() for regime in REGIMES]
        for loss in losses
    }

    def distance(loss: str, other: str) -> int:
        return sum(abs(a - b) for a, b in zip(counts[loss], counts[other], strict=True))

    chosen = losses[:1]
    while len(chosen) < min(count, len(losses)):
        rest = [loss for loss in losses if loss not in chosen]
        chosen.append(max(rest, key=lambda loss: min(distance(loss, other) for other in chosen)))
    return sorted(chosen, key=losses.index)


def _split(regimes: Mapping[str, Mapping[str, float]]) -> Text:
    text = Text()
    for regime in (Regime.IDEAL, Regime.BOTH_UP, Regime.BOTH_DOWN):
        text.append("/" if text else "").append(
            f"{100 * regimes[regime]['share']:.0f}", REGIME_STYLES[regime]
        )
    return text


def _occurring(shares: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Regime]:
    """The regimes worth a column: the three usual ones, the others where a pair has them."""
    usual = (Regime.IDEAL, Regime.BOTH_UP, Regime.BOTH_DOWN)
    return [r for r in REGIMES if r in usual or any(row[r]["count"] for row in shares.values())]


def quantile_table(summary: Mapping[str, Any]) -> Table:
    """How cosines and ratios are distributed over the pairs."""
    meanings = {
        "cosine": "cosine of the two gradients",
        "norm_ratio": "norm ratio |g_l| / |g_w|",
        "ratio_chosen": "c / A  (DPO lowers the chosen if above 1)",
        "ratio_rejected": "c / B  (DPO raises the rejected if above 1)",
        "length_ratio": "rejected / chosen tokens",
    }
    table = Table(title="Distribution over the pairs", title_justify="left")
    table.add_column("quantile")
    for quantile in next(iter(summary["quantiles"].values())):
        table.add_column(f"{100 * float(quantile):.0f} %", justify="right")
    for name, meaning in meanings.items():
        values = summary["quantiles"][name].values()
        table.add_row(meaning, *(number(value) for value in values))
    return table

"""Sections of training: what was measured over a run and where it came from, and losses compared."""

from __future__ import annotations

import pandas as pd

from entangle.analysis.curves import SIDES, onset, over_seeds
from entangle.analysis.ledger import MEANINGS, PARTS, describe_change
from entangle.analysis.wording import spoken
from entangle.figures.curves import trajectory
from entangle.figures.ledger import running_sums, stacked
from entangle.figures.style import figure_of, new_axes
from entangle.figures.variants import (
    final_dots,
    ledger_bars,
    margin_and_accuracy,
    per_variant,
    side_bands,
)
from entangle.report.blocks import Block, Figure, Heading, Prose, Table
from entangle.report.source import Source, step_table
from entangle.tables.compare import final_rows
from entangle.tables.sweep import SET_TITLE, set_caption, set_rows


def training_blocks(source: Source) -> list[Block]:
    """The course of the log-probs, of the set, and the ledger."""
    blocks: list[Block] = []
    points = None if source.steps is None else step_table(source.steps)
    if points is not None and len(points) > 1:
        if source.curve is not None and "set_cosine" in source.curve:
            points = source.curve
        blocks.append(_course(points))
    if source.curve is not None and "set_cosine" in source.curve:
        heads, rows = set_rows(source.curve)
        terms = {
            "ideal for rho between": "across",
            "rho": "rho",
            "drift": "drift",
            "others on chosen": "across",
        }
        title = SET_TITLE.format(**source.summary)
        blocks.append(Table(title, [Heading(head, terms.get(head, "")) for head in heads], rows))
        blocks.append(Prose(set_caption(source.curve), is_quiet=True))
    if source.ledger is not None:
        blocks += [_ledger(source.ledger, side) for side in SIDES]
        blocks += [Prose(describe_change(source.ledger, side)) for side in SIDES]
    return blocks


def _course(points: pd.DataFrame) -> Figure:
    last, began = points.iloc[-1], onset(points)
    fell = "" if began is None else f" Both fall for good from step {began} on."
    regimes = ""
    if "ideal" in points:
        shares = points.dropna(subset=["ideal"]).iloc[-1][["ideal", "both_up", "both_down"]]
        regimes = ", ".join(f"{spoken(str(name))} {100 * share:.0f} %" for name, share in shares.items())
        regimes = f" Predicted of the next step: {regimes}."
    return Figure(
        name="training",
        caption=f"Log-probs since the start, mean over {int(last['pairs'])} pairs and its 95 % band, and what one step "
        f"on each pair alone is predicted to do.{fell}",
        alt=f"At step {last['step']}: chosen {last['moved_chosen']:+.3g} nats, rejected {last['moved_rejected']:+.3g} "
        f"nats.{fell}{regimes}",
        draw=lambda width: trajectory(points, began, width, 0.3 * width + 0.6),
        terms=("logps", "regime"),
    )


def _ledger(ledger: pd.DataFrame, side: str) -> Figure:
    last = running_sums(ledger, side)[0].iloc[-1]
    rows = [[MEANINGS[part], f"{last[part]:+.3g}"] for part in PARTS]
    rows.append(["measured", f"{last['measured']:+.3g}"])
    return Figure(
        name=f"ledger-{side}",
        caption=f"What moved the {side} log-prob: causes so far, mean over {ledger['index'].nunique()} pairs",
        alt="By the last step, in nats: " + ", ".join(" ".join(row) for row in rows) + ".",
        draw=lambda width: figure_of(stacked(new_axes(width, 0.45 * width + 1.4), ledger, side)),
        width=8.0,
        terms=("ledger",),
        table=Table(
            f"The {side} log-prob by the last step, nats per pair",
            [Heading("from", "ledger"), Heading("change")],
            rows,
        ),
    )


def comparison_blocks(source: Source) -> list[Block]:
    """Losses and settings over training, where they have got to, and what did it."""
    if source.variants is None:
        return []
    variants, start = source.variants, source.summary.get("start", {})
    blocks: list[Block] = []
    if source.curves is not None:
        blocks += _curves(over_seeds(source.curves), variants)
    if (causes := source.causes) is not None:
        measured = causes[causes["side"] == "chosen"].groupby("variant", sort=False)["measured"].mean()
        said = ", ".join(f"{variant} {value:+.2g}" for variant, value in measured.items())
        blocks.append(
            Figure(
                name="causes",
                caption="What moved both log-probs, mean over pairs and seeds",
                alt=f"Stacked bars of {len(measured)} losses and settings. Measured of the chosen, in nats: {said}.",
                draw=lambda width: ledger_bars(causes, width),
                width=10.0,
                is_wide=True,
                terms=("ledger",),
            )
        )
    said = ", ".join(f"{row['variant']} {row['moved_chosen']:+.2g}" for row in variants.to_dict("records"))
    blocks.append(
        Figure(
            name="final",
            caption="Where they have got to, mean and range over seeds; the dashed line is before training",
            alt=f"Change of the chosen log-prob in nats: {said}. All numbers are in the table below.",
            draw=lambda width: final_dots(variants, start, width),
            width=12.5,
            is_wide=True,
            terms=("moved",),
        )
    )
    heads, rows = final_rows(variants, start)
    keys = {"chosen": "moved", "rejected": "moved", "both fell": "both_fell", "predicted to": "regime"}
    keys |= {"accuracy": "margin_grew", "ROUGE-L": "summaries", "length": "summaries"}
    title = f"At step {variants['step'].max():.0f}: mean over seeds ± half the range; changes in nats, shares in %"
    table = Table(title, [Heading(head or "loss and setting", keys.get(head, "")) for head in heads], rows)
    return [*blocks, table]


def _curves(bands: pd.DataFrame, variants: pd.DataFrame) -> list[Figure]:
    count = len(variants)
    return [
        Figure(
            name="logps",
            caption="Both log-probs over training, mean and range over seeds",
            alt=f"{count} panels of two curves each; where they end is in the table below.",
            draw=lambda width: per_variant(bands, side_bands, width),
            width=12.0,
            is_wide=True,
            terms=("moved",),
        ),
        Figure(
            name="margin",
            caption="Growth of the margin, and the share of pairs whose margin has grown (dashed), over training",
            alt=f"{count} panels of two curves each; where they end is in the table below.",
            draw=lambda width: per_variant(bands, margin_and_accuracy, width),
            width=12.0,
            is_wide=True,
            terms=("moved", "margin_grew"),
        ),
    ]

"""Sections of training: what was measured over a run and where it came from, and losses compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from entangle.analysis.agreement import drift_sentence
from entangle.analysis.curves import SIDES, onset, over_seeds
from entangle.analysis.drift import (
    agreement_sentence,
    beside_predicted,
    measured_drifts,
    of_probes,
    of_runs,
    runs_sentence,
)
from entangle.analysis.ledger import MEANINGS, PARTS, describe_change
from entangle.analysis.wording import spoken
from entangle.figures.curves import trajectory
from entangle.figures.ledger import running_sums, stacked
from entangle.figures.sets import drift_course, drift_dots, is_bounded
from entangle.figures.style import figure_of, new_axes
from entangle.figures.variants import (
    final_dots,
    ledger_bars,
    margin_and_accuracy,
    per_variant,
    side_bands,
)
from entangle.report.blocks import Block, Figure, Heading, Prose, Table
from entangle.report.source import Source, set_course, step_table
from entangle.tables.compare import final_rows
from entangle.tables.sweep import SET_TITLE, set_caption, set_rows


def training_blocks(source: Source) -> list[Block]:
    """The course of the log-probs, of the set, and the ledger."""
    blocks: list[Block] = []
    points = None if source.steps is None else step_table(source.steps)
    course = set_course(source)
    if points is not None and len(points) > 1:
        blocks.append(_course(_with_set(points, course)))
        blocks += _drifts(source)
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


def _with_set(points: pd.DataFrame, course: pd.DataFrame | None) -> pd.DataFrame:
    """The course of the pairs with the columns of the set beside it."""
    if course is None:
        return points
    new = [name for name in course if name == "step" or str(name) not in points]
    return points.merge(course[new], on="step", how="left")


def _drifts(source: Source) -> list[Block]:
    """Predicted beside measured drift, in a figure and in words; the set's in the optimiser's metric if it is known."""
    assert source.steps is not None
    metric = "adamw" if set_course(source, "adamw") is not None else "sgd"
    table = beside_predicted(measured_drifts(source.steps), set_course(source, metric), metric)
    if table.empty:
        return []
    rows = [
        [
            f"{row['step']} to {row['until']}",
            _drift(row, "predicted"),
            _drift(row, "measured"),
            f"{row['measured_margin']:+.3g}",
            {True: "yes", False: "no"}.get(row["agrees"], "not known"),
        ]
        for row in table.to_dict("records")
    ]
    of, said = table["of"].iloc[0], agreement_sentence(table)
    if not any(is_bounded(table, name).any() for name in ("predicted", "measured")):
        return [Prose(said)]
    return [
        Figure(
            name="drift",
            caption=f"Drift predicted from {of} beside the measured one, 95 % intervals",
            alt=f"Two marks for each of {len(table)} intervals between probes. {said}",
            draw=lambda width: figure_of(drift_course(new_axes(width, 0.42 * width + 1.2), table)),
            terms=("drift", "set"),
            table=Table(
                f"Drift: predicted from {of} at a probe, measured until the next, nats of both per nat of margin",
                [Heading("steps"), *(Heading(name, "drift") for name in ("predicted", "measured"))]
                + [Heading("margin gained, nats"), Heading("agree")],
                rows,
            ),
        ),
        Prose(said),
    ]


def _drift(row: Mapping[Any, Any], name: str) -> str:
    """A drift with its interval; in words where there is none."""
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if value != value:
        return "no margin"
    if not (math.isfinite(low) and math.isfinite(high)):
        return "not known"
    return f"{value:+.2g} [{low:+.2g}, {high:+.2g}]"


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
    blocks += _compared_drifts(source)
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


def _compared_drifts(source: Source) -> list[Block]:
    """Predicted against measured drift of a comparison, in a figure and in words: the set's where it is known."""
    found = source.summary.get("drift_agreement")
    if found and source.drifts is not None and "measured_drift_low" in source.drifts:
        table, of, said = (
            of_probes(source.drifts),
            "the set predicts until the next probe",
            drift_sentence(found),
        )
    elif source.curves is not None and "predicted_chosen" in source.curves:
        table, of = of_runs(source.curves), "each pair alone predicts over a run"
        said = runs_sentence(table)
    else:
        return []
    if table["predicted"].isna().all():
        return []
    return [
        Figure(
            name="drift",
            caption=f"Drift that {of} against the measured one, with 95 % intervals; on the line they agree",
            alt=f"A mark for each of {len(table)} rows. {said}",
            draw=lambda width: figure_of(drift_dots(new_axes(min(width, 6.5), 5.0), table)),
            terms=("drift",),
        ),
        Prose(said),
    ]


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

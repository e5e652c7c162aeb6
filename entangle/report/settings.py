"""Sections of what would change a run: other losses and settings, and what other pairs do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from entangle.analysis.decision import HARMFUL
from entangle.analysis.findings import epoch_sentence, ratio_text, set_sentence
from entangle.analysis.verdict import is_idle, recommendation
from entangle.figures.epochs import parts_figure
from entangle.figures.settings import knob_curve
from entangle.figures.style import figure_of, new_axes
from entangle.report.blocks import Block, Figure, Heading, Prose, Table
from entangle.report.pairs import has_pairs
from entangle.report.source import Source
from entangle.report.verdict import probe_decision
from entangle.tables.base import number, percent
from entangle.tables.whatif import setting_text, until_text


def what_if_blocks(source: Source) -> list[Block]:
    """The recommendation, the smallest change of every knob, and the knobs that help."""
    if source.what_if is None:
        return []
    summary = source.what_if.summary
    is_harmful = has_pairs(source) and probe_decision(source).verdict == HARMFUL
    blocks: list[Block] = [Prose(recommendation(summary, is_harmful=is_harmful))]
    if source.what_if.is_sampled:
        judged, scored = summary["pairs"]["scored"], source.what_if.of
        blocks.append(
            Prose(
                f"On a random sample: {judged} of the {scored} scored pairs. The set is that of all.",
                is_quiet=True,
            )
        )
    if summary["changes"]:
        blocks.append(_changes(summary))
        idle = [change["knob"] for change in summary["changes"] if is_idle(change)]
        if idle:
            blocks.append(
                Prose(f"No setting of {', '.join(idle)} does better than the start.", is_quiet=True)
            )
        curves = source.what_if.curves
        blocks += [
            _knob(curves, change, summary["target"]) for change in summary["changes"] if not is_idle(change)
        ]
    blocks.append(Prose("Limits: " + " ".join(summary["limits"]), is_quiet=True))
    return blocks


def knob_figures(source: Source) -> list[Figure]:
    """A figure for every knob that helps."""
    if source.what_if is None:
        return []
    summary = source.what_if.summary
    return [
        _knob(source.what_if.curves, change, summary["target"])
        for change in summary["changes"]
        if not is_idle(change)
    ]


def _changes(summary: Mapping[str, Any]) -> Table:
    head = [
        Heading("knob", "knob"),
        Heading("setting", "knob"),
        Heading("up to", "knob"),
        Heading("ideal %", "interval"),
        Heading("both up %", "regime"),
        Heading("both down %", "regime"),
        Heading("margin growth", "margin_growth"),
        Heading("margin kept %", "margin_kept"),
    ]
    rows = []
    for change in summary["changes"]:
        at = change["at_setting"]
        kept = at["margin_efficiency_median"]
        rows.append(
            [
                change["knob"],
                setting_text(change),
                until_text(change),
                *(percent(at["regimes"][regime]) for regime in ("ideal", "both_up", "both_down")),
                number(at["margin_change_median"]),
                number(None if kept is None else 100 * kept, ".0f"),
            ]
        )
    title = (
        f"Smallest change that makes {100 * summary['target']:g} % of the pairs ideal, from {summary['base']}"
    )
    return Table(title, head, rows)


def _knob(curves: pd.DataFrame, change: Mapping[str, Any], target: float) -> Figure:
    """Stacked regime shares along one knob, with the setting that was found and the target."""
    before, after = change["at_start"]["regimes"]["ideal"], change["at_setting"]["regimes"]["ideal"]
    found = "no setting does better than the start"
    if not is_idle(change):
        verb = "reaches the target" if change["reaches"] else "has most ideal pairs"
        found = f"{change['setting']:.3g} (line) {verb}: {percent(after)} % ideal"
    return Figure(
        name=f"knob-{change['knob']}",
        caption=f"{change['title'][:1].upper()}{change['title'][1:]}, from {change['at_start']['label']}: {found}",
        alt=f"Stacked areas of the regimes' shares along {change['title']}. Ideal at the start: {percent(before)} %; "
        f"{found}.",
        draw=lambda width: figure_of(knob_curve(new_axes(width, 0.5 * width + 1.1), curves, change, target)),
        terms=("knob", "regime"),
    )


def epoch_blocks(source: Source) -> list[Block]:
    """What all other pairs of the set do to a pair over an epoch."""
    if source.across is None:
        return []
    summary = source.across
    rows = [
        [
            loss,
            ratio_text(row["rho"]),
            percent(row["regimes_alone"]["both_down"]),
            percent(row["regimes_epoch"]["both_down"]),
        ]
        for loss, row in summary["losses"].items()
    ]
    head = [
        Heading("loss"),
        Heading("rho", "rho"),
        Heading("both down, alone", "regime"),
        Heading("both down, epoch", "across"),
    ]
    return [
        Prose(set_sentence(summary)),
        Prose(epoch_sentence(summary)),
        Figure(
            name="across",
            caption="What acts on the mean log-probs over an epoch: left of 0 what lowers them, right what raises them",
            alt=f"Stacked bars of {len(rows)} losses for both responses. {epoch_sentence(summary)}",
            draw=lambda width: parts_figure(summary, width),
            width=9.0,
            is_wide=True,
            terms=("across",),
        ),
        Table(
            "Pairs that lose both log-probs, % [95 % interval]: in one step alone, and over an epoch",
            head,
            rows,
        ),
    ]

"""The section of the set: what all pairs together do, under which loss, in which layers, from which kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from entangle.analysis.geometry import SIDES
from entangle.analysis.set_verdict import finding, set_verdict, steady_sentence
from entangle.figures.sets import FINDINGS, drift_bars, kind_blocks, known_changes, set_layers
from entangle.figures.style import figure_of, new_axes
from entangle.report.blocks import Block, Figure, Heading, Prose, Table
from entangle.report.source import Source
from entangle.tables.base import number
from entangle.tables.sets import cosine_interval, geometry_text, interval, interval_text, ratio


def set_blocks(source: Source) -> list[Block]:
    """Drift by loss, the block by layer and by kind, of a run that has measured the set."""
    content = source.set if source.set is not None else source.summary.get("set")
    if content is None or "losses" not in content or source.pairs is None or not content["losses"]:
        return []
    blocks: list[Block] = [Prose(geometry_text(content).plain.strip()), _drift(content)]
    if len(content.get("layers", ())) > 1:
        blocks.append(_layers(content))
    if "kinds" in content:
        blocks.append(_kinds(content["kinds"], next(iter(content["losses"]))))
    return blocks


def _drift(content: Mapping[str, Any]) -> Figure:
    losses = content["losses"]
    rows = []
    for loss, move in losses.items():
        drift = move["drift"]
        known = "no margin gained" if drift["value"] is None else f"{drift['value']:+.3g}"
        has_ends = drift["low"] is not None and drift["high"] is not None
        rows.append(
            [
                loss,
                ratio(move),
                known if has_ends or drift["value"] is None else "not known",
                interval_text(drift),
                *(interval(move[name]) for name in ("chosen", "rejected", "margin")),
                FINDINGS[finding(move)][0],
            ]
        )
    first = next(iter(losses))
    return Figure(
        name="set-drift",
        caption=f"Drift of the set of {content['pairs']} pairs by loss, with 95 % intervals: beyond the dashed lines "
        "at -1/2 and 1/2 both mean log-probs move alike",
        alt=f"A mark and its interval for each of {len(losses)} losses. {set_verdict(content, first)} "
        f"{steady_sentence(content)}",
        draw=lambda width: figure_of(drift_bars(new_axes(width, 1.6 + 0.32 * len(losses)), losses)),
        width=8.0,
        terms=("set", "drift", "interval"),
        table=Table(
            "The set under every loss: mean changes of log-probs in nats, by a step of learning rate 1 [95 % interval]",
            [
                Heading("loss"),
                Heading("rho of means", "rho"),
                Heading("drift", "drift"),
                Heading("95 % interval", "interval"),
                Heading("chosen", "change"),
                Heading("rejected", "change"),
                Heading("margin", "change"),
                Heading("the two", "regime"),
            ],
            rows,
        ),
    )


def _layers(content: Mapping[str, Any]) -> Figure:
    layers = content["layers"]
    rows = [
        [
            name,
            *(interval(block[key]) for key in ("sq_chosen", "inner", "sq_rejected")),
            cosine_interval(block),
        ]
        for name, block in layers.items()
    ]
    most = max(layers, key=lambda name: layers[name]["inner"]["value"] or 0.0)
    share = 100 * (layers[most]["inner"]["value"] or 0.0) / (content["inner"]["value"] or np.nan)
    return Figure(
        name="set-layers",
        caption="Where the set is entangled: each layer's part of the product of the mean scores, and its own cosine, "
        "95 % intervals",
        alt=f"Dots with intervals for {len(layers)} layers. Largest part: layer {most}, {number(share, '.0f')} %.",
        draw=lambda width: set_layers(content, width),
        width=9.0,
        terms=("set", "cosine"),
        table=Table(
            "The set's block by layer [95 % interval]",
            [
                Heading("layer"),
                *(Heading(name, "set") for name in ("U_ww", "U_wl", "U_ll")),
                Heading("cosine", "cosine"),
            ],
            rows,
        ),
    )


def _kinds(kinds: Mapping[str, Any], loss: str) -> Figure:
    block, names = kinds["block"], list(dict.fromkeys(row["of"] for row in kinds["block"]))
    lowered = known_changes(block, names, loss, "chosen")
    if (lowered < 0).any():
        of, by = np.unravel_index(np.nanargmin(lowered), lowered.shape)
        said = f"Most lowered: the chosen log-prob of {names[of]} by a step on {names[by]} ({lowered[of, by]:+.3g})."
    else:
        said = "No kind is known to lower the chosen log-prob of another."
    rows = [
        [f"{row['of']}, by {row['by']}", *(interval(row["losses"][loss][side]) for side in SIDES)]
        for row in block
    ]
    return Figure(
        name="set-kinds",
        caption=f"Which {kinds['column']} pulls which down: change of a row's mean log-probs by a step of {loss} on "
        f"pairs of a column; cells whose sign isn't known are empty. {said}",
        alt=f"Two heat maps of {len(names)} by {len(names)} kinds. {said}",
        draw=lambda width: kind_blocks(kinds, loss, width),
        width=10.0,
        terms=("set", "change"),
        table=Table(
            f"Nats by a step of learning rate 1 under {loss} [95 % interval]",
            [Heading(f"{kinds['column']}"), *(Heading(side, "change") for side in SIDES)],
            rows,
        ),
    )

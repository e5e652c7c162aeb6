"""The set of pairs as one pair, as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.analysis.set_verdict import (
    FALL,
    IDEAL,
    INVERTED,
    RISE,
    UNKNOWN,
    UNSURE,
    finding,
    steady_sentence,
)
from entangle.tables.base import number, plain_table

WORDS = {
    UNKNOWN: ("too few pairs", "dim"),
    RISE: ("both rise", "yellow"),
    FALL: ("both fall", "red"),
    IDEAL: ("they part", "green"),
    INVERTED: ("swapped: chosen falls", "magenta"),
    UNSURE: ("one of two: can't tell", "dim"),
}


def set_tables(content: Mapping[str, Any]) -> RenderableType:
    """The set's geometry, its drift under every loss, and the losses under which it has none.

    What it means for the first loss is the last sentence of a probe's tables (`probe_verdict`).

    Args:
        content: a summary's `set`.
    """
    parts: list[RenderableType] = [geometry_text(content), drift_table(content)]
    parts.append(Text(f"{steady_sentence(content)}\n"))
    return Group(*parts)


def geometry_text(content: Mapping[str, Any]) -> Text:
    """Cosine, norm ratio and band of the mean scores, with intervals; nothing that can't be is stated as a fact."""
    parallel, cosine = content["may_be_parallel"], cosine_interval(content)
    low, high = content["band"]
    if parallel:
        band = "so it may be that no loss can part them"
    else:
        band = f"the two part for rho between {interval(low)} and {interval(high)}"
    return Text(
        f"The set as one pair (mean scores of {content['pairs']} pairs of {content['prompts']} prompts, in "
        f"{content['groups']} groups): cosine {cosine}; norm ratio {interval(content['norm_ratio'])}; {band}.\n"
    )


def cosine_interval(content: Mapping[str, Any]) -> str:
    """Cosine of the mean scores with its interval; one that may as well be 1 says so, and isn't printed as 1.

    >>> cosine_interval({"may_be_parallel": True, "cosine": {"value": 1.0, "low": 0.989, "high": 1.0}})
    'above 0.989, it may as well be 1'
    """
    cosine = content["cosine"]
    if not content["may_be_parallel"]:
        return interval(cosine, ".3f")
    if cosine["value"] is not None and cosine["value"] >= 1 and cosine["low"] is not None:
        return f"above {cosine['low']:.3f}, it may as well be 1"
    return f"{interval(cosine, '.3f')}, which may as well be 1"


def drift_table(content: Mapping[str, Any]) -> Table:
    """A row per loss: rho (mean d_w over mean d_l), drift with its interval, and which way both mean log-probs go."""
    title = "The set: nats by which both log-probs move per nat of margin (between -1/2 and 1/2 they part)"
    table = plain_table(title, padding=(0, 1, 0, 0))
    for name in ("loss", "rho of\nmeans", "drift", "95 % interval", "the two"):
        table.add_column(name, justify="left" if name in ("loss", "the two") else "right")
    for loss, move in content["losses"].items():
        words, style = WORDS[finding(move)]
        drift = move["drift"]
        table.add_row(
            Text(loss), ratio(move), _signed(drift["value"]), interval_text(drift), Text(words, style)
        )
    return table


def finding_table(content: Mapping[str, Any], base: str) -> Table:
    """A row per kind of finding, with the losses that it holds for and their drifts, the base loss first.

    Args:
        content: a what-if's `set`.
        base: the loss that the knobs start from.
    """
    table = plain_table(
        "The set: what both log-probs do, and under which losses (drift)", padding=(0, 1, 0, 0)
    )
    table.add_column("the two", no_wrap=True)
    table.add_column("losses", overflow="fold")
    by_finding: dict[str, list[str]] = {}
    for loss, move in sorted(content["losses"].items(), key=lambda item: item[0] != base):
        shown = _signed(move["drift"]["value"])
        by_finding.setdefault(finding(move), []).append(loss if shown == "-" else f"{loss} ({shown})")
    for what in (IDEAL, UNSURE, RISE, FALL, INVERTED, UNKNOWN):
        if what in by_finding:
            words, style = WORDS[what]
            table.add_row(Text(words, style), Text(", ".join(by_finding[what])))
    return table


def set_change_table(content: Mapping[str, Any]) -> Table:
    """A row per knob: the smallest setting that keeps the set from drifting, and what it costs in margin."""
    title = (
        "Smallest change that keeps the set from drifting (margin: mean nats, by a step of learning rate 1)"
    )
    table = plain_table(title, padding=(0, 1, 0, 0))
    for name in ("knob", "setting", "drift", "95 % interval", "margin", "before", "chosen rises\nfrom"):
        table.add_column(name, justify="left" if name == "knob" else "right")
    for change in content["changes"]:
        after, before = change["at_setting"], change["at_start"]["margin"]["value"]
        row = ["none", "", "", ""]
        if after is not None:
            drift = after["drift"]
            row = [
                f"{change['setting']:.3g}",
                _signed(drift["value"]),
                interval_text(drift),
                number(after["margin"]["value"]),
            ]
        table.add_row(change["knob"], *row, number(before), number(change["stops"]))
    return table


def ratio(move: Mapping[str, Any]) -> str:
    """Mean incentive on the chosen over that on the rejected side."""
    chosen, rejected = move["incentive_chosen"], move["incentive_rejected"]
    if not rejected:
        return "inf" if chosen else "-"
    return f"{chosen / rejected:.3g}"


def interval(estimate: Mapping[str, Any], form: str = ".3g") -> str:
    """`0.94 [0.86, 0.98]`: a number and its interval; the number alone where that has no end."""
    if estimate["low"] is None or estimate["high"] is None:
        return number(estimate["value"], form) if estimate["value"] is not None else "unbounded"
    return f"{number(estimate['value'], form)} [{estimate['low']:{form}}, {estimate['high']:{form}}]"


def interval_text(estimate: Mapping[str, Any]) -> str:
    """The interval alone."""
    low, high = estimate["low"], estimate["high"]
    if low is None and high is None:
        return "everything"
    ends = (-math.inf if low is None else low, math.inf if high is None else high)
    return f"{ends[0]:+.2g} to {ends[1]:+.2g}"


def _signed(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:+.2g}"

"""Groups of answers under a step, as tables for a terminal: the finding first, then where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.analysis.group_verdict import WHERE, group_verdict
from entangle.analysis.real_steps import is_refuted, verification_sentences
from entangle.analysis.set_verdict import UNKNOWN, UNSURE, finding
from entangle.analysis.wording import visible
from entangle.tables.base import number, percent, plain_table
from entangle.tables.sets import WORDS, interval


def group_tables(content: Mapping[str, Any]) -> RenderableType:
    """What one step does to correct and incorrect answers: in words, by step, and by where it comes from.

    Args:
        content: a summary's `groups`.
    """
    said = group_verdict(content)
    parts: list[RenderableType] = [Text(said[0], "bold"), *(Text(sentence) for sentence in said[1:]), Text()]
    if content["prompts"]["mixed"]:
        parts += [move_table(content), part_table(content), geometry_text(content)]
    if content.get("tokens"):
        parts.append(token_table(content["tokens"]))
    if "verification" in content:
        parts.append(verification_text(content["verification"]))
    return Group(*parts)


def move_table(content: Mapping[str, Any]) -> Table:
    """A row per step: displaced prompts, mean changes of the groups' own answers, drift of all three kinds."""
    table = plain_table(
        "One step on groups of answers (changes: nats, by a step of learning rate 1)", padding=(0, 1, 0, 0)
    )
    for name in (
        "step",
        "displaced\n%",
        "correct",
        "incorrect",
        "enough\nweight",
        *(f"{w}\ndrift" for w in WHERE),
    ):
        table.add_column(name, justify="left" if name == "step" else "right", no_wrap=True)
    for step in content["steps"]:
        moved = content["displaced"][step]
        enough = content["damping"][step]["least"]
        row = [
            percent(moved["prompts"]),
            f"{moved['change_correct']:+.3g}",
            f"{moved['change_incorrect']:+.3g}",
            "any" if enough is None or enough == math.inf else number(enough),
        ]
        table.add_row(step, *row, *(_drift(content[where], step) for where in WHERE))
    table.caption = (
        "displaced: prompts whose mean correct answer falls; enough weight: on incorrect answers, so that in no prompt "
        "it does; drift: nats of both per nat by which they part (beyond 1/2 both rise, below -1/2 both fall; ?: too "
        "few prompts to tell)"
    )
    table.caption_justify = "left"
    return table


def part_table(content: Mapping[str, Any]) -> Table:
    """Of the first step: what moves the mean correct and the mean incorrect answer."""
    step = content["steps"][0]
    table = plain_table(f"{step}: where the change comes from (means over prompts)", padding=(0, 1, 0, 0))
    for name in ("of", "change", "own", "by the other correct", "by the other incorrect"):
        table.add_column(name, justify="left" if name == "of" else "right")
    for side, part in content["parts"][step].items():
        numbers = (part[name] for name in ("change", "own", "by_correct", "by_incorrect"))
        table.add_row(f"{side} answers", *(f"{value:+.3g}" for value in numbers))
    return table


def geometry_text(content: Mapping[str, Any]) -> Text:
    """Cosine and band of the mean correct and the mean incorrect score, for each kind of answers."""
    lines = []
    for where, meaning in WHERE.items():
        part = content[where]
        if part is None:
            lines.append(f"{where}: not measured")
            continue
        low, high = part["band"]
        band = (
            "which may as well be 1: it may be that no weights part them"
            if part["may_be_parallel"]
            else f"they part for rho between {interval(low)} and {interval(high)}"
        )
        lines.append(
            f"{where} ({meaning}; {part['prompts']} prompts): cosine {interval(part['cosine'], '.3f')}, {band}"
        )
    return Text(
        "Mean correct against mean incorrect score (rho = 1 for equal weights)\n" + "\n".join(lines) + "\n"
    )


def token_table(tokens: Sequence[Mapping[str, Any]]) -> Table:
    """The tokens of incorrect answers whose punishment costs the correct ones most, as text that is only shown."""
    table = plain_table("Tokens of incorrect answers that cost the correct ones most", padding=(0, 1, 0, 0))
    for name in ("prompt", "answer", "position", "product", "token"):
        table.add_column(name, justify="left" if name == "token" else "right")
    for row in tokens:
        numbers = (str(row[name]) for name in ("index", "answer", "position"))
        table.add_row(*numbers, number(row["product"]), Text(visible(row["token"])))
    table.caption = (
        "product of the token's score with the mean correct score: lowering the one lowers the other"
    )
    table.caption_justify = "left"
    return table


def verification_text(verification: Mapping[str, Any]) -> Text:
    """How far real steps agree with the predictions, and which limits they break."""
    checked = verification["all"]
    if not checked["steps"]:
        return Text("No step could be taken for real: no prompt has answers on both sides.\n", "yellow")
    measured = (
        f"Checked by {checked['steps']} real steps on {checked['prompts']} prompts: {checked['signs_agree']} of "
        f"{checked['signs_compared']} signs of the answers' changes agree; halving a step divides the error by "
        f"{number(checked['error_ratio'])} (4 if exact to first order)."
    )
    style = "red" if is_refuted(verification) else "green"
    return Text("\n".join([measured, *verification_sentences(verification)]) + "\n", style)


def _drift(part: Mapping[str, Any] | None, step: str) -> Text:
    if part is None:
        return Text("-")
    move = part["moves"][step]
    what, drift = finding(move), move["drift"]["value"]
    doubt = " ?" if what in (UNKNOWN, UNSURE) else ""
    return Text(("-" if drift is None or drift != drift else f"{drift:+.2g}") + doubt, WORDS[what][1])

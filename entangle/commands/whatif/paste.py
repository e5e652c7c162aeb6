"""The change that a what-if recommends, as lines for the file or command that trains with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entangle.analysis.hyperparameters import KNOBS, Knob
from entangle.analysis.set_verdict import IDEAL, best_set_change, finding
from entangle.analysis.trl_lines import trl_lines
from entangle.analysis.verdict import cheapest_change, fewest_falls
from entangle.commands.whatif.scored import ScoredPairs
from entangle.commands.whatif.set import ScoredSet
from entangle.config.specs import spec_text, to_spec
from losses import CATALOGUE, PreferenceLoss

GOALS = {
    "part": "keeps the set from drifting",
    "rise": "lets the set's mean chosen log-prob rise",
    "ideal": "makes the share of pairs asked for ideal",
    "falls": "lets the chosen log-prob fall on the fewest pairs",
}
"""What a recommended change is for."""

TRL_TERM = "nll_batch"
"""The knob that TRL has lines for where its DPOTrainer has none for the recommended one."""


def lines_to_paste(
    summary: Mapping[str, Any], pairs: ScoredPairs, whole: ScoredSet | None, base: PreferenceLoss
) -> dict[str, Any] | None:
    """The recommended change, for TRL where its DPOTrainer has it, and for `entangle train`.

    Where TRL hasn't the recommended knob, its own NLL term at the smallest weight that does the same stands in.

    Args:
        summary: of the what-if, with its changes.
        pairs: its scored pairs.
        whole: its set, where the probe has one.
        base: the loss that the knobs start from.

    Returns:
        does (what it is for), knob, setting, loss, lines (None where TRL has none) and spec (None where no trainer here
        has it); None where no change is recommended.
    """
    found = recommended(summary)
    if found is None:
        return None
    goal, knob, setting = found
    loss = KNOBS[knob].loss(base, setting)
    if trl_lines(loss) is None and trl_lines(KNOBS[TRL_TERM].loss(base, 1.0)) is not None:
        weight = _setting(goal, KNOBS[TRL_TERM], pairs, whole, base, summary)
        if weight:
            knob, setting, loss = TRL_TERM, weight, KNOBS[TRL_TERM].loss(base, weight)
    return {
        "does": GOALS[goal],
        "knob": knob,
        "setting": setting,
        "loss": loss.label,
        "lines": trl_lines(loss),
        "spec": spec_text(to_spec(loss)) if loss.name in CATALOGUE else None,
    }


def recommended(summary: Mapping[str, Any]) -> tuple[str, str, float] | None:
    """Goal, knob and setting of the change that the recommendation names first; None where it names none."""
    whole = summary.get("set")
    if whole is not None and finding(whole["losses"][summary["base"]]) != IDEAL:
        best = best_set_change(whole["changes"])
        if best is not None:
            return None if best["setting"] == best["start"] else ("part", best["knob"], best["setting"])
        stops = [change for change in whole["changes"] if change["stops"] not in (None, change["start"])]
        if stops:
            return "rise", stops[0]["knob"], stops[0]["stops"]
    change = cheapest_change(summary["changes"])
    if change is not None and change["setting"] != change["start"]:
        return "ideal", change["knob"], change["setting"]
    for change in fewest_falls(summary):  # not at the price of ideal pairs
        falls = change["falls"]
        if falls["at_setting"]["regimes"]["ideal"]["count"] >= summary["regimes"]["ideal"]["count"]:
            return "falls", change["knob"], falls["setting"]
    return None


def _setting(
    goal: str,
    knob: Knob,
    pairs: ScoredPairs,
    whole: ScoredSet | None,
    base: PreferenceLoss,
    summary: Mapping[str, Any],
) -> float | None:
    """The smallest setting of a knob that reaches a goal; None where none does."""
    if goal in ("part", "rise") and whole is not None:
        return whole.smallest_change(knob, base)["setting" if goal == "part" else "stops"]
    change = pairs.change(knob, base, *pairs.interval(knob, base), summary["target"])
    if goal == "ideal":
        return change["setting"] if change["reaches"] else None
    best = min(other["falls"]["after"]["count"] for other in summary["changes"])
    return change["falls"]["setting"] if change["falls"]["after"]["count"] <= best else None

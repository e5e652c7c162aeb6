"""Is it harmful, since when, on which pairs, and what would stop it: decided once, by the strongest evidence there is.

Evidence counts in this order: log-probs that training has changed; an epoch over the very pairs (`entangle across`, or
the set's own block); one step on each pair alone. What only a weaker one says is never stated against a stronger one.
A change is harmful if the mean chosen log-prob is below its start beyond the 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from entangle.analysis.curves import onset
from entangle.analysis.regimes import Regime
from entangle.analysis.set_verdict import rounded
from entangle.analysis.statistics import Z
from entangle.analysis.verdict import GOOD, is_good
from entangle.analysis.wording import share_text

HARMFUL, HARMLESS, OPEN = "harmful", "not harmful", "can't tell"


@dataclass(frozen=True)
class Change:
    """Mean changes of both log-probs with 95 % intervals, (value, low, high) each; infinite ends where unknown."""

    chosen: tuple[float, float, float]
    rejected: tuple[float, float, float]
    unit: str

    @property
    def verdict(self) -> str:
        """By the chosen response."""
        _, low, high = self.chosen
        return HARMFUL if high < 0 else HARMLESS if low > 0 else OPEN

    @property
    def text(self) -> str:
        """Both, with their intervals."""
        return f"chosen {number(self.chosen)}, rejected {number(self.rejected)} {self.unit}"


@dataclass(frozen=True)
class Decision:
    """What stands at the top of a page.

    Args:
        verdict: HARMFUL, HARMLESS or OPEN.
        headline: the decision in a sentence, with its number.
        details: further sentences: since when, which pairs, which knob.
        pairs: indices of the pairs that it lies with most, the worst first.
        paste: (for which trainer, the line), to be pasted.
    """

    verdict: str
    headline: str
    details: tuple[str, ...] = ()
    pairs: tuple[int, ...] = ()
    paste: tuple[tuple[str, str], ...] = ()


def number(estimate: tuple[float, float, float]) -> str:
    """A number with its interval.

    >>> number((-1.5, -3.0, 0.25)), number((2.0, float("-inf"), float("inf")))
    ('-1.5 (95 % interval -3 to +0.25)', '+2 (interval not known)')
    """
    value, low, high = estimate
    if value != value:
        return "not known"
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{value:+.3g} (interval not known)"
    return f"{value:+.3g} (95 % interval {low:+.3g} to {high:+.3g})"


# --- over training ----------------------------------------------------------------------------------------------


def of_training(points: pd.DataFrame, steps: pd.DataFrame, *, held_out: bool) -> Decision:
    """What a run has done to its probed pairs.

    Args:
        points: rows of `entangle.analysis.curves.curve`.
        steps: rows of steps and pairs.
        held_out: whether the pairs weren't trained on.
    """
    last, began = points.iloc[-1], onset(points)
    change = Change(_moved(last, "chosen"), _moved(last, "rejected"), "nats")
    where = f"{int(last['pairs'])} {'held-out' if held_out else 'probed'} pairs"
    said = {
        HARMFUL: "Harmful: training has lowered the mean chosen log-prob",
        HARMLESS: "Not harmful by the log-probs: training has raised the mean chosen log-prob",
        OPEN: "No harm is proven: the mean chosen log-prob is within noise of its start",
    }[change.verdict]
    margin = _moved(last, "margin")
    shrinks = margin[2] < 0
    if shrinks and change.verdict != HARMFUL:
        said = "Harmful: training has shrunk the margin"
    headline = f"{said} by step {last['step']:.0f}: {change.text}, mean over {where}."
    details = [f"The margin changed by {number(margin)} nats."]
    verdict = HARMFUL if shrinks else change.verdict
    if verdict == HARMFUL:
        details.append(_since(points, began))
    return Decision(verdict, headline, tuple(details), _fallen(steps) if verdict == HARMFUL else ())


def _moved(row: pd.Series, name: str) -> tuple[float, float, float]:
    value, error = float(row[f"moved_{name}"]), float(row[f"moved_{name}_error"])
    half = Z * error if error == error else math.inf
    return value, value - half, value + half


def _since(points: pd.DataFrame, began: int | None) -> str:
    """From which probe on the chosen log-prob stays below its start."""
    fallen = (points["moved_chosen"] < -Z * points["moved_chosen_error"]).to_numpy()[::-1].cumprod()[::-1]
    if not fallen.any():
        return "Since when can't be told: at no probe is the chosen log-prob clearly below its start."
    first = int(fallen.argmax())
    step = f"step {points['step'].iloc[first]}"
    when = f"Between step {points['step'].iloc[first - 1]} and {step}" if first else f"By {step}"
    both = f"; both are below it for good from step {began} on" if began is not None else ""
    return f"{when} the chosen fell below its start for good{both}."


def _fallen(steps: pd.DataFrame, count: int = 5) -> tuple[int, ...]:
    """The pairs whose chosen log-prob fell most from the first look to the last."""
    columns = steps.pivot_table(index="index", columns="step", values="logps_chosen")
    moved = (columns.iloc[:, -1] - columns.iloc[:, 0]).dropna()
    return tuple(int(str(index)) for index in moved[moved < 0].nsmallest(count).index)


# --- before training --------------------------------------------------------------------------------------------


def of_probe(
    summary: Mapping[str, Any],
    loss: str,
    *,
    whole: Mapping[str, Any] | None = None,
    across: Mapping[str, Any] | None = None,
    worst: Sequence[int] = (),
    target: float = GOOD,
) -> Decision:
    """What training with a loss would do to the probed pairs, to first order.

    Args:
        summary: of a probe.
        loss: its label.
        whole: set.json, or a summary's `set`.
        across: of `entangle across`.
        worst: indices of the pairs that the run's harm lies with, the worst first.
        target: the share of ideal pairs that is asked for.
    """
    regimes = summary["regimes"][loss]
    change = epoch_change(loss, whole, across)
    if change is None:
        return replace(_alone(regimes, loss, target), pairs=tuple(worst))
    fresh = None if whole is None or "epoch" not in whole else _change_of(whole["losses"].get(loss))
    verdict, details = change.verdict, []
    said = {
        HARMFUL: f"Harmful: an epoch of {loss} over these pairs lowers the mean chosen log-prob",
        HARMLESS: f"Not harmful to these pairs: an epoch of {loss} over them raises the mean chosen log-prob",
        OPEN: f"Can't tell whether it is harmful: these pairs don't fix where an epoch of {loss} takes the mean chosen "
        "log-prob",
    }[verdict]
    if verdict != HARMFUL and fresh is not None and fresh.verdict == HARMFUL:
        verdict, change = HARMFUL, fresh
        said = f"Harmful to other pairs: a step of {loss} on these lowers the mean chosen log-prob of pairs like them"
    elif verdict == HARMLESS and fresh is not None and fresh.verdict == OPEN:
        details.append(
            f"Whether pairs that aren't trained on fall isn't known: {fresh.text}{_enough(whole, loss)}."
        )
    elif verdict == OPEN:
        details.append(f"More pairs would tell{_enough(whole, loss)}.")
    if verdict == HARMLESS and change.rejected[1] > 0:
        details.append("The rejected log-prob rises with it: entangled, in the other direction.")
    if verdict == HARMFUL:
        begins = "It begins with the first step: this is the state that was probed."
        if is_good(regimes, target):
            ideal = share_text(regimes[Regime.IDEAL])
            begins += (
                f" No single pair shows it: alone, {ideal} are as they should be; it is the direction that the pairs "
                "have in common."
            )
        details.append(begins)
    return Decision(verdict, f"{said}: {change.text}, to first order.", tuple(details), tuple(worst))


def epoch_change(
    loss: str, whole: Mapping[str, Any] | None, across: Mapping[str, Any] | None
) -> Change | None:
    """Both mean changes over an epoch of these pairs; None where nothing but single pairs was measured.

    Args:
        loss: label of the loss.
        whole: set.json, or a summary's `set`.
        across: what `entangle across` has found; it comes first.
    """
    if across is not None and loss in across["losses"]:
        row = across["losses"][loss]
        ends = [
            (side["change"], side["change"] - Z * side["error"], side["change"] + Z * side["error"])
            for side in (row["chosen"], row["rejected"])
        ]
        return Change(ends[0], ends[1], "nats per unit of learning rate / batch size")
    return None if whole is None else _change_of(whole.get("epoch", whole)["losses"].get(loss))


def _change_of(move: Mapping[str, Any] | None) -> Change | None:
    """A move of the set."""
    if move is None:
        return None
    return Change(_ends(move["chosen"]), _ends(move["rejected"]), "nats per unit of learning rate and step")


def _ends(estimate: Mapping[str, Any]) -> tuple[float, float, float]:
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    return (
        math.nan if value is None else value,
        -math.inf if low is None else low,
        math.inf if high is None else high,
    )


def _enough(whole: Mapping[str, Any] | None, loss: str) -> str:
    """How many pairs would tell, where that can be said."""
    move = None if whole is None else whole["losses"].get(loss)
    needed = None if move is None else move["chosen"]["pairs_needed"]
    return "" if needed is None else f" (about {rounded(needed)} pairs)"


def _alone(regimes: Mapping[str, Mapping[str, float]], loss: str, target: float) -> Decision:
    """By one step on each pair alone: all that there is where neither the set nor an epoch was measured."""
    falling = [regimes[name] for name in (Regime.BOTH_DOWN, Regime.INVERTED)]
    count = sum(int(part["count"]) for part in falling)
    worst = max(falling, key=lambda part: part["count"])
    unknown = "What all pairs together do wasn't measured."
    if is_good(regimes, target):
        return Decision(
            OPEN,
            f"Each pair alone is safe under {loss}: ideal on {share_text(regimes[Regime.IDEAL])}.",
            (
                f"{unknown} On real pairs that, and not the single pair, decides: probe with sums, or entangle across.",
            ),
        )
    verdict = HARMFUL if worst["low"] > 1 - target else OPEN
    start = "Harmful" if verdict == HARMFUL else "Can't tell whether it is harmful"
    return Decision(
        verdict,
        f"{start}: one step of {loss} on a pair alone lowers its own chosen response on {count} of "
        f"{sum(int(part['count']) for part in regimes.values())} pairs.",
        (unknown,),
    )


# --- what would stop it -----------------------------------------------------------------------------------------


def with_remedy(decision: Decision, remedy: Mapping[str, Any] | None) -> Decision:
    """A decision with the setting that would stop the fall, its interval, its price, and the lines to paste.

    Args:
        decision: without it.
        remedy: words, lines: see `entangle.report.command.remedy_of`; None where none was looked for.
    """
    if remedy is None or decision.verdict == HARMLESS:
        return decision
    lines = tuple((str(name), str(line)) for name, line in remedy["paste"])
    return replace(decision, details=(*decision.details, str(remedy["words"])), paste=lines)

"""What the set of pairs does, in plain sentences: decided here once, for the terminal and for the page.

A drift is "nats by which both mean log-probs move per nat of margin gained" (see `entangle.analysis.sets`). A sentence
states it only where its interval means something, and says how many pairs would do where it doesn't.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from entangle.analysis.regimes import Regime
from entangle.analysis.sets import EDGE

UNKNOWN, RISE, FALL, IDEAL, INVERTED, UNSURE = "unknown", "rise", "fall", "ideal", "inverted", "unsure"
"""Of a set under a loss: nothing is known; both rise; both fall; the chosen rises and the rejected falls, or the other
way round; one of two of these."""

ALERTS = {
    FALL: "Both log-probs fall",
    RISE: "Both log-probs rise",
    INVERTED: "The margin shrinks",
}
"""Titles of warnings, by what is found of a set."""

_SURE = {Regime.BOTH_UP: RISE, Regime.BOTH_DOWN: FALL, Regime.IDEAL: IDEAL, Regime.INVERTED: INVERTED}


def finding(move: Mapping[str, Any]) -> str:
    """Which of the six holds: by the signs of both mean changes where both are certain, else by the drift's interval.

    Args:
        move: of one loss, from a summary's `set`: regime, is_certain, and `drift` with value, low, high (null where not
            finite), has_meaning.
    """
    if move["is_certain"] and move["regime"] in _SURE:
        return _SURE[Regime(move["regime"])]
    drift = move["drift"]
    low, high = _end(drift["low"], -math.inf), _end(drift["high"], math.inf)
    if not drift["has_meaning"] or drift["value"] is None:
        return UNKNOWN
    if low > EDGE:
        return RISE
    if high < -EDGE:
        return FALL
    return IDEAL if low >= -EDGE and high <= EDGE else UNSURE


def drifts(move: Mapping[str, Any]) -> bool:
    """Whether the set isn't known to do what a preference loss is for."""
    return finding(move) != IDEAL


def lowers_chosen(content: Mapping[str, Any], loss: str) -> bool:
    """Whether the mean chosen log-prob is known to fall, by a step on the set or by an epoch over its pairs.

    Args:
        content: a summary's `set`.
        loss: the loss's label.
    """
    moves = [part["losses"].get(loss) for part in (content, content.get("epoch", {"losses": {}}))]
    return any(move is not None and _end(move["chosen"]["high"], math.inf) < 0 for move in moves)


def set_verdict(content: Mapping[str, Any], loss: str) -> str:
    """What one step on the whole set does to the two mean log-probs under a loss, in one sentence.

    Args:
        content: a summary's `set`.
        loss: the loss's label.

    Examples:
        >>> drift = {"value": 3.3, "low": 2.2, "high": 4.4, "has_meaning": True, "pairs_needed": None}
        >>> move = {"drift": drift, "regime": "both_up", "is_certain": True}
        >>> print(set_verdict({"pairs": 48, "losses": {"dpo": move}}, "dpo").partition(": ")[2])
        each nat of margin comes with 3.3 nats (2.2 to 4.4) of rise of both.
    """
    move = content["losses"][loss]
    what, start = finding(move), f"As a set, these {content['pairs']} pairs"
    if what == UNKNOWN:
        needed = move["drift"]["pairs_needed"]
        enough = f"; about {rounded(needed)} would" if needed else ""
        return f"{start} are too few to tell which way both log-probs go under {loss}{enough}."
    if what == INVERTED:
        return f"{start} lower the chosen and raise the rejected log-probs under {loss}, in the mean."
    if what in (RISE, FALL) and not move["drift"]["has_meaning"]:
        return (
            f"{start} make both log-probs {what} under {loss}, and can't tell whether any margin is gained."
        )
    if what in (RISE, FALL):
        return (
            f"{start} make both log-probs {what} under {loss}: each nat of margin comes with "
            f"{drift_text(move['drift'], absolute=True)} of {what} of both."
        )
    if what == IDEAL and not move["drift"]["has_meaning"]:
        return f"{start} raise the chosen and lower the rejected log-probs under {loss}, in the mean."
    if what == IDEAL:
        return (
            f"{start} raise the chosen and lower the rejected log-probs under {loss}, in the mean: both drift by "
            f"{drift_text(move['drift'])} per nat of margin, and within half a nat they part."
        )
    side = "rise" if move["drift"]["value"] > 0 else "fall"
    return (
        f"{start} let the two log-probs part or make both {side} under {loss}, these pairs can't tell which: both "
        f"drift by {drift_text(move['drift'])} per nat of margin, and within half a nat they part."
    )


def set_alert(content: Mapping[str, Any], loss: str) -> tuple[str, str] | None:
    """Title and sentence of a warning, where it is known that the set doesn't do what a loss is for; else None.

    Args:
        content: a summary's `set`.
        loss: the loss's label.
    """
    title = ALERTS.get(finding(content["losses"][loss]))
    return None if title is None else (title, set_verdict(content, loss))


def live_verdict(move: Mapping[str, Any], steps: int, pairs: int) -> str:
    """What the last steps say of a run's own batches, in one sentence.

    Args:
        move: what the optimiser's memory does to fresh pairs, as plain values (see `finding`).
        steps: of the window.
        pairs: in these steps.
    """
    what, start = finding(move), f"Over the last {steps} steps ({pairs} pairs)"
    if what in (UNKNOWN, UNSURE):
        return f"{start} it can't be told which way training moves the log-probs of fresh pairs."
    if what == INVERTED:
        return f"{start} training lowers the chosen and raises the rejected log-probs of fresh pairs."
    if what == IDEAL:
        return f"{start} training raises the chosen and lowers the rejected log-probs of fresh pairs."
    price = (
        f": {drift_text(move['drift'], absolute=True)} for each nat of margin"
        if move["drift"]["has_meaning"]
        else ""
    )
    return f"{start} training makes both log-probs of fresh pairs {what}{price}."


def set_advice(content: Mapping[str, Any], loss: str) -> list[str]:
    """What to change for the set: nothing, the smallest change and its price in margin, or that none is enough.

    Args:
        content: a what-if's `set`: also `changes`, one per knob.
        loss: the loss that the knobs start from.
    """
    move, changes = content["losses"][loss], content["changes"]
    if finding(move) == IDEAL or not changes:
        return []
    stops = [f"{c['knob']} = {c['stops']:.3g}" for c in changes if c["stops"] not in (None, c["start"])]
    chosen = [f"The mean chosen log-prob stops falling from {' or '.join(stops)} on."] if stops else []
    best = best_set_change(changes)
    if best is None:
        tried = ", ".join(change["knob"] for change in changes)
        return [f"No setting of {tried} keeps the set from drifting.", *chosen]
    after, before = best["at_setting"], best["at_start"]
    doubt = "" if finding(after) == IDEAL else ", by these pairs' means and without certainty,"
    return [
        f"The smallest change that{doubt} keeps the set from drifting is {best['knob']} ({best['title']}) = "
        f"{best['setting']:.3g}, that is {best['loss']}: the mean margin then grows by "
        f"{after['margin']['value']:.3g} nats in a step of learning rate 1, instead of "
        f"{before['margin']['value']:.3g}.",
        *chosen,
    ]


def best_set_change(changes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of the smallest changes that keep a set from drifting the one that leaves most margin; None if none does."""
    found = [change for change in changes if change["setting"] is not None]
    return max(found, key=lambda change: change["at_setting"]["margin"]["value"]) if found else None


def steady_losses(content: Mapping[str, Any]) -> list[str]:
    """Losses under which the set is known to raise the chosen and lower the rejected log-probs."""
    return [loss for loss, move in content["losses"].items() if finding(move) == IDEAL]


def steady_sentence(content: Mapping[str, Any]) -> str:
    """Under which of the measured losses the set doesn't drift."""
    steady = steady_losses(content)
    if not steady:
        return "Of the losses measured, none is known to keep the set from drifting."
    return f"The set doesn't drift under {', '.join(steady)}."


def drift_text(drift: Mapping[str, Any], *, absolute: bool = False) -> str:
    """A drift with its interval in words: `3.3 nats (2.2 to 4.4)`.

    Args:
        drift: {value, low, high}, nats.
        absolute: without its sign.
    """
    values = [drift["value"], _end(drift["low"], -math.inf), _end(drift["high"], math.inf)]
    if absolute:
        values[:] = values[0] if values[0] >= 0 else -values[0], *sorted(map(abs, values[1:]))
        return f"{values[0]:.2g} nats ({values[1]:.2g} to {values[2]:.2g})"
    return f"{values[0]:+.2g} nats ({values[1]:+.2g} to {values[2]:+.2g})"


def rounded(pairs: int) -> int:
    """A count that is known roughly, to two digits."""
    size = 10 ** max(0, len(str(pairs)) - 2)
    return math.ceil(pairs / size) * size


def _end(value: float | None, infinite: float) -> float:
    return infinite if value is None else value

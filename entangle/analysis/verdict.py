"""What a probe and a what-if say in plain sentences: decided here once, for the terminal and for the page.

40 ideal pairs of 50 are too few for the 90 % that are asked for by default, and enough for 80 %:

    >>> counts = {"ideal": 40, "both_up": 10, "both_down": 0, "inverted": 0, "degenerate": 0}
    >>> regimes = {name: {"count": count, "share": count / 50} for name, count in counts.items()}
    >>> is_good(regimes), is_good(regimes, target=0.8)
    (False, True)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from entangle.analysis.geometry import COARSE
from entangle.analysis.regimes import Regime
from entangle.analysis.set_verdict import lowers_chosen, set_advice, set_verdict
from entangle.analysis.wording import counted, portion, share_text

GOOD = 0.9
"""From this share of ideal pairs on a loss needs no change, where nobody has asked for another one."""

_ON = {
    Regime.BOTH_DOWN: "both fall on",
    Regime.BOTH_UP: "both rise on",
    Regime.INVERTED: "the chosen falls and the rejected rises on",
    Regime.DEGENERATE: "a change is too small for its sign to be known on",
}
_CAUSES = {
    Regime.BOTH_DOWN: "Where both fall, lowering the rejected response drags the chosen one along.",
    Regime.BOTH_UP: "Where both rise, raising the chosen response lifts the rejected one.",
    Regime.INVERTED: "Where the chosen falls and the rejected rises, the loss's incentives point the wrong way.",
    Regime.DEGENERATE: "Where no sign is known, a change is smaller than the errors of the arithmetic.",
}


def probe_verdict(summary: Mapping[str, Any], loss: str) -> str:
    """What a step of a loss does to the set, then to each pair alone.

    Args:
        summary: of a probe.
        loss: its label.
    """
    alone = pair_verdict(summary["regimes"][loss], loss)
    return f"{set_verdict(summary['set'], loss)} {alone}" if "set" in summary else alone


def pair_verdict(regimes: Mapping[str, Mapping[str, float]], loss: str) -> str:
    """What one small step of a loss does to the scored pairs, in one sentence.

    Args:
        regimes: shares of the scored pairs per regime under this loss, as in a summary's `regimes`.
        loss: its label.
    """
    total = sum(int(regimes[regime]["count"]) for regime in Regime)
    others = [
        f"{words} {share_text(regimes[name]) if name is _largest(regimes) else portion(regimes[name])}"
        for name, words in _ON.items()
        if regimes[name]["count"]
    ]
    return (
        f"Each pair alone: under {loss}, one small step raises the chosen and lowers the rejected response on "
        f"{share_text(regimes[Regime.IDEAL])} of the {total} scored pairs{'; ' if others else ''}{', '.join(others)}."
    )


def cause(regimes: Mapping[str, Mapping[str, float]]) -> str:
    """Why the pairs that aren't ideal aren't, in one sentence: of the regime that most of them are in."""
    return _CAUSES[_largest(regimes)]


def _largest(regimes: Mapping[str, Mapping[str, float]]) -> Regime:
    """Of the regimes that aren't ideal the one with most pairs."""
    return max(_CAUSES, key=lambda regime: regimes[regime]["count"])


def is_good(regimes: Mapping[str, Mapping[str, float]], target: float = GOOD) -> bool:
    """Whether the share of ideal pairs is the one asked for.

    Args:
        regimes: regime -> its share, {count, share, low, high}.
        target: the share of ideal pairs that is asked for.
    """
    total = sum(int(regimes[regime]["count"]) for regime in Regime)
    return regimes[Regime.IDEAL]["count"] >= _needed(target, total)


def _needed(target: float, total: int) -> float:
    return target * total - 1e-9


def worst_pairs(pairs: pd.DataFrame, predictions: pd.DataFrame, loss: str, count: int) -> pd.DataFrame:
    """The pairs whose chosen log-prob a step of this loss lowers most, worst first.

    Args:
        pairs: rows of a run folder.
        predictions: rows of its predictions.
        loss: label of the loss.
        count: pairs at most.
    """
    rows = predictions[(predictions["loss"] == loss) & (predictions["change_chosen"] < 0)]
    rows = rows[rows["regime"] != Regime.DEGENERATE].nsmallest(count, "change_chosen")
    return rows.merge(pairs, on="index", how="left", sort=False)


# --- what would change it -------------------------------------------------------------------------------------


def recommendation(summary: Mapping[str, Any], *, is_harmful: bool = False) -> str:
    """The verdict on a what-if's start and its advice.

    Args:
        summary: of a what-if.
        is_harmful: see `advice`.
    """
    whole = summary.get("set")
    said = [] if whole is None else [set_verdict(whole, summary["base"]), *set_advice(whole, summary["base"])]
    return " ".join(
        [
            *said,
            pair_verdict(summary["regimes"], summary["base"]),
            *advice(summary, is_harmful=is_harmful),
            *fall_advice(summary),
        ]
    )


def advice(summary: Mapping[str, Any], *, is_harmful: bool = False) -> list[str]:
    """What to do, with the numbers that say so: no change, the cheapest change, or why none is enough.

    Args:
        summary: of a what-if.
        is_harmful: whether training on these pairs is known, from elsewhere, to lower their chosen log-probs.

    Returns:
        Sentences, the main one first.
    """
    needed = _needed(summary["target"], summary["pairs"]["scored"])
    if is_good(summary["regimes"], summary["target"]):
        if is_harmful or ("set" in summary and lowers_chosen(summary["set"], summary["base"])):
            return [
                f"That is the {_target(summary)} asked for of pairs alone, and not enough: together they lower the "
                "chosen log-probs."
            ]
        return [
            f"That is the {_target(summary)} asked for: no change is needed for one step on a pair alone."
        ]
    change = cheapest_change(summary["changes"])
    if change is None:
        sentences = _nothing_reaches(summary)
    else:
        sentences = _what_to_turn(change, [other for other in summary["changes"] if other["reaches"]])
    return [*sentences, *_better_loss(summary), *_ceiling(summary, needed)]


def cheapest_change(changes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of the changes that reach the target the one that keeps most margin growth; None if none reaches it."""
    reaching = [change for change in changes if change["reaches"]]
    return max(reaching, key=_worth) if reaching else None


def fewest_falls(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The knobs under which the chosen log-prob falls on the fewest pairs, fewer than under the base; none if none.

    Args:
        summary: of a what-if.
    """
    counts = {change["knob"]: change["falls"]["after"]["count"] for change in summary["changes"]}
    least = min(counts.values(), default=summary["falls"]["count"])
    if least >= summary["falls"]["count"]:
        return []
    return [change for change in summary["changes"] if counts[change["knob"]] == least]


def fall_advice(summary: Mapping[str, Any]) -> list[str]:
    """From which settings on the chosen log-prob stops falling on single pairs, where it falls on any.

    Args:
        summary: of a what-if.
    """
    if "falls" not in summary:  # made before this was asked
        return []
    before, found = summary["falls"]["count"], fewest_falls(summary)
    if not before or not summary["changes"]:
        return []
    start = f"One step lowers the chosen response of {counted(before)}"
    if not found:
        return [f"{start}, and no setting of a knob lowers that number."]
    after = found[0]["falls"]["after"]["count"]
    settings = " or ".join(f"{change['knob']} = {change['falls']['setting']:.4g}" for change in found)
    ideal = found[0]["falls"]["at_setting"]["regimes"]["ideal"]["count"]
    return [
        f"{start}, and of {f'only {after}' if after else 'none'} with {settings}; with {found[0]['knob']} {ideal} of "
        f"{summary['pairs']['scored']} are then ideal, instead of {summary['regimes']['ideal']['count']}."
    ]


def is_idle(change: Mapping[str, Any]) -> bool:
    """Whether no setting of a knob does better than where it stands."""
    return change["setting"] == change["start"]


def _target(summary: Mapping[str, Any]) -> str:
    return f"{100 * summary['target']:g} %"


def _worth(change: Mapping[str, Any]) -> tuple[float, int]:
    """How good a change is: the margin growth that it keeps, then the ideal pairs."""
    kept = change["at_setting"]["margin_efficiency_median"]
    ideal = change["at_setting"]["regimes"]["ideal"]["count"]
    return (kept if kept is not None and kept == kept else -1.0, ideal)


def _what_to_turn(change: Mapping[str, Any], reaching: Sequence[Mapping[str, Any]]) -> list[str]:
    ideal = share_text(change["at_setting"]["regimes"]["ideal"])
    others = [f"{other['knob']} = {other['setting']:.4g}" for other in reaching if other is not change]
    return [
        f"The cheapest knob that gets there is {change['knob']} ({change['title']}) = {change['setting']:.4g}, that is "
        f"{change['loss']}: {ideal} ideal.",
        _cost(change),
        _trade(change),
        *_edge(change),
        *([f"It can also be had with {' or '.join(others)}."] if others else []),
    ]


def _cost(change: Mapping[str, Any]) -> str:
    """What a change costs in margin growth, per unit of learning rate and at equal length of the step."""
    before, after = change["at_start"], change["at_setting"]
    return (
        f"The median pair's margin then grows by {_number(after['margin_change_median'])} nats in a step of "
        f"learning rate 1 ({before['label']}: {_number(before['margin_change_median'])}), and at "
        f"{_hundred(after['margin_efficiency_median'])} % of the fastest rate for a step of that length."
    )


def _number(value: float | None) -> str:
    return "an unknown number of" if value is None or value != value else f"{value:.3g}"


def _hundred(share: float | None) -> str:
    return "-" if share is None or share != share else f"{100 * share:.0f}"


def _edge(change: Mapping[str, Any]) -> list[str]:
    into = change["overshoots_into"]
    words = {"both_up": "both responses rise", "both_down": "both fall"}
    if into is None:
        return []
    return [f"Beyond {change['until']:.4g} it overshoots: on more pairs {words.get(into, 'it goes wrong')}."]


def _nothing_reaches(summary: Mapping[str, Any]) -> list[str]:
    changes = summary["changes"]
    if not changes:
        return []
    best = max(changes, key=lambda change: (change["best_count"], _worth(change)))
    tried = ", ".join(change["knob"] for change in changes)
    if best["best_count"] <= summary["regimes"]["ideal"]["count"]:
        return [f"No setting of {tried} makes more pairs ideal than that.", *_without_effect(changes)]
    at = best["at_setting"]
    return [
        f"No setting of {tried} brings {_target(summary)} there: the most is {share_text(at['regimes']['ideal'])}, "
        f"with {best['knob']} = {best['setting']:.4g} ({best['loss']}).",
        f"Then {portion(at['regimes']['both_up'])} rise together and {portion(at['regimes']['both_down'])} fall "
        "together.",
        _trade(best),
        *_without_effect(changes),
    ]


def _trade(change: Mapping[str, Any]) -> str:
    """How many pairs change sides, and whether that could be chance (sign test on the same pairs)."""
    gained, lost = change["gained"], change["lost"]
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    chance = "" if p < 0.05 else f", a gain that chance could give (sign test p = {p:.2g})"
    return f"{counted(gained)} become ideal and {lost} cease to be{chance}."


def _without_effect(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"The knob {change['knob']} acts on no pair here: {change['idle']}."
        for change in changes
        if change["acts_on"] == 0
    ]


def _better_loss(summary: Mapping[str, Any]) -> list[str]:
    best = summary["best"]
    counts = [change["at_setting"]["regimes"]["ideal"]["count"] for change in summary["changes"]]
    ideal = best["regimes"]["ideal"]
    if ideal["count"] <= max([summary["regimes"]["ideal"]["count"], *counts]):
        return []
    return [
        f"Of the losses judged, {best['label']} does best: {share_text(ideal)} ideal, "
        f"{_hundred(best['margin_efficiency_median'])} % of the fastest margin growth."
    ]


def _ceiling(summary: Mapping[str, Any], needed: float) -> list[str]:
    found, total = summary["inseparable"], summary["pairs"]["scored"]
    sentences = []
    if found["count"]:
        sentences.append(
            f"{counted(found['count'])} can't be made ideal by any loss: look at them, or leave them out."
        )
    if total - found["count"] < needed:
        sentences.append(f"So {_target(summary)} can't be reached on these pairs by any loss.")
    return sentences


def limits(summary: Mapping[str, Any]) -> list[str]:
    """What the numbers of a what-if leave out."""
    sentences = [
        f"First order, one small {summary['metric'].upper()} step on the pair's own loss: what other pairs of a batch "
        "do to it isn't counted, and training moves the model away from the one state that was probed.",
        "Settings were chosen on the pairs that they are judged on.",
    ]
    if summary["batch_coupled"]:
        sentences.append(f"Batch-coupled losses were given batches of {batch_composition(summary)}.")
    if summary["resolution"] >= COARSE:
        sentences.append("Scores are in 16-bit precision: signs near zero aren't known.")
    return sentences


def batch_composition(summary: Mapping[str, Any]) -> str:
    """Which pairs stand in a batch together."""
    return f"{summary['loss_batch_size']} consecutive scored pairs in dataset order"

"""The verdict on a run in three sentences: what is happening, on which share, what would change it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from entangle.curves import onset
from entangle.ledger import explain
from entangle.regimes import Regime
from entangle.report.source import Source, step_table
from entangle.summary import share

_HAPPENS = {
    Regime.BOTH_DOWN: "one small step lowers both responses of too many pairs: pushing the rejected one down drags the "
    "chosen one along",
    Regime.BOTH_UP: "one small step raises both responses of too many pairs: pulling the chosen one up lifts the "
    "rejected one",
    Regime.INVERTED: "one small step lowers the chosen and raises the rejected response of too many pairs: the "
    "incentives point the wrong way",
    Regime.DEGENERATE: "too many changes are smaller than the arithmetic can tell from zero",
}
GOOD = 0.9
"""From this share of ideal pairs on, a run needs no change; where there is a what-if, its own target."""


def verdict(source: Source) -> list[str]:
    """Three sentences on a run of pairs; what there is to say of a run of prompts or of training steps."""
    if source.pairs is not None:
        return _of_pairs(source)
    if "verdicts" in source.summary:
        return _of_both(source.summary)
    if "prevalence" in source.summary:
        return _of_prompts(source.summary)
    points = None if source.steps is None else step_table(source.steps)
    return (
        ["This folder holds neither pairs nor prompts."] if points is None else _of_training(source, points)
    )


def _of_pairs(source: Source) -> list[str]:
    if not source.summary["regimes"]:
        return ["No pair could be scored."]
    loss = source.losses[0]
    shares = source.summary["regimes"][loss]
    scored, ideal = source.summary["pairs"]["scored"], shares[Regime.IDEAL]
    worst = max((r for r in Regime if r != Regime.IDEAL), key=lambda regime: shares[regime]["count"])
    others = f"; {_others(shares, worst)}" if _others(shares, worst) else ""
    target = source.what_if.summary["target"] if source.what_if else GOOD
    if ideal["share"] >= target:
        return [
            f"Under {loss}, one small step on a pair does what it should: the chosen rises and the rejected falls.",
            f"So it is on {interval(ideal)} of the {scored} scored pairs"
            + (f"; {_verb(worst)} {_portion(shares[worst])}{others}." if shares[worst]["count"] else "."),
            _no_change(source),
        ]
    return [
        f"Under {loss}, {_HAPPENS[worst]}.",
        f"So it is on {interval(shares[worst])} of the {scored} scored pairs; {interval(ideal)} are ideal{others}.",
        _what_would_change(source),
    ]


def _others(shares: Mapping[str, Any], told: Regime) -> str:
    rest = [r for r in Regime if r not in (Regime.IDEAL, told) and shares[r]["count"]]
    return ", ".join(f"{_verb(r)} {_portion(shares[r])}" for r in rest)


def _verb(regime: Regime) -> str:
    return {
        Regime.BOTH_DOWN: "both fall on", Regime.BOTH_UP: "both rise on", Regime.INVERTED: "they are inverted on",
        Regime.DEGENERATE: "a sign can't be told on",
    }[regime]  # fmt: skip


def _no_change(source: Source) -> str:
    asked = (
        "" if source.what_if is None else f" ({100 * source.what_if.summary['target']:g} % were asked for)"
    )
    return (
        f"No change is needed for one step{asked}; what training does over many steps, entangle sweep shows."
    )


def _what_would_change(source: Source) -> str:
    if source.what_if is None or not source.what_if.summary["changes"]:
        return "What would change it, entangle whatif says."
    summary = source.what_if.summary
    reaching = [change for change in summary["changes"] if change["reaches"]]
    start = f"Starting from {summary['base']}, "
    if reaching:
        change = max(reaching, key=lambda c: c["at_setting"]["margin_efficiency_median"] or 0.0)
        after = interval(change["at_setting"]["regimes"]["ideal"])
        return (
            f"{start}{change['knob']} = {change['setting']:.3g} ({change['title']}) would make {after} ideal."
        )
    best = max(summary["changes"], key=lambda c: c["best_count"])
    most, elsewhere = best["at_setting"]["regimes"]["ideal"], summary["best"]
    words = f"{start}no knob brings {100 * summary['target']:g} % of them there"
    if most["count"] > summary["regimes"]["ideal"]["count"]:
        words += (
            f"; the most is {interval(most)}, with {best['knob']} = {best['setting']:.3g} ({best['title']})"
        )
    if elsewhere["regimes"]["ideal"]["count"] > most["count"]:
        words += f"; of all losses judged, {elsewhere['label']} does best, {interval(elsewhere['regimes']['ideal'])}"
    return f"{words}."


def _of_prompts(summary: Mapping[str, Any]) -> list[str]:
    harmful, limits = summary["prevalence"]["small_low"], summary["thresholds"]
    measured = summary["prompts"]["measured"]
    return [
        "Where the reward hardly varies over a prompt's answers, its expected reward gradient vanishes.",
        f"On {interval(harmful)} of the {measured} prompts the reward's std is below {limits['std']:g} and its mean "
        f"below {limits['mean']:g}: no signal, and room to improve.",
        "An SFT phase on good answers, or easier prompts, would give such prompts a signal.",
    ]


def _of_both(summary: Mapping[str, Any]) -> list[str]:
    """A joint run: the same prompts, a preference loss and rewards."""
    shares, rho = summary["verdicts"], summary["rank_correlations"]["cosine_and_std"]
    measured, loss = summary["prompts"]["measured"], summary["loss"]
    found = "unknown"
    if rho["rho"] is not None:
        found = f"{rho['rho']:.2f} (95 % interval {rho['low']:.2f} to {rho['high']:.2f})"
    return [
        f"Both {loss} on the prompt's pair and its answers' rewards have a signal on {interval(shares['both'])} of the "
        f"{measured} prompts.",
        f"The pair alone has one on {interval(shares['dpo_only'])}, the rewards alone on "
        f"{interval(shares['rft_only'])}, neither on {interval(shares['neither'])}.",
        f"The rank correlation of the pair's cosine and the reward's std is {found}: were entangled pairs the prompts "
        "with a small std, it would be negative.",
    ]


def _of_training(source: Source, points: pd.DataFrame) -> list[str]:
    """A training run or a sweep: what was measured at its last step, and where it came from."""
    last, began = points.iloc[-1], onset(points)
    pairs = int(last["pairs"])
    both = share(round(last["both_fell"] * pairs), pairs)
    return [
        f"By step {last['step']:.0f} the chosen log-prob has moved by {last['moved_chosen']:+.3g} nats and the "
        f"rejected by {last['moved_rejected']:+.3g}, on average over {pairs} pairs.",
        f"Both have fallen on {interval(both)} of them"
        + (f", on average for good from step {began} on." if began is not None else "."),
        explain(source.ledger)
        if source.ledger is not None
        else "What it came from, a ledger would say (entangle train --ledger).",
    ]


def interval(part: Mapping[str, float]) -> str:
    """`31 % (95 % interval 21 to 42 %)`."""
    low, high = (f"{100 * part[end]:.0f}" for end in ("low", "high"))
    return f"{100 * part['share']:.0f} % (95 % interval {low} to {high} %)"


def _portion(part: Mapping[str, float]) -> str:
    """`7 %`, or the count where that would round to nothing."""
    return f"{100 * part['share']:.0f} %" if part["share"] >= 0.005 else f"{part['count']:.0f}"

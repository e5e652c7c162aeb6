"""The verdict on a run in three sentences: what is happening, on which share, what would change it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from entangle.analysis.curves import onset
from entangle.analysis.geometry import SIDES
from entangle.analysis.ledger import MEANINGS, PARTS, describe_change
from entangle.analysis.regimes import Regime
from entangle.analysis.statistics import Z, share
from entangle.report.source import Source, step_table

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
    if source.variants is not None:
        return _of_comparison(source.variants, source.causes)
    if source.changes is not None:
        return _of_change(source.summary)
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
    if source.across is not None:
        loss, row = next(iter(source.across["losses"].items()))
        return (
            f"No change is needed for one step on a pair alone{asked}; over an epoch of {loss}, the other pairs' steps "
            f"included, both would fall on {interval(row['regimes_epoch'][Regime.BOTH_DOWN])}, to first order."
        )
    return (
        f"No change is needed for one step{asked}. If the chosen log-prob falls in training all the same, other pairs "
        "or earlier steps do it: entangle across and entangle train --ledger tell."
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
    many = "Most" if harmful["share"] > 0.5 else "Some" if harmful["count"] else "No"
    return [
        f"{many} prompts have a reward that is low and hardly varies over their answers: hardly any gradient of the "
        "reward is left.",
        f"So it is on {interval(harmful)} of the {measured} prompts: std below {limits['std']:g}, mean below "
        f"{limits['mean']:g}.",
        "An SFT phase on good answers, or easier prompts, would give such prompts a signal.",
    ]


def _of_change(summary: Mapping[str, Any]) -> list[str]:
    """Two reward runs on the same prompts, before and after a fine-tuning."""
    rho, groups = summary["std_and_change"], summary["groups"]
    ends = " and ".join(
        f"{group['change']:+.2g} ({group['low']:+.2g} to {group['high']:+.2g}) in the group with the {size} std"
        for size, group in (("smallest", groups[0]), ("largest", groups[-1]))
    )
    return [
        f"The fine-tuning has changed the mean reward by {summary['change']:+.2g} on average over {summary['prompts']} "
        "prompts.",
        f"By the std before it: {ends}.",
        f"The rank correlation of a prompt's std before and its change is {_correlation(rho)}: were prompts with a "
        "small std held out, it would be positive.",
    ]


def _of_both(summary: Mapping[str, Any]) -> list[str]:
    """A joint run: the same prompts, a preference loss and rewards."""
    shares, rho = summary["verdicts"], summary["rank_correlations"]["cosine_and_std"]
    measured, loss = summary["prompts"]["measured"], summary["loss"]
    return [
        f"Both {loss} on the prompt's pair and its answers' rewards have a signal on {interval(shares['both'])} of the "
        f"{measured} prompts.",
        f"The pair alone has one on {interval(shares['dpo_only'])}, the rewards alone on "
        f"{interval(shares['rft_only'])}, neither on {interval(shares['neither'])}.",
        f"The rank correlation of the pair's cosine and the reward's std is {_correlation(rho)}: were entangled pairs "
        "the prompts with a small std, it would be negative.",
    ]


def _of_comparison(variants: pd.DataFrame, causes: pd.DataFrame | None) -> list[str]:
    """Losses and settings side by side: which lower the chosen log-prob, on which share of pairs, and what did it."""
    moved, both = variants.set_index("variant")["moved_chosen"], variants.set_index("variant")["both_fell"]
    fell = int((moved < 0).sum())
    first = (
        f"By step {variants['step'].max():.0f} the mean chosen log-prob of the probed pairs has fallen under {fell} of "
        f"{len(variants)} losses and settings: from {moved.min():+.2g} nats ({moved.idxmin()}) to {moved.max():+.2g} "
        f"({moved.idxmax()})."
    )
    ends = (f"{100 * both.min():.0f} % ({both.idxmin()})", f"{100 * both.max():.0f} % ({both.idxmax()})")
    row = variants.nlargest(1, "both_fell").iloc[0]
    sentences = [
        first,
        f"Both log-probs have fallen on {ends[0]} to {ends[1]} of the {row['pairs']:.0f} pairs, means over seeds; the "
        f"range over seeds of the latter is {100 * row['both_fell_low']:.0f} to {100 * row['both_fell_high']:.0f} %.",
    ]
    if causes is not None:
        own = causes[(causes["side"] == "chosen") & (causes["variant"] == moved.idxmin())][list(PARTS)].mean()
        parts = own.reindex(own.abs().sort_values(ascending=False).index)[:3]
        listed = ", ".join(f"{value:+.2g} from {MEANINGS[str(part)]}" for part, value in parts.items())
        sentences.append(
            f"Under {moved.idxmin()} the chosen log-prob's change comes from, in nats: {listed}."
        )
    elif "both_down" in variants:
        predicted = variants["both_down"].max()
        sentences.append(
            f"A step on a pair alone would lower both on at most {100 * predicted:.0f} %"
            + (
                ": other pairs and earlier steps do the rest, which a ledger takes apart (ledger: true)."
                if predicted < both.max() / 2
                else ": the pairs' own gradients go far to explain it."
            )
        )
    return sentences


def _of_training(source: Source, points: pd.DataFrame) -> list[str]:
    """A training run or a sweep: what was measured at its last step, and where it came from."""
    last, began = points.iloc[-1], onset(points)
    pairs = int(last["pairs"])
    both = share(round(last["both_fell"] * pairs), pairs)
    moved = [_direction(last[f"moved_{side}"], last[f"moved_{side}_error"]) for side in SIDES]
    happened = f"the chosen log-prob {moved[0]} and the rejected {moved[1]}"
    if moved[0] == moved[1]:
        happened = f"both log-probs {moved[0]}"
    return [
        f"By step {last['step']:.0f} {happened}: chosen {last['moved_chosen']:+.3g} nats, rejected "
        f"{last['moved_rejected']:+.3g}, on average over {pairs} pairs.",
        f"Both have fallen on {interval(both)} of them"
        + (f", on average for good from step {began} on." if began is not None else "."),
        describe_change(source.ledger)
        if source.ledger is not None
        else "What it came from, a ledger would say (entangle train --ledger).",
    ]


def _direction(moved: float, error: float) -> str:
    """What a mean change has done, told from its noise."""
    if not abs(moved) > Z * error:
        return "stayed within noise of the start"
    return "rose" if moved > 0 else "fell"


def interval(part: Mapping[str, float]) -> str:
    """`31 % (95 % interval 21 to 42 %)`."""
    low, high = (f"{100 * part[end]:.0f}" for end in ("low", "high"))
    return f"{100 * part['share']:.0f} % (95 % interval {low} to {high} %)"


def _correlation(rho: Mapping[str, float | None]) -> str:
    if rho["rho"] is None:
        return "unknown"
    return f"{rho['rho']:.2f} (95 % interval {rho['low']:.2f} to {rho['high']:.2f})"


def _portion(part: Mapping[str, float]) -> str:
    """`7 %`, or the count where that would round to nothing."""
    return f"{100 * part['share']:.0f} %" if part["share"] >= 0.005 else f"{part['count']:.0f}"

"""The verdict on a run: what is happening, on which share, what would change it. The words stand in `analysis`."""

from __future__ import annotations

from entangle.analysis.decision import HARMFUL, Decision, of_probe, of_training, with_remedy
from entangle.analysis.findings import (
    change_sentences,
    comparison_headline,
    comparison_sentences,
    cut_sentence,
    joint_sentences,
    reward_sentences,
    training_sentences,
)
from entangle.analysis.ledger import describe_change
from entangle.analysis.regimes import Regime
from entangle.analysis.set_verdict import set_verdict, steady_sentence
from entangle.analysis.verdict import GOOD, advice, cause, is_good, pair_verdict
from entangle.analysis.wording import share_text
from entangle.report.answers import answer_lines
from entangle.report.rows import harmed
from entangle.report.source import Source, step_table


def decision(source: Source) -> Decision | None:
    """What is decided on a run, with the pairs and the lines that go with it; None where nothing is measured for it.

    Answers of `entangle why` are decisions of their own.
    """
    if source.answers:
        return None
    if source.pairs is not None and source.summary.get("regimes") and source.predictions is not None:
        return with_remedy(probe_decision(source), source.remedy)
    if source.variants is not None:
        start, seeds = source.summary.get("start", {}), source.summary.get("seeds", [])
        return Decision("", *comparison_headline(source.variants, start, len(seeds)))
    if (cut := source.summary.get("cut", {})).get("count"):
        first = verdict(source)[0]
        return Decision("", first, (cut_sentence(cut),))
    points = None if source.steps is None or source.variants is not None else step_table(source.steps)
    if points is None or source.steps is None:
        return None
    kept = (source.summary.get("held_out") or {}).get("pairs", 0)
    return of_training(points, source.steps, held_out=kept == points["pairs"].iloc[-1])


def probe_decision(source: Source) -> Decision:
    """What is decided on a probe's pairs under its first loss."""
    loss = source.losses[0]
    return of_probe(
        source.summary,
        loss,
        whole=source.set if source.set is not None else source.summary.get("set"),
        across=source.across,
        worst=harmed(source, loss)[:5],
        target=source.what_if.summary["target"] if source.what_if else GOOD,
    )


def verdict(source: Source) -> list[str]:
    """Sentences on a run, the main one first."""
    if source.answers:
        return answer_lines(source.answers)
    if source.pairs is not None:
        return _of_pairs(source)
    if source.variants is not None:
        return comparison_sentences(source.variants, source.causes)
    if source.changes is not None:
        return change_sentences(source.summary)
    if "verdicts" in source.summary:
        return joint_sentences(source.summary)
    if "prevalence" in source.summary:
        return reward_sentences(source.summary)
    points = None if source.steps is None else step_table(source.steps)
    if points is None:
        return ["This folder holds neither pairs nor prompts."]
    came_from = "Where it came from, a ledger would say: entangle train --ledger."
    return [
        *training_sentences(points),
        came_from if source.ledger is None else describe_change(source.ledger),
    ]


def _of_pairs(source: Source) -> list[str]:
    if not source.summary["regimes"]:
        return ["No pair could be scored."]
    loss = source.losses[0]
    shares = source.summary["regimes"][loss]
    target = source.what_if.summary["target"] if source.what_if else GOOD
    whole = source.summary.get("set")
    said = [] if whole is None else [set_verdict(whole, loss), steady_sentence(whole)]
    said.append(pair_verdict(shares, loss))
    if not is_good(shares, target):
        said.append(cause(shares))
    return [*said, *_epoch(source), _advice(source, loss)]


def _epoch(source: Source) -> list[str]:
    """What an epoch would do where it was measured."""
    if source.across is None:
        return []
    loss, row = next(iter(source.across["losses"].items()))
    return [
        f"Over an epoch of {loss}, the other pairs' steps included, both would fall on "
        f"{share_text(row['regimes_epoch'][Regime.BOTH_DOWN])}, to first order."
    ]


def _advice(source: Source, loss: str) -> str:
    """What would change it; the what-if may start from another loss than the run's first."""
    if source.what_if is None:
        return "What would change it: entangle whatif."
    summary = source.what_if.summary
    harm = probe_decision(source).verdict
    main = advice(summary, is_harmful=harm == HARMFUL)
    start = "" if summary["base"] == loss else f"Starting from {summary['base']}: "
    if not main:
        return "What would change it: entangle whatif with a loss or a knob of your choice."
    told = f"{start}{main[0]}"
    if is_good(summary["regimes"], summary["target"]) and source.across is None and harm != HARMFUL:
        told += (
            " If the chosen log-prob falls in training all the same, other pairs or earlier steps do it: see entangle "
            "across and entangle train --ledger."
        )
    return told

"""What logged names mean in this run, and what no log can tell."""

from __future__ import annotations

from entangle.doctor.log import Family, TrainingLog
from entangle.doctor.preference import PROBE, has_reference

PER_TOKEN = ("simpo", "orpo")
"""Trainers whose `logps/*` are means over tokens."""


def meanings(log: TrainingLog) -> list[str]:
    """The traps in the names that this log has, one sentence each."""
    names = {*log.train.columns, *log.evaluation.columns}
    found = []
    if "rewards/chosen" in names:
        found.append(
            "rewards/* are beta times the log-ratio to the reference, whatever the loss: runs of other losses or of "
            "another beta don't compare."
            if has_reference(log)
            else "rewards/* are beta times logps/* here (a run without reference): they don't start at 0, and differ "
            "between batches as texts do."
        )
    if "logps/chosen" in names:
        found.append(_logps(log, names))
    if "rewards/accuracies" in names:
        found.append(
            "rewards/accuracies counts strictly larger rewards: 0 at the very start, where all are 0."
        )
    if "reward_std" in names:
        found.append(
            "reward_std is taken over the whole batch, not within prompts: it stays large when every group is dead but "
            "groups differ."
        )
    if "frac_reward_zero_std" in names:
        found.append(
            "frac_reward_zero_std counts exact ties among the few answers sampled: it says nothing of small spreads, "
            "and in RLOO with beta > 0 the KL term breaks the ties."
        )
    return found


def _logps(log: TrainingLog, names: set[str]) -> str:
    tail = " In training rows they are of other pairs each time; read rewards/* or an evaluation set."
    if log.trainer in PER_TOKEN or {"log_odds_ratio", "log_odds_chosen"} & names:
        return "logps/* are means over a response's tokens in this trainer." + tail
    if log.trainer in (None, "cpo") and not has_reference(log):
        return (
            "logps/* are means over tokens under simpo, ipo and orpo, and sums under cpo's other losses; the log "
            "doesn't say which (name it: --trainer)." + tail
        )
    return "logps/* are sums over a response's tokens, averaged over pairs: long texts weigh more." + tail


def unknowable(family: Family) -> list[str]:
    """What a log can't say, and the command that can."""
    if family == "groups":
        return [
            "Which prompts have no spread, and whether more samples would give them one: entangle rft",
            "How small the spread within a prompt is, and what gradient it leaves: entangle rft",
            "Whether a tie is a solved prompt or one out of reach: entangle rft",
        ]
    return [
        f"Which pairs fall, and by how much: {PROBE}",
        "Whether the rejected response drags the chosen one down: the same (cosine, regime); or the other pairs do: "
        "entangle across RUN; or older gradients: entangle train --ledger",
        "Whether another loss, beta or NLL weight would stop it, without training again: entangle whatif RUN",
        "Which tokens carry it: entangle tokens RUN",
        "Whether the falling probability matters for the answers: sample from both checkpoints",
    ]

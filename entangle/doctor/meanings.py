"""What logged names mean in this run, by its trainer and version, and what no log can tell."""

from __future__ import annotations

import pandas as pd

from entangle.doctor.groups import function_stds, reward_std_is
from entangle.doctor.log import Family, TrainingLog
from entangle.doctor.preference import PROBE, SFT_LOSSES, summed_over
from entangle.doctor.rewards import has_reference
from entangle.doctor.still import moves
from entangle.doctor.trends import is_zero

PER_TOKEN = ("simpo", "orpo")
"""Trainers whose `logps/*` are means over tokens."""


def meanings(log: TrainingLog) -> list[str]:
    """The traps in the names that this log has, one sentence each."""
    found = _of_groups(log) if log.family == "groups" else _of_pairs(log)
    gradient = log.series("grad_norm")
    if is_zero(gradient) and moves(log) and not is_zero(log.series("reward_std"), 1):
        found.append(
            "grad_norm reads 0 in every row though the rewards move: it isn't computed here (as under some versions of "
            "DeepSpeed), and no rule reads it."
        )
    return found


def _of_pairs(log: TrainingLog) -> list[str]:
    names, found = log.metrics, []
    if log.kind == "OpenRLHF's metrics":
        found.append(
            "chosen_reward and reject_reward are read as rewards/chosen and rewards/rejected. A reward "
            "model's training "
            "logs the same names: of one, nothing here holds."
        )
    if "rewards/chosen" in names:
        found.append(
            "rewards/* are beta times the log-ratio to the reference, whatever the loss: runs of other losses or of "
            "another beta don't compare."
            if has_reference(log)
            else "rewards/* are beta times logps/* here (a run without reference): they don't start at 0, and differ "
            "between batches as texts do."
        )
    if "logps/chosen" in names:
        found.append(_logps(log))
    if "rewards/accuracies" in names:
        found.append(
            "rewards/accuracies counts strictly larger rewards: 0 at the very start, where all are 0."
        )
    times = summed_over(log)
    if times > 1:
        found.append(
            f"loss starts at {times} times ln 2: it looks like a sum over {times} accumulation steps (as transformers "
            f"before 4.46 and some later versions log it). Rules divide it by {times}."
        )
    return found + _epochs(log)


def _epochs(log: TrainingLog) -> list[str]:
    """Which training rows are of pairs that weren't trained on yet."""
    if log.epochs.empty or not len(log.train.columns):
        return []
    epochs = log.epochs[log.epochs.index.isin(log.train.index)]
    first = epochs[epochs <= 1]
    if first.empty:
        return []
    if len(first) == len(epochs):
        return [
            "All training rows are of the first epoch: their pairs weren't trained on yet, so a row says what training "
            "on other pairs did to them, as a held-out row does."
        ]
    return [
        f"Training rows up to step {int(first.index[-1])} (first epoch) are of pairs not trained on yet; "
        "later rows are of "
        "pairs seen before, so a jump there is memory."
    ]


def _of_groups(log: TrainingLog) -> list[str]:
    names, found = log.metrics, []
    if "loss" in names:
        found.append(
            "loss near 0 is normal in GRPO and says nothing: advantages average out to 0 within a group, and what is "
            "left is beta times kl. The reward and grad_norm say whether it learns."
        )
    if "reward_std" in names:
        found.append(_reward_std(log))
    if "frac_reward_zero_std" in names:
        found.append(
            "frac_reward_zero_std counts exact ties among the few answers sampled: it says nothing of small spreads, "
            "and in RLOO with beta > 0 the KL term breaks the ties."
        )
    if "kl" in names:
        found.append(
            "kl is an estimate per token: averaged within each answer and then over answers in TRL of early 2025, over "
            "all tokens of the batch (long answers weigh more) since; between such versions runs don't compare."
        )
    if log.has_old_names:
        found.append(
            "completion_length and rewards/<function> are names of TRL of early 2025; they are read as "
            "completions/mean_length and rewards/<function>/mean. The length is cut at max_completion_length."
        )
    return found


def _reward_std(log: TrainingLog) -> str:
    scope = reward_std_is(log)
    if scope == "batch":
        return (
            "reward_std is taken over the whole batch, not within prompts: it stays large when every group is dead but "
            "groups differ."
        )
    if scope == "groups":
        functions = function_stds(log)
        std = log.series("reward_std")
        largest = max((float(log.series(name).max()) for name in functions), default=0.0)
        shows = (
            f" (0 beside {functions[0]} of up to {largest:.3g}, which is of the batch, shows it)"
            if (std == 0).any() and largest > 0
            else ""
        )
        return (
            f"reward_std is the mean of the stds within groups here{shows}: 0 says that no group of that row has "
            "spread."
        )
    return (
        "reward_std is the mean of the stds within groups before TRL 0.27, and the std over the whole "
        "batch since; the log "
        "doesn't say which version wrote it. Exactly 0 means dead groups in both."
    )


def _logps(log: TrainingLog) -> str:
    tail = " In training rows they are of other pairs each time; read rewards/* or an evaluation set."
    if (
        log.trainer in PER_TOKEN
        or {"log_odds_ratio", "log_odds_chosen", "odds_ratio_loss"} & log.metrics
        or _is_nll(log)
    ):
        return "logps/* are means over a response's tokens in this trainer." + tail
    if log.trainer in (None, "cpo") and not has_reference(log):
        return (
            "logps/* are means over tokens under simpo, ipo and orpo, and sums under cpo's other losses; the log "
            "doesn't say which (name it: --trainer)." + tail
        )
    return "logps/* are sums over a response's tokens, averaged over pairs: long texts weigh more." + tail


def _is_nll(log: TrainingLog) -> bool:
    """Whether logps/chosen is minus the SFT loss, which is a mean over tokens."""
    chosen = log.series("logps/chosen")
    both = [
        pd.concat([chosen, log.series(name)], axis=1).dropna() for name in SFT_LOSSES if len(log.series(name))
    ]
    return any(
        len(rows) and bool((rows.sum(axis=1).abs() <= 0.02 * rows.iloc[:, 0].abs()).all()) for rows in both
    )


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

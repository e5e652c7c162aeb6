"""What a run's log says, as evidence for the five answers."""

from __future__ import annotations

from typing import Any

import pandas as pd

from entangle.commands.why.training import Training
from entangle.doctor import TrainingLog, examine, read_log
from entangle.doctor.rewards import NEGLIGIBLE, has_reference, rewards_of
from entangle.doctor.trends import SIGMAS, Trend, onset, trend
from entangle.errors import DataError


def evidence_of(training: Training) -> dict[str, Any]:
    """The changes of both rewards, since when, what the rules warn of, and the held-out set's change.

    An interval is `SIGMAS` standard errors to both sides, as the doctor's rules count.

    Raises:
        DataError: there is no log, it is of sampled answers, or it has too little.
    """
    log = read_log(training.folder)
    if log.family != "preference":
        raise DataError(
            f"{log.path} is the log of a run on sampled answers (GRPO, RLOO), which has no pairs: entangle doctor and "
            "entangle rft look at those."
        )
    report = examine(log)
    rewards = rewards_of(log)
    if rewards is None:
        raise DataError(f"{log.path} has too few rows of rewards/chosen and rewards/rejected.")
    chosen = rewards.chosen_trend
    began = onset(rewards.chosen, chosen.start - SIGMAS * chosen.error) if chosen.has_fallen else None
    steps = rewards.chosen.index
    return {
        "path": log.path,
        "source": rewards.source,
        "first_step": int(steps[0]),
        "last_step": int(steps[-1]),
        "chosen": _move(chosen),
        "rejected": _move(rewards.rejected_trend),
        "onset": began,
        "warnings": [finding.rule for finding in report.findings if finding.level == "warning"],
        "held_out": _held_out(log),
        "notes": list(log.notes),
    }


def _held_out(log: TrainingLog) -> dict[str, float] | None:
    """The chosen reward's change on the evaluation set: over its rows, or of the last one against the reference."""
    found: pd.Series = log.evaluated("rewards/chosen")
    start = 0.0 if has_reference(log) else None
    whole = trend(found, start)
    if whole is None and start is not None and len(found):
        whole = Trend(start, float(found.iloc[-1]), NEGLIGIBLE / SIGMAS)
    return None if whole is None else _move(whole)


def _move(found: Trend) -> dict[str, float]:
    spread = SIGMAS * found.error
    return {"value": found.change, "low": found.change - spread, "high": found.change + spread}

"""Both rewards over a preference run, and the drift that they measure.

`rewards/chosen` and `rewards/rejected` are beta times the log-ratio to the reference: they start at 0 and say how far
the run has moved each response. Without a reference (CPO, SimPO, ORPO) they are beta times the log-prob itself: they
start anywhere, and only their change over the run says something.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from entangle.doctor.log import TrainingLog
from entangle.doctor.trends import SIGMAS, Trend, trend

NEGLIGIBLE = 0.01
"""A margin, in units of reward, that changes the incentive of DPO's loss by less than half a per cent."""


@dataclass(frozen=True)
class Rewards:
    """Both rewards over a run, from its evaluation set if that was taken often enough.

    Args:
        chosen: `rewards/chosen` by step.
        rejected: `rewards/rejected` by step.
        chosen_trend: the trend of `chosen`, from 0 where there is a reference.
        rejected_trend: the same for the rejected responses.
        source: where they are from, in words.
    """

    chosen: pd.Series
    rejected: pd.Series
    chosen_trend: Trend
    rejected_trend: Trend
    source: str

    @property
    def margin(self) -> float:
        """By how much the margin has grown."""
        return self.chosen_trend.change - self.rejected_trend.change

    @property
    def numbers(self) -> dict[str, float]:
        """The changes, in the log's units."""
        return {
            "change_chosen": self.chosen_trend.change,
            "error_chosen": self.chosen_trend.error,
            "change_rejected": self.rejected_trend.change,
            "error_rejected": self.rejected_trend.error,
        }


def has_reference(log: TrainingLog) -> bool:
    """Whether rewards are log-ratios: without a reference they are beta * logps/chosen, row by row."""
    if "rewards/chosen" not in log.train or "logps/chosen" not in log.train:
        return True
    rewards, logps = log.train["rewards/chosen"], log.train["logps/chosen"]
    if not (rewards.abs() > 0).any():
        return True  # all 0, as a log-ratio of equal models is
    ratio = (rewards / logps)[logps != 0].dropna()
    return len(ratio) < 3 or float(ratio.std()) > 1e-3 * abs(float(ratio.mean()))


def rewards_of(log: TrainingLog) -> Rewards | None:
    """Both rewards and their trends; None where the log has too little of them.

    Of too few rows for a trend, a last evaluation still says what changed on that set since the reference.
    """
    is_relative = has_reference(log)
    names = ("rewards/chosen", "rewards/rejected")
    chosen, rejected = log.best(*names)
    start = 0.0 if is_relative else None
    trends = trend(chosen, start), trend(rejected, start)
    if trends[0] is not None and trends[1] is not None:
        named = f"evaluation set {log.judged}" if log.judged else "the evaluation set"
        source = named if log.is_evaluated(*names) else "training rows"
        return Rewards(chosen, rejected, trends[0], trends[1], source)
    chosen, rejected = map(log.evaluated, names)
    if not is_relative or chosen.empty or rejected.empty:
        return None
    last = [Trend(0.0, float(side.iloc[-1]), NEGLIGIBLE / SIGMAS) for side in (chosen, rejected)]
    return Rewards(chosen, rejected, last[0], last[1], "the last evaluation")


def margin_of(log: TrainingLog) -> Trend | None:
    """The margin's trend; from the last evaluation where there are too few rows."""
    start = 0.0 if has_reference(log) else None
    found = trend(log.best("rewards/margins")[0], start)
    evaluated = log.evaluated("rewards/margins")
    if found is None and start is not None and len(evaluated):
        return Trend(0.0, float(evaluated.iloc[-1]), NEGLIGIBLE / SIGMAS)
    return found


@dataclass(frozen=True)
class Drift:
    """Nats by which both log-probs moved together per nat of margin gained.

    Args:
        value: (change of chosen + change of rejected) / (2 (change of chosen - change of rejected)).
        error: its standard error.
        margin: by how much the margin grew, in the log's units.
        source: where the rewards are from, in words.
    """

    value: float
    error: float
    margin: float
    source: str

    @property
    def meaning(self) -> str:
        """What it says, in a sentence."""
        size, spread = abs(self.value), 2 * self.error
        if size + spread < 0.5:
            what = "the chosen rises and the rejected falls"
        elif size - spread <= 0.5:
            what = "whether both move one way can't be told"
        else:
            what = "both rise" if self.value > 0 else "both fall"
        return (
            f"each nat of margin came with {size:.2g} +- {max(spread, 1e-3):.1g} nats of "
            f"{'rise' if self.value > 0 else 'fall'} of "
            f"both log-probs: {what} (above 0.5 both rise, below -0.5 both fall)"
        )


def _apart(rewards: Rewards) -> tuple[Trend, Trend]:
    """Trends of sum and margin from those of the sides, where too few rows have both."""
    chosen, rejected = rewards.chosen_trend, rewards.rejected_trend
    error = math.hypot(chosen.error, rejected.error)
    return (
        Trend(chosen.start + rejected.start, chosen.end + rejected.end, error),
        Trend(chosen.start - rejected.start, chosen.end - rejected.end, error),
    )


def drift_of(log: TrainingLog) -> Drift | str:
    """The drift that a log measures, or why it can't be told.

    beta cancels. It is told only where the margin grew by more than `SIGMAS` standard errors and `NEGLIGIBLE`.
    """
    rewards = rewards_of(log)
    if rewards is None:
        return "rewards/chosen and rewards/rejected weren't logged often enough"
    both = pd.concat([rewards.chosen, rewards.rejected], axis=1, keys=["chosen", "rejected"]).dropna()
    start = 0.0 if has_reference(log) else None
    total, margin = (
        trend(both["chosen"] + both["rejected"], start),
        trend(both["chosen"] - both["rejected"], start),
    )
    if total is None or margin is None:
        total, margin = _apart(rewards)
    least = NEGLIGIBLE if start is not None else 0.0
    if margin.change <= max(SIGMAS * margin.error, least):
        return (
            f"the margin hasn't grown clearly above its noise ({margin.change:.2g} +- "
            f"{2 * margin.error:.1g}), and drift "
            "is per nat of it"
        )
    value = total.change / (2 * margin.change)
    error = math.hypot(total.error, 2 * value * margin.error) / (2 * margin.change)
    return Drift(value, error, margin.change, rewards.source)

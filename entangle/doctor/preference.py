"""Rules for runs that trained on preference pairs.

`rewards/chosen` and `rewards/rejected` are beta times the log-ratio to the reference: they start at 0 and say how far
the run has moved each response. Without a reference (CPO, SimPO, ORPO) they are beta times the log-prob itself: they
start anywhere, and only their change over the run says something.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from entangle.doctor.log import TrainingLog
from entangle.doctor.rules import Finding, Rule
from entangle.doctor.trends import SIGMAS, Trend, onset, smooth, trend

NEGLIGIBLE = 0.01
"""A margin, in units of reward, that changes the incentive of DPO's loss by less than half a per cent."""

PROBE = "entangle probe --model_name_or_path MODEL --dataset_name DATA"


@dataclass(frozen=True)
class Rewards:
    """Both rewards over a run, from its evaluation set if that was taken often enough.

    Args:
        chosen: `rewards/chosen` by step.
        chosen_trend: its trend, from 0 where there is a reference.
        rejected_trend: the same for the rejected responses.
    """

    chosen: pd.Series
    chosen_trend: Trend
    rejected_trend: Trend

    @property
    def margin(self) -> float:
        """By how much the margin has grown."""
        return self.chosen_trend.change - self.rejected_trend.change

    @property
    def numbers(self) -> dict[str, float]:
        """The changes, in the log's units."""
        return {
            "chosen_change": self.chosen_trend.change, "chosen_error": self.chosen_trend.error,
            "rejected_change": self.rejected_trend.change, "rejected_error": self.rejected_trend.error,
        }  # fmt: skip


def has_reference(log: TrainingLog) -> bool:
    """Whether rewards are log-ratios: without a reference they are beta * logps/chosen, row by row."""
    if "rewards/chosen" not in log.train or "logps/chosen" not in log.train:
        return True
    ratio = (log.train["rewards/chosen"] / log.train["logps/chosen"]).dropna()
    return len(ratio) < 3 or float(ratio.std()) > 1e-3 * abs(float(ratio.mean()))


def rewards_of(log: TrainingLog) -> Rewards | None:
    """Both rewards and their trends; None where the log has too little of them."""
    start = 0.0 if has_reference(log) else None
    chosen, rejected = (log.best(f"rewards/{side}", least=5) for side in ("chosen", "rejected"))
    chosen_trend, rejected_trend = trend(chosen, start), trend(rejected, start)
    if chosen_trend is None or rejected_trend is None:
        return None
    return Rewards(chosen, chosen_trend, rejected_trend)


def coupled_fall(log: TrainingLog, threshold: float) -> Finding | None:
    """Chosen and rejected fall together, the chosen by more than a share of the margin's growth."""
    rewards = rewards_of(log)
    if rewards is None or not (rewards.chosen_trend.has_fallen and rewards.rejected_trend.has_fallen):
        return None
    fall = -rewards.chosen_trend.change
    if fall <= threshold * rewards.margin:
        return None
    step = onset(rewards.chosen, rewards.chosen_trend.start - SIGMAS * rewards.chosen_trend.error)
    per_margin = f" ({fall / rewards.margin:.2f} per unit of margin gained)" if rewards.margin > 0 else ""
    return Finding(
        f"Chosen and rejected fall together: rewards/chosen by {fall:.3g}, rewards/rejected by "
        f"{-rewards.rejected_trend.change:.3g}{per_margin}."
        + (f" It begins at step {step}." if step is not None else ""),
        step, rewards.numbers | {"margin_change": rewards.margin},
    )  # fmt: skip


def coupled_rise(log: TrainingLog, threshold: float) -> Finding | None:
    """Chosen and rejected rise together, the rejected by more than a share of the chosen's rise."""
    rewards = rewards_of(log)
    if rewards is None or not (rewards.chosen_trend.has_risen and rewards.rejected_trend.has_risen):
        return None
    share = rewards.rejected_trend.change / rewards.chosen_trend.change
    if share <= threshold:
        return None
    return Finding(
        f"Chosen and rejected rise together: the rejected reward gains {share:.2f} of what the chosen gains "
        f"({rewards.rejected_trend.change:.3g} of {rewards.chosen_trend.change:.3g}).",
        numbers=rewards.numbers, level="note",
    )  # fmt: skip


def rise_then_fall(log: TrainingLog, threshold: float) -> Finding | None:
    """The chosen rose first, and has since lost more than a share of the margin's growth."""
    rewards = rewards_of(log)
    if rewards is None or len(rewards.chosen) < 10:
        return None
    line, error = smooth(rewards.chosen), rewards.chosen_trend.error
    peak, step = float(line.max()), int(line.index[int(line.to_numpy().argmax())])
    loss = peak - rewards.chosen_trend.end
    # the highest of many noisy rows is high by chance: it must stand out by twice what a known row must
    rose = peak - rewards.chosen_trend.start > 2 * SIGMAS * error
    if not rose or loss <= max(2 * SIGMAS * error, threshold * rewards.margin):
        return None
    return Finding(
        f"The chosen reward rises until step {step} and then loses {loss:.3g} of it.",
        step, rewards.numbers | {"peak": peak, "loss": loss},
    )  # fmt: skip


def chosen_collapse(log: TrainingLog, threshold: float) -> Finding | None:
    """The margin grows while the chosen responses' own log-prob collapses."""
    logps, margin = trend(log.best("logps/chosen", least=5)), trend(log.best("rewards/margins", least=5))
    if logps is None or margin is None or not (logps.has_fallen and margin.has_risen):
        return None
    factor = logps.end / logps.start if logps.start < 0 else math.inf
    if factor <= threshold:
        return None
    return Finding(
        f"The margin grows by {margin.change:.3g} while the chosen responses' log-prob falls from {logps.start:.4g} to "
        f"{logps.end:.4g}: a token's probability p is now p^{factor:.2f}.",
        numbers={"factor": factor, "start": logps.start, "end": logps.end, "margin_change": margin.change},
    )  # fmt: skip


def no_margin(log: TrainingLog, threshold: float) -> Finding | None:
    """The margin hasn't grown by more than its noise, or by next to nothing, or has shrunk."""
    is_relative = has_reference(log)
    margin = trend(log.best("rewards/margins", least=5), 0.0 if is_relative else None)
    if margin is None:
        return None
    numbers = {"margin_change": margin.change, "margin_error": margin.error}
    if margin.has_fallen:
        return Finding(
            f"The margin shrinks by {-margin.change:.3g}: the run moves pairs against their labels.",
            numbers=numbers,
        )
    if is_relative and margin.change < NEGLIGIBLE:
        return Finding(
            f"The margin has hardly moved ({margin.change:.2g}): hardly anything is learned.", numbers=numbers
        )
    if margin.change > threshold * margin.error:
        return None
    return Finding(
        f"The margin hasn't moved by more than its noise ({margin.change:.2g} +- {margin.error:.2g}).",
        # without a reference, rows differ by their texts more than by what was learned
        numbers=numbers, level="warning" if is_relative else "note",
    )  # fmt: skip


def saturation(log: TrainingLog, threshold: float) -> Finding | None:
    """Almost no incentive is left: the loss's weight on a pair, against its weight at the start."""
    loss = log.series("loss")
    if len(loss) < 5 or abs(float(loss.iloc[0]) - math.log(2)) > 0.1 or not has_reference(log):
        return None  # another loss than DPO's: its weight can't be read from its value
    smoothed = smooth(loss)
    weight = pd.Series([-2 * math.expm1(-value) for value in smoothed.tolist()], smoothed.index)
    step = onset(weight, threshold)
    if step is None:
        return None
    left = float(weight.iloc[-1])
    rest = 1 - (step - loss.index[0]) / max(loss.index[-1] - loss.index[0], 1)
    return Finding(
        f"Saturated from step {step} on: at most {100 * left:.0f} % of the incentive is left, and {100 * rest:.0f} % "
        "of the run came after. More steps only pull on the few pairs that aren't separated yet.",
        step, {"incentive_left": left, "share_of_run": rest},
    )  # fmt: skip


def start_off_reference(log: TrainingLog, threshold: float) -> Finding | None:
    """The first step's rewards aren't 0, so the policy doesn't start from the reference."""
    chosen, rejected = log.series("rewards/chosen"), log.series("rewards/rejected")
    if not has_reference(log) or chosen.empty or rejected.empty or chosen.index[0] > 1:
        return None
    largest = max(abs(float(chosen.iloc[0])), abs(float(rejected.iloc[0])))
    if largest <= threshold:
        return None
    return Finding(
        f"The rewards of step 1 are {chosen.iloc[0]:.3g} and {rejected.iloc[0]:.3g}; a policy that starts from its "
        "reference has 0. The reference is another model, or the run was resumed.",
        1, {"largest": largest},
    )  # fmt: skip


def broken_numbers(log: TrainingLog, threshold: float) -> Finding | None:
    """A metric isn't a finite number."""
    if len(log.broken) <= threshold:
        return None
    first = min(log.broken, key=lambda name: log.broken[name])
    return Finding(
        f"{', '.join(sorted(log.broken))}: not finite, first {first} at step {log.broken[first]}.",
        log.broken[first],
    )  # fmt: skip


PREFERENCE_RULES = (
    Rule(
        "coupled_fall", "preference", 0.1, "fall of the chosen reward per unit of margin gained",
        "both changes exceed three standard errors, and a tenth of the margin is paid for with the chosen's own "
        "probability; below that the drift is small beside what the run learns",
        coupled_fall,
        f"which pairs do it, and under which loss they wouldn't: {PROBE}, then entangle whatif RUN",
    ),
    Rule(
        "coupled_rise", "preference", 0.1, "rise of the rejected reward per rise of the chosen reward",
        "both changes exceed three standard errors, and the rejected response keeps a tenth of the gain",
        coupled_rise,
        f"how much of an NLL term (rpo, cpo, dpop) the pairs need and no more: {PROBE}, then entangle whatif RUN",
    ),
    Rule(
        "rise_then_fall", "preference", 0.1, "loss of the chosen reward since its peak per unit of margin gained",
        "as coupled_fall, counted from the peak; rise and loss exceed six standard errors, since a peak is the highest "
        "of many rows",
        rise_then_fall,
        "what changed between the two checkpoints: probe both",
    ),
    Rule(
        "chosen_collapse", "preference", 1.25, "log-prob of the chosen responses at the end over the start",
        "a response of 2 nats per token falls from 14 % to 8 % per token; batches of other pairs and an SFT-like drift "
        "stay below",
        chosen_collapse,
        f"which tokens lose their probability: {PROBE}, then entangle tokens RUN",
    ),
    Rule(
        "no_margin", "preference", 3.0, "standard errors that the margin must have grown by",
        "at three, a run that learns nothing is taken for one that learns once in 700; a margin below 0.01 is nothing",
        no_margin,
        "whether scores vanish or cancel, and whether labels are swapped: " + PROBE,
    ),
    Rule(
        "saturation", "preference", 0.1, "share of the starting incentive that is left, at most",
        "for loss L = -ln s(z) the mean incentive is at most 1 - e^-L (Jensen), 1/2 at the start; with a tenth left a "
        "step costs what it did and moves a tenth",
        saturation,
        f"how many pairs still train, pair by pair: {PROBE}",
    ),
    Rule(
        "start_off_reference", "preference", 0.5, "reward at step 1",
        "0 up to rounding; bf16 leaves up to some nats on long responses, times beta 0.1 some tenths",
        start_off_reference,
        "whether the reference is the model that the adapter sits on: entangle probe checks it before it starts",
    ),
    Rule(
        "broken_numbers", "preference", 0.0, "metrics that may be non-finite",
        "a NaN in a loss or a gradient ends all learning",
        broken_numbers,
        f"which pairs have no finite score: {PROBE} (column non_finite)",
    ),
)  # fmt: skip
"""The rules, in the order in which they are reported."""

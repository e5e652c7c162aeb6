"""Rules for runs that trained on preference pairs; what their rewards are, see `entangle.doctor.rewards`."""

from __future__ import annotations

import math

import pandas as pd

from entangle.doctor.log import TrainingLog
from entangle.doctor.rewards import NEGLIGIBLE, has_reference, margin_of, rewards_of
from entangle.doctor.rules import Finding, Rule
from entangle.doctor.trends import LEAST_ROWS, SIGMAS, is_zero, onset, since, smooth, trend

PROBE = "entangle probe --model_name_or_path MODEL --dataset_name DATA"

SFT_LOSSES = ("nll_loss", "sft_loss")
"""What trainers call the SFT term that some losses have beside the preference term."""

MOSTLY_SFT = 0.8
"""Of a rise whose rejected side has more than this share, the preference term made less than a fifth."""

FAR = 20.0
"""A margin, in units of reward, at which a sigmoid loss has e^-20 = 2e-9 of its incentive left."""


def coupled_fall(log: TrainingLog, threshold: float) -> Finding | None:
    """Chosen and rejected fall together, the chosen by more than a share of the margin's growth."""
    rewards = rewards_of(log)
    if rewards is None or not (rewards.chosen_trend.has_fallen and rewards.rejected_trend.has_fallen):
        return None
    fall = -rewards.chosen_trend.change
    if fall <= threshold * rewards.margin:
        return None
    enough = len(rewards.chosen) >= LEAST_ROWS
    step = (
        onset(rewards.chosen, rewards.chosen_trend.start - SIGMAS * rewards.chosen_trend.error)
        if enough
        else None
    )
    per_margin = f" ({fall / rewards.margin:.2f} per unit of margin gained)" if rewards.margin > 0 else ""
    return Finding(
        f"Chosen and rejected fall together: rewards/chosen by {fall:.3g}, rewards/rejected by "
        f"{-rewards.rejected_trend.change:.3g}{per_margin}."
        + (f" It begins at step {step}." if step is not None else "")
        + (" (From the last evaluation, against the reference.)" if not enough else ""),
        step,
        rewards.numbers | {"margin_change": rewards.margin},
    )


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
        f"({rewards.rejected_trend.change:.3g} of "
        f"{rewards.chosen_trend.change:.3g}).{_sft(log, rewards.margin, share)}",
        numbers=rewards.numbers | {"margin_change": rewards.margin},
        level="note",
    )


def _sft(log: TrainingLog, margin: float, share: float) -> str:
    """What a rise of nearly equal size says where there is an SFT term."""
    if share < MOSTLY_SFT or not ({*SFT_LOSSES} & log.metrics or not has_reference(log)):
        return ""
    return (
        f" The margin gains {margin:.2g} only: the preference term does next to nothing beside the SFT term, which "
        "learns the chosen responses by heart and lifts the rejected ones with them."
    )


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
        step,
        rewards.numbers | {"peak": peak, "loss": loss},
    )


def chosen_collapse(log: TrainingLog, threshold: float) -> Finding | None:
    """The margin grows while the chosen responses' own log-prob collapses."""
    logps, margin = map(trend, log.best("logps/chosen", "rewards/margins"))
    if logps is None or margin is None or not (logps.has_fallen and margin.has_risen):
        return None
    factor = logps.end / logps.start if logps.start < 0 else math.inf
    if factor <= threshold:
        return None
    return Finding(
        f"The margin grows by {margin.change:.3g} while the chosen responses' log-prob falls from {logps.start:.4g} to "
        f"{logps.end:.4g}: a token's probability p is now p^{factor:.2f}.",
        numbers={"factor": factor, "start": logps.start, "end": logps.end, "margin_change": margin.change},
    )


def no_margin(log: TrainingLog, threshold: float) -> Finding | None:
    """The margin hasn't grown by more than its noise, or by next to nothing, or has shrunk."""
    is_relative, margin = has_reference(log), margin_of(log)
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
        numbers=numbers,
        level="warning" if is_relative else "note",
    )


def loss_of(log: TrainingLog) -> pd.Series:
    """The loss per batch, where it is a sigmoid's (by its first row); empty for any other.

    Left out are rows whose rewards aren't finite, and a loss that was summed over accumulation steps is divided again.
    """
    loss = log.series("loss")
    bad = log.bad_steps("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "loss")
    loss = loss[~loss.index.isin(sorted(bad))] / summed_over(log)
    margin = log.series("rewards/margins")
    first = 0.0 if loss.empty else float(margin.get(loss.index[0], 0.0))
    if loss.empty or abs(float(loss.iloc[0]) - _sigmoid_loss(first)) > 0.1 or not has_reference(log):
        return loss[:0]
    return loss


def _sigmoid_loss(margin: float) -> float:
    """-ln s(margin): ln 2 at the start, and what the loss of pairs of one margin is."""
    return math.log1p(math.exp(-margin)) if margin > -500 else -margin


def summed_over(log: TrainingLog) -> int:
    """Over how many accumulation steps the logged loss is a sum; 1 where it is a mean, or can't be told.

    A sigmoid loss is ln(1 + e^-margin) while the pairs are alike, as they are in the first rows.
    """
    rows = pd.concat(
        [log.series("loss"), log.series("rewards/margins")], axis=1, keys=["loss", "margin"]
    ).dropna()
    rows = rows.iloc[:3]
    rows = rows[rows["margin"].abs() <= 1]
    if not has_reference(log) or len(rows) < 2 or {*SFT_LOSSES} & log.metrics:
        return 1
    ratios = [loss / _sigmoid_loss(margin) for loss, margin in zip(rows["loss"], rows["margin"], strict=True)]
    times = round(ratios[0])
    is_usual = times in (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256)
    return times if is_usual and all(abs(ratio / times - 1) < 0.1 for ratio in ratios) else 1


def saturation(log: TrainingLog, threshold: float) -> Finding | None:
    """Almost no incentive is left: the loss's weight on a pair, against its weight at the start."""
    loss = loss_of(log)
    if len(loss) < LEAST_ROWS:
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
        "of the run came after. More steps only act on the few pairs that aren't separated yet.",
        step,
        {"incentive_left": left, "share_of_run": rest},
    )


def overshoot(log: TrainingLog, threshold: float) -> Finding | None:
    """The margin has gone so far that nothing of the incentive is left: the learning rate was far too high."""
    margin = log.series("rewards/margins")
    if len(margin) < 2 or not has_reference(log):
        return None
    step = since(margin > threshold)
    if step is None:
        return None
    loss, gradient = log.series("loss"), log.series("grad_norm")
    moved = [
        f"the {side} responses' log-prob from {logps.iloc[0]:.4g} to {logps.iloc[-1]:.4g} ({_change(logps)})"
        for side in ("chosen", "rejected")
        if len(logps := log.series(f"logps/{side}")) >= 2
    ]
    ends = [
        f"the loss is {loss.iloc[-1]:.4f}" if len(loss) else "",
        "the gradient 0" if is_zero(gradient[-1:], 1) else "",
    ]
    return Finding(
        f"Overshot by step {step}: the margin is {margin.iloc[-1]:.4g} in units of reward"
        + "".join(f", {end}" for end in ends if end)
        + (f"; {', '.join(moved)}" if moved else "")
        + f". All was over within {step} steps: the learning rate is far too high"
        + (f" ({log.series('learning_rate').max():.2g})." if len(log.series("learning_rate")) else "."),
        step,
        {"margin": float(margin.iloc[-1])},
    )


def _change(logps: pd.Series) -> str:
    change = float(logps.iloc[-1] - logps.iloc[0])
    return f"{'gained' if change > 0 else 'lost'} {abs(change):.4g} nats"


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
        1,
        {"largest": largest},
    )


PREFERENCE_RULES = (
    Rule(
        "coupled_fall",
        "preference",
        0.1,
        "fall of the chosen reward per unit of margin gained",
        "both changes exceed three standard errors, and a tenth of the margin is paid for with the chosen's own "
        "probability; below that the drift is small beside what the run learns",
        coupled_fall,
        f"which pairs do it, and under which loss they wouldn't: {PROBE}, then entangle whatif RUN",
        needs=("rewards/chosen", "rewards/rejected"),
    ),
    Rule(
        "coupled_rise",
        "preference",
        0.1,
        "rise of the rejected reward per rise of the chosen reward",
        "both changes exceed three standard errors, and the rejected response keeps a tenth of the gain",
        coupled_rise,
        f"how much of an NLL term (rpo, cpo, dpop) the pairs need and no more: {PROBE}, then entangle whatif RUN",
        needs=("rewards/chosen", "rewards/rejected"),
    ),
    Rule(
        "rise_then_fall",
        "preference",
        0.1,
        "loss of the chosen reward since its peak per unit of margin gained",
        "as coupled_fall, counted from the peak; rise and loss exceed six standard errors, since a peak is the highest "
        "of many rows",
        rise_then_fall,
        "what changed between the two checkpoints: probe both",
        needs=("rewards/chosen", "rewards/rejected"),
    ),
    Rule(
        "chosen_collapse",
        "preference",
        1.25,
        "log-prob of the chosen responses at the end over the start",
        "a response of 2 nats per token falls from 14 % to 8 % per token; batches of other pairs and an SFT-like drift "
        "stay below",
        chosen_collapse,
        f"which tokens lose their probability: {PROBE}, then entangle tokens RUN",
        needs=("logps/chosen", "rewards/margins"),
    ),
    Rule(
        "no_margin",
        "preference",
        3.0,
        "standard errors that the margin must have grown by",
        "at three, a run that learns nothing is taken for one that learns once in 700; a margin below 0.01 is nothing",
        no_margin,
        "whether scores vanish or cancel, and whether labels are swapped: " + PROBE,
        needs=("rewards/margins",),
        of_motion=False,
    ),
    Rule(
        "saturation",
        "preference",
        0.1,
        "share of the starting incentive that is left, at most",
        "for loss L = -ln s(z) the mean incentive is at most 1 - e^-L (Jensen), 1/2 at the start; with a tenth left a "
        "step costs what it did and moves a tenth",
        saturation,
        f"how many pairs still train, pair by pair: {PROBE}",
        needs=("loss",),
    ),
    Rule(
        "start_off_reference",
        "preference",
        0.5,
        "reward at step 1",
        "0 up to rounding; bf16 leaves up to some nats on long responses, times beta 0.1 some tenths",
        start_off_reference,
        "whether the reference is the model that the adapter sits on: entangle probe checks it before it starts",
        needs=("rewards/chosen", "rewards/rejected"),
        of_motion=False,
    ),
    Rule(
        "overshoot",
        "preference",
        FAR,
        "margin at the end, in units of reward",
        "a sigmoid loss has e^-20 of its incentive left: nothing holds it back, and every further nat was for nothing",
        overshoot,
        f"what is left of the answers: sample from the checkpoint; how far one step may go: {PROBE}",
        needs=(("rewards/margins",),),
    ),
)
"""The rules, in the order in which they are reported."""

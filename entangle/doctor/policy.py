"""Rules for the policy of a run that samples groups (GRPO, RLOO): its reward, KL, entropy, clipping and sampling."""

from __future__ import annotations

import math

import pandas as pd

from entangle.doctor.log import TrainingLog
from entangle.doctor.rules import Finding, Rule
from entangle.doctor.trends import LEAST_ROWS, SIGMAS, highest, since, trend

MISMATCH = "sampling/sampling_logp_difference/mean"
RATIO = "sampling/importance_sampling_ratio/mean"
FAILURES = "tools/failure_frequency"
FALLEN = 0.5
"""Share of what was gained (or of the reward's spread) whose loss is a fall."""

RANDOM = 2.0
"""Nats per token above which an entropy that has grown is on its way to noise."""

RUNAWAY = 1.3
"""Growth from row to row that is no longer noise around a level."""

CLIPPED = ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean")


def kl_explodes(log: TrainingLog, threshold: float) -> Finding | None:
    """The divergence from the reference grows by orders of magnitude and stays there."""
    kl = log.series("kl").abs()
    if len(kl) < LEAST_ROWS:
        return None
    high = kl > threshold
    step = since(high)
    if step is None:
        spikes = kl[high]
        if spikes.empty:
            return None
        return Finding(
            f"kl jumps to {spikes.max():.3g} at step {highest(spikes)} and comes back: a few tokens that the "
            "reference finds all but impossible do that to this estimate.",
            highest(spikes),
            {"peak": float(spikes.max())},
            "note",
        )
    place = _began(kl, list(kl.index).index(step))
    before, end = kl.iloc[max(place - 1, 0)], float(kl.iloc[-max(3, len(kl) // 10) :].median())
    step = int(kl.index[place])
    return Finding(
        f"From step {step} on KL is off: {before:.2g} before, {end:.2g} at the end. The policy broke; the last good "
        f"checkpoint is before step {step}.",
        step,
        {"before": float(before), "end": end},
    )


def _began(kl: pd.Series, place: int) -> int:
    """Where a runaway began that passed its threshold at a row: the first row of its unbroken growth."""
    values = kl.to_numpy(float)
    while place > 1 and values[place - 1] > RUNAWAY * values[place - 2]:
        place -= 1
    return place


def reward_falls(log: TrainingLog, threshold: float) -> Finding | None:
    """The reward has lost a good part of what it had gained, or of its spread, since its peak."""
    reward, spread = log.series("reward"), log.series("reward_std")
    ends = trend(reward)
    if ends is None or len(reward) < 2 * LEAST_ROWS:
        return None
    line = reward.rolling(max(3, len(reward) // 10), center=True, min_periods=2).mean()
    peak, most, step = float(line.max()), float(reward.max()), highest(reward)
    loss, gained = peak - ends.end, peak - ends.start
    scale = max(gained, float(spread.median()) if len(spread) else 0.0)
    below_start = ends.has_fallen and -ends.change > threshold / 2 * scale
    # the highest of many noisy rows is high by chance: it must stand out by twice what a known row must
    if not below_start and (loss <= 2 * SIGMAS * ends.error or loss <= threshold * scale):
        return None
    return Finding(
        f"The reward falls from its peak ({peak:.3g} smoothed, {most:.3g} in its highest row, step {step}) to "
        f"{ends.end:.3g}"
        + (
            ": all that was gained and more."
            if loss > gained
            else f": {100 * loss / gained:.0f} % of what was gained."
        ),
        step,
        {"peak": peak, "end": ends.end, "start": ends.start},
    )


def entropy_drift(log: TrainingLog, threshold: float) -> Finding | None:
    """The policy's entropy has collapsed, or has grown beyond all bounds."""
    entropy = trend(log.series("entropy"))
    if entropy is None or entropy.start <= 0:
        return None
    factor = entropy.end / entropy.start
    if 1 / threshold < factor < threshold:
        return None
    numbers = {"start": entropy.start, "end": entropy.end}
    ends = f"Entropy goes from {entropy.start:.2g} to {entropy.end:.2g} nats per token"
    if factor < 1:
        return Finding(
            f"{ends}: it has collapsed, and answers to a prompt are nearly all one and the same. Without different "
            "answers there is no spread of rewards, and no gradient.",
            numbers=numbers,
        )
    if entropy.end < RANDOM:
        return Finding(f"{ends}: the policy has become less sure of itself.", numbers=numbers, level="note")
    return Finding(f"{ends}: the policy has come apart, and its tokens are close to random.", numbers=numbers)


def clipped_ratios(log: TrainingLog, threshold: float) -> Finding | None:
    """Too many tokens are outside the clipping range: the policy moves far within one batch of answers."""
    name = next((name for name in CLIPPED if len(log.series(name))), "")
    clipped = trend(log.series(name))
    if clipped is None or clipped.end <= threshold:
        return None
    return Finding(
        f"{100 * clipped.end:.0f} % of the tokens are clipped at the end of the run ({name}; at its start "
        f"{100 * clipped.start:.0f} %): the policy is far from the one that sampled them. Fewer updates per batch of "
        "answers, or a lower learning rate.",
        numbers={"start": clipped.start, "end": clipped.end},
    )


def tool_failures(log: TrainingLog, threshold: float) -> Finding | None:
    """Too many of the policy's tool calls fail."""
    failures = trend(log.series(FAILURES))
    if failures is None or failures.end <= threshold:
        return None
    return Finding(
        f"{100 * failures.end:.0f} % of the tool calls fail at the end of the run (at its start "
        f"{100 * failures.start:.0f} %): the reward is of answers without their tools.",
        numbers={"start": failures.start, "end": failures.end},
    )


def sampler_mismatch(log: TrainingLog, threshold: float) -> Finding | None:
    """The engine that samples and the model that trains disagree on the log-probs of the same tokens."""
    difference, ratio = log.series(MISMATCH).abs(), log.series(RATIO)
    if difference.empty:
        return _by_ratio(ratio, threshold)
    ends = trend(difference)
    start, end = (ends.start, ends.end) if ends else (float(difference.iloc[0]), float(difference.iloc[-1]))
    if end <= threshold:
        return None
    return Finding(
        f"The sampler's log-probs differ from the trainer's by {end:.2g} nats per token on average (at the start "
        f"{start:.2g}"
        + (f"; mean importance ratio {ratio.iloc[-1]:.2g}" if len(ratio) else "")
        + "): answers are of another policy than the one that is trained. Other weights, precision, temperature or "
        "template in the sampling engine.",
        numbers={"start": start, "end": end},
    )


def _by_ratio(ratio: pd.Series, threshold: float) -> Finding | None:
    """The same by the mean importance ratio, which is 1 between equal policies (capped ratios lower it)."""
    ends = trend(ratio)
    if ends is None or ends.end > 0 and abs(math.log(ends.end)) <= 5 * threshold:
        return None
    return Finding(
        f"The mean importance ratio between trainer and sampler is {ends.end:.2g} at the end of the run (at its start "
        f"{ends.start:.2g}); between equal policies it is 1: answers are of another policy than the one "
        "that is trained.",
        numbers={"start": ends.start, "end": ends.end},
    )


def no_gain(log: TrainingLog, threshold: float) -> Finding | None:
    """The reward hasn't risen by more than its noise."""
    reward = trend(log.series("reward"))
    if reward is None or reward.change > threshold * reward.error:
        return None
    # a reward of one value has no noise: it is dead or solved, which other rules say
    if reward.error == 0 or reward_falls(log, FALLEN) is not None:
        return None
    return Finding(
        f"The reward hasn't risen by more than its noise ({reward.start:.3g} at the start, {reward.end:.3g} "
        "at the end, "
        f"+- {reward.error:.2g}).",
        numbers={"start": reward.start, "end": reward.end, "error": reward.error},
        level="note",
    )


POLICY_RULES = (
    Rule(
        "kl_explodes",
        "groups",
        3.0,
        "kl at the end, nats per token",
        "healthy runs stay below one nat per token; at three the policy has little to do with its reference",
        kl_explodes,
        "whether a lower learning rate or a larger beta holds it: train again from the checkpoint before",
        needs=("kl",),
    ),
    Rule(
        "reward_falls",
        "groups",
        FALLEN,
        "loss since the peak, as a share of what was gained (or of the reward's spread)",
        "half of the gain is far beyond noise: peak and loss exceed six standard errors",
        reward_falls,
        "what changed between the two checkpoints: entangle rft --before on the answers of both",
        needs=("reward",),
    ),
    Rule(
        "no_gain",
        "groups",
        3.0,
        "standard errors that the reward must have risen by",
        "at three, a run that learns nothing is taken for one that learns once in 700",
        no_gain,
        "whether groups have a spread to learn from: entangle rft --model_name_or_path MODEL --dataset_name PROMPTS",
        needs=("reward",),
    ),
    Rule(
        "entropy_drift",
        "groups",
        5.0,
        "factor between the entropies at the start and at the end",
        "training for a reward lowers it by a factor of two or three; at five, samples are copies, or noise",
        entropy_drift,
        "how many different answers a prompt still gets: sample from the checkpoint",
        needs=("entropy",),
    ),
    Rule(
        "clipped_ratios",
        "groups",
        0.2,
        "share of tokens outside the clipping range, at the end",
        "some per cent are clipped in healthy runs; of a fifth, the update is no longer that of the objective",
        clipped_ratios,
        "how far one update goes: num_iterations, steps_per_generation and the learning rate",
        needs=(CLIPPED,),
    ),
    Rule(
        "tool_failures",
        "groups",
        0.5,
        "share of tool calls that fail, at the end",
        "at a half the reward mostly judges answers that never saw their tool's result",
        tool_failures,
        "which calls fail: the trainer's table of completions (log_completions)",
        needs=(FAILURES,),
    ),
    Rule(
        "sampler_mismatch",
        "groups",
        0.1,
        "mean difference of log-probs between sampler and trainer, nats per token",
        "16-bit arithmetic of two engines leaves about 0.01 to 0.03; a tenth is another model",
        sampler_mismatch,
        "the same answers scored by both engines: precision, chat template, temperature, and when weights are synced",
        needs=((MISMATCH, RATIO),),
    ),
)
"""The rules, in the order in which they are reported."""

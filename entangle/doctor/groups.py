"""Rules for runs that sample groups of answers to a prompt (GRPO, RLOO): no spread of rewards, no gradient."""

from __future__ import annotations

import pandas as pd

from entangle.doctor.log import TrainingLog
from entangle.doctor.rules import Finding, Rule
from entangle.doctor.trends import LEAST_ROWS, trend

DEAD = "frac_reward_zero_std"
RFT = "entangle rft --model_name_or_path MODEL --dataset_name PROMPTS"


def _is_batchwise(share: pd.Series) -> bool:
    """Whether the metric is taken over the whole batch: then it is 0 or 1 and says nothing about groups."""
    return len(share) >= LEAST_ROWS and bool(share.isin([0.0, 1.0]).all()) and bool((share == 1).any())


def dead_groups(log: TrainingLog, threshold: float) -> Finding | None:
    """Too many groups whose rewards are all equal: they give no gradient of the reward."""
    share, reward = log.series(DEAD), trend(log.series("reward"))
    ends = trend(share)
    if ends is None or ends.end <= threshold:
        return None
    level = (
        "" if reward is None else f" The mean reward is {reward.end:.3g} (at the start {reward.start:.3g})."
    )
    grown = ends.has_risen and ends.start <= threshold
    return Finding(
        f"{100 * ends.end:.0f} % of the answers are in groups without any spread of rewards at the end of the run"
        + (f", against {100 * ends.start:.0f} % at its start: prompts are being used up." if grown else ".")
        + f"{level} Dead groups of high reward are solved; of low reward, out of reach.",
        numbers={"start": ends.start, "end": ends.end},
    )  # fmt: skip


def batchwise_std(log: TrainingLog, threshold: float) -> Finding | None:
    """The share of dead groups is taken over the batch, so that it hides them."""
    share = log.series(DEAD)
    if not _is_batchwise(share) or len(share) <= threshold:
        return None
    return Finding(
        f"{DEAD} is only ever 0 or 1: it is taken over the whole batch (scale_rewards='batch' or normalize_then_sum), "
        "so it can't show dead groups among live ones.", level="note",
    )  # fmt: skip


def small_std(log: TrainingLog, threshold: float) -> Finding | None:
    """The rewards' spread has shrunk to a small part of what it was."""
    spread = trend(log.series("reward_std"))
    if spread is None or spread.end > threshold * spread.start:
        return None
    return Finding(
        f"reward_std has gone from {spread.start:.3g} to {spread.end:.3g}. Within a prompt it is smaller still (this "
        "one is taken over the whole batch). Without std-scaling the gradient shrinks with it; with it, noise grows.",
        numbers={"start": spread.start, "end": spread.end},
    )  # fmt: skip


def ties_broken(log: TrainingLog, threshold: float) -> Finding | None:
    """Dead groups disappear from the log as soon as a KL term enters the rewards."""
    share, kl = log.series(DEAD), log.series("kl")
    if len(share) < LEAST_ROWS or kl.empty or log.trainer == "grpo":
        return None
    if not (float(share.iloc[0]) > threshold and float(share.iloc[1:].max()) == 0 and kl.abs().max() > 0):
        return None
    return Finding(
        f"{DEAD} is {share.iloc[0]:.2f} in the first row and exactly 0 after: in RLOO the KL term is part of the "
        "reward, and breaks ties as soon as the policy has moved. The prompts haven't come alive.",
        int(share.index[0]), {"first": float(share.iloc[0])},
    )  # fmt: skip


def cut_answers(log: TrainingLog, threshold: float) -> Finding | None:
    """Too many answers are cut at the length limit."""
    cut = trend(log.series("completions/clipped_ratio"))
    if cut is None or cut.end <= threshold:
        return None
    return Finding(
        f"{100 * cut.end:.0f} % of the answers reach the length limit at the end of the run (at its start "
        f"{100 * cut.start:.0f} %): their rewards are of unfinished texts.",
        numbers={"start": cut.start, "end": cut.end},
    )  # fmt: skip


def length_drift(log: TrainingLog, threshold: float) -> Finding | None:
    """Answers have become much longer or shorter."""
    length = trend(log.series("completions/mean_length"))
    if length is None or not (length.has_risen or length.has_fallen):
        return None
    factor = length.end / max(length.start, 1e-9)
    if 1 / threshold < factor < threshold:
        return None
    return Finding(
        f"Answers go from {length.start:.0f} to {length.end:.0f} tokens (factor {factor:.2f}). Is that what the reward "
        "asks for?",
        numbers={"start": length.start, "end": length.end},
    )  # fmt: skip


GROUP_RULES = (
    Rule(
        "dead_groups", "groups", 0.5, "share of answers in groups without spread, at the end",
        "at a half, every second answer that is paid for gives no gradient of the reward",
        dead_groups,
        f"which prompts, and whether more samples would bring them to life: {RFT}",
    ),
    Rule(
        "batchwise_std", "groups", 4.0, "logged rows above which the pattern isn't chance",
        "a share over groups of a real run takes other values than 0 and 1",
        batchwise_std,
        f"the spread prompt by prompt: {RFT}",
    ),
    Rule(
        "small_std", "groups", 0.1, "reward_std at the end over the start",
        "the expected reward gradient is at most the spread times a norm that moves slowly: a tenth is left",
        small_std,
        f"the spread and the gradient prompt by prompt: {RFT}",
    ),
    Rule(
        "ties_broken", "groups", 0.05, "share of dead groups in the first row",
        "while the policy is the reference, KL is 0 and ties show; a drop to exactly 0 isn't learning",
        ties_broken,
        f"the spread of the rewards themselves: {RFT}",
    ),
    Rule(
        "cut_answers", "groups", 0.5, "share of answers cut at the limit, at the end",
        "at a half the reward is mostly of unfinished texts",
        cut_answers,
        "what the reward says of finished texts: raise max_completion_length",
    ),
    Rule(
        "length_drift", "groups", 1.5, "factor between the lengths at the start and at the end",
        "half as long again is far beyond what one batch of prompts differs from another",
        length_drift,
        "whether length explains the reward: the columns of prompts.parquet of entangle rft",
    ),
)  # fmt: skip
"""The rules, in the order in which they are reported."""

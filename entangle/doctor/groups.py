"""Rules for runs that sample groups of answers to a prompt (GRPO, RLOO): no spread of rewards, no gradient."""

from __future__ import annotations

from typing import Literal

import pandas as pd

from entangle.doctor.log import TrainingLog
from entangle.doctor.rules import Finding, Rule
from entangle.doctor.trends import LEAST_ROWS, is_zero, since, trend

DEAD = "frac_reward_zero_std"
NOTICED = 1.2
"""Factor between lengths that is worth a note."""

Scope = Literal["groups", "batch", "unknown"]
"""What `reward_std` is taken over."""

RFT = "entangle rft --model_name_or_path MODEL --dataset_name PROMPTS"


def reward_std_is(log: TrainingLog) -> Scope:
    """What `reward_std` is taken over: TRL's mean of the stds within groups before 0.27, the whole batch since.

    Known from TRL's version, from names that only old versions wrote, or from rows in which the two would differ: with
    one reward function, `rewards/<function>/std` is of the batch in every version.
    """
    std, dead = log.series("reward_std"), log.series(DEAD)
    functions = function_stds(log)
    of_batch = log.series(functions[0]) if len(functions) == 1 else pd.Series(dtype=float)
    rows = pd.concat([std, of_batch, dead], axis=1, keys=["std", "batch", "dead"])
    if ((rows["std"] > 0) & (rows["dead"] == 1)).any():
        return "batch"  # groups without any spread, and yet a std
    if ((rows["std"] == 0) & (rows["batch"] > 1e-6)).any() or log.has_old_names:
        return "groups"
    if log.origin.trl is not None:
        return "batch" if log.origin.trl >= (0, 27) else "groups"
    return "unknown"


def function_stds(log: TrainingLog) -> list[str]:
    """Names of the single reward functions' stds, which are of the whole batch in every version."""
    return sorted(name for name in log.metrics if name.startswith("rewards/") and name.endswith("/std"))


def _is_batchwise(share: pd.Series) -> bool:
    """Whether the metric is taken over the whole batch: then it is 0 or 1 and says nothing about groups."""
    return len(share) >= LEAST_ROWS and set(share) == {0.0, 1.0}


def dead_groups(log: TrainingLog, threshold: float) -> Finding | None:
    """Too many groups whose rewards are all equal: they give no gradient of the reward."""
    share = log.series(DEAD)
    return _dead_share(log, threshold) if len(share) >= LEAST_ROWS else _dead_rows(log, threshold)


def _dead_share(log: TrainingLog, threshold: float) -> Finding | None:
    """By the share of such groups, as TRL logs it since June 2025."""
    share = log.series(DEAD)
    ends = trend(share)
    if ends is None or ends.end <= threshold:
        return None
    grown = ends.has_risen and ends.start <= threshold
    return Finding(
        f"{100 * ends.end:.0f} % of the answers are in groups without any spread of rewards at the end of the run"
        + (f", against {100 * ends.start:.0f} % at its start: prompts are being used up." if grown else ".")
        + f"{_no_gradient(log)}{_level(log)}",
        numbers={"start": ends.start, "end": ends.end},
    )


def _dead_rows(log: TrainingLog, threshold: float) -> Finding | None:
    """By rows whose reward_std is exactly 0: whatever it is taken over, every group of such a row is dead."""
    zero = log.series("reward_std") == 0
    if len(zero) < LEAST_ROWS:
        return None
    last = zero.iloc[-max(3, len(zero) // 5) :]
    share, end = float(zero.mean()), float(last.mean())
    if max(share, end) <= threshold:
        return None
    step = since(zero)
    text = (
        f"From step {step} on no group has any spread of rewards (reward_std is exactly 0): no gradient of the reward."
        if step is not None and end == 1
        else f"In {100 * share:.0f} % of the rows reward_std is exactly 0 ({100 * end:.0f} % at the end): in those no "
        "group has any spread of rewards, and there is no gradient of the reward."
    )
    return Finding(
        f"{text}{_level(log)} ({DEAD} wasn't logged: dead groups in other rows don't show.)",
        step,
        {"share": share, "end": end},
    )


def _no_gradient(log: TrainingLog) -> str:
    gradient, std = log.series("grad_norm"), log.series("reward_std")
    if is_zero(gradient) and is_zero(std):
        return " reward_std and grad_norm are exactly 0 in every row: nothing is learned."
    return ""


def _level(log: TrainingLog) -> str:
    """Whether dead groups are solved or out of reach, as far as the mean reward tells."""
    reward = trend(log.series("reward"))
    if reward is None:
        return ""
    at = f" The mean reward is {reward.end:.3g} (at the start {reward.start:.3g})"
    if reward.end == 0:
        return f"{at}: where no answer is ever rewarded, the prompts are out of reach."
    return f"{at}. Dead groups of high reward are solved; of low reward, out of reach."


def batchwise_std(log: TrainingLog, threshold: float) -> Finding | None:
    """The share of dead groups is taken over the batch, so that it hides them."""
    share = log.series(DEAD)
    if not _is_batchwise(share) or len(share) <= threshold:
        return None
    return Finding(
        f"{DEAD} is only ever 0 or 1: it is taken over the whole batch (scale_rewards='batch' or normalize_then_sum), "
        "so it can't show dead groups among live ones.",
        level="note",
    )


def small_std(log: TrainingLog, threshold: float) -> Finding | None:
    """The rewards' spread has shrunk to a small part of what it was."""
    spread = trend(log.series("reward_std"))
    if spread is None or spread.start == 0 or spread.end > threshold * spread.start:
        return None
    of = (
        " Within a prompt it is smaller still (this one is taken over the whole batch)."
        if reward_std_is(log) == "batch"
        else ""
    )
    return Finding(
        f"reward_std has gone from {spread.start:.3g} to {spread.end:.3g}.{of} Without std-scaling the "
        "gradient shrinks "
        "with it; with it, noise grows.",
        numbers={"start": spread.start, "end": spread.end},
    )


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
        int(share.index[0]),
        {"first": float(share.iloc[0])},
    )


def cut_answers(log: TrainingLog, threshold: float) -> Finding | None:
    """Too many answers are cut at the length limit."""
    cut = trend(log.series("completions/clipped_ratio"))
    if cut is None or cut.end <= threshold:
        return None
    return Finding(
        f"{100 * cut.end:.0f} % of the answers reach the length limit at the end of the run (at its start "
        f"{100 * cut.start:.0f} %): their rewards are of unfinished texts.",
        numbers={"start": cut.start, "end": cut.end},
    )


def length_drift(log: TrainingLog, threshold: float) -> Finding | None:
    """Answers have become much longer or shorter."""
    length = trend(log.series("completions/mean_length"))
    if length is None or not (length.has_risen or length.has_fallen):
        return None
    factor = length.end / max(length.start, 1e-9)
    if 1 / NOTICED < factor < NOTICED:
        return None
    return Finding(
        f"Answers go from {length.start:.0f} to {length.end:.0f} tokens (factor {factor:.2f}). Is that what the reward "
        "asks for?",
        numbers={"start": length.start, "end": length.end},
        level="note" if 1 / threshold < factor < threshold else "warning",
    )


GROUP_RULES = (
    Rule(
        "dead_groups",
        "groups",
        0.5,
        "share of answers in groups without spread, at the end",
        "at a half, every second answer that is paid for gives no gradient of the reward",
        dead_groups,
        f"which prompts, and whether more samples would bring them to life: {RFT}",
        needs=((DEAD, "reward_std"),),
        of_motion=False,
    ),
    Rule(
        "batchwise_std",
        "groups",
        4.0,
        "logged rows above which the pattern isn't chance",
        "a share over groups of a real run takes other values than 0 and 1",
        batchwise_std,
        f"the spread prompt by prompt: {RFT}",
        needs=(DEAD,),
        of_motion=False,
    ),
    Rule(
        "small_std",
        "groups",
        0.1,
        "reward_std at the end over the start",
        "the expected reward gradient is at most the spread times a norm that moves slowly: a tenth is left",
        small_std,
        f"the spread and the gradient prompt by prompt: {RFT}",
        needs=("reward_std",),
    ),
    Rule(
        "ties_broken",
        "groups",
        0.05,
        "share of dead groups in the first row",
        "while the policy is the reference, KL is 0 and ties show; a drop to exactly 0 isn't learning",
        ties_broken,
        f"the spread of the rewards themselves: {RFT}",
        needs=(DEAD, "kl"),
    ),
    Rule(
        "cut_answers",
        "groups",
        0.5,
        "share of answers cut at the limit, at the end",
        "at a half the reward is mostly of unfinished texts",
        cut_answers,
        "what the reward says of finished texts: raise max_completion_length",
        needs=("completions/clipped_ratio",),
        of_motion=False,
    ),
    Rule(
        "length_drift",
        "groups",
        2.0,
        "factor between the lengths at the start and at the end that warns",
        "a change by a fifth is worth a note; twice or half is another way of answering",
        length_drift,
        "whether length explains the reward: the columns of prompts.parquet of entangle rft",
        needs=("completions/mean_length",),
    ),
)
"""The rules, in the order in which they are reported."""

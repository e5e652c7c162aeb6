"""Rewards over the steps of a training, from its rollouts: what their spread within a prompt becomes.

And where prompts go between two looks at them: from out of reach to mixed to solved, or back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from entangle.analysis.statistics import Array, share

STATES = ("dead", "mixed", "solved")
"""Of a prompt: all answers tie at a low reward, rewards differ, all tie at a high one."""


def prompt_state(mean: float, std: float, threshold: float) -> str:
    """The state of a prompt's rewards.

    Args:
        mean: mean reward.
        std: of its answers' rewards; 0 where they tie.
        threshold: a mean from here on is high.
    """
    if std > 0:
        return "mixed"
    return "solved" if mean >= threshold else "dead"


def reward_history(rewards: Mapping[float, Mapping[str, Array]]) -> pd.DataFrame:
    """A row per step.

    Args:
        rewards: by step, and by what tells prompts apart, `(K,)`; prompts with fewer than two are left out.

    Returns:
        step, prompts, answers, reward_mean, reward_std (within a prompt: root of the mean unbiased variance), tied
        (share of prompts whose answers all tie, with tied_low and tied_high), and seen_before: share of the prompts
        that an earlier step had.
    """
    rows, seen = [], set()
    for step, by_prompt in rewards.items():
        used = {prompt: values for prompt, values in by_prompt.items() if len(values) > 1}
        if not used:
            continue
        tied = share(sum(len(np.unique(values)) == 1 for values in used.values()), len(used))
        rows.append(
            {
                "step": step,
                "prompts": len(used),
                "answers": sum(map(len, used.values())),
                "reward_mean": float(np.mean([values.mean() for values in used.values()])),
                "reward_std": math.sqrt(np.mean([values.var(ddof=1) for values in used.values()])),
                "tied": tied["share"],
                "tied_low": tied["low"],
                "tied_high": tied["high"],
                "seen_before": len(seen & set(used)) / len(used),
            }
        )
        seen |= set(used)
    return pd.DataFrame(rows)


def transitions(before: Sequence[str], after: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """By state before and state after: how many prompts went that way, and their share of those in the first state.

    Args:
        before: state of each prompt (see `STATES`).
        after: its state later.
    """
    pairs = list(zip(before, after, strict=True))
    return {
        first: {second: share(pairs.count((first, second)), list(before).count(first)) for second in STATES}
        for first in STATES
    }

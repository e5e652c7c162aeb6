"""How many answers per prompt: what a group of each size would be worth, from the answers at hand.

A group is live if its rewards differ. From K answers of a prompt the chance of that is known without bias for every
group size up to K, since a group is a random subset; so are expected gradients up to K / 2. Sampling until a batch is
full of live groups, as DAPO does (arXiv 2503.14476), costs 1 / (mean chance) groups for each that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from entangle.analysis.statistics import Array, bootstrap_mean, mean_and_error
from entangle.rewards.gradients import group_gradient_sq
from entangle.rewards.statistics import dead_group_probability

SIZES = (2, 4, 8, 16, 32, 64)
"""Group sizes that are looked at, as far as there are answers."""

SPLITS = 50
"""Random splits of a prompt's answers into two groups, from which its expected gradient is taken."""


def group_sizes(grams: Sequence[Array], rewards: Sequence[Array]) -> list[dict[str, Any]]:
    """A row per group size up to the fewest answers that a prompt has.

    Args:
        grams: `(K, K)` of each prompt.
        rewards: `(K,)` of each prompt.

    Returns:
        size; `live`, the expected share of live groups with `live_low`, `live_high` (bootstrap over prompts);
        `rollouts` = size / live, drawn per live group, which is what dynamic sampling pays, and `groups` = 1 / live,
        with their ends; `grad_norm`: root of the mean over prompts of |E[GRPO's gradient of such a group]|^2, with its
        error, NaN where that mean isn't above 0 or answers are fewer than two groups.
    """
    fewest = min(map(len, rewards), default=0)
    return [_row(size, grams, rewards) for size in SIZES if size <= fewest]


def _row(size: int, grams: Sequence[Array], rewards: Sequence[Array]) -> dict[str, Any]:
    live = 1 - np.array([dead_group_probability(own, size) for own in rewards])
    low, high = bootstrap_mean(live)
    mean = float(live.mean())
    squares = [
        group_gradient_sq(gram, own, size, splits=SPLITS) for gram, own in zip(grams, rewards, strict=True)
    ]
    square, error = mean_and_error(np.array(squares))
    norm = math.sqrt(square) if square > 0 else math.nan
    return {
        "size": size,
        "live": mean,
        "live_low": low,
        "live_high": high,
        "groups": _over(mean),
        "groups_low": _over(high),
        "groups_high": _over(low),
        "rollouts": size * _over(mean),
        "rollouts_low": size * _over(high),
        "rollouts_high": size * _over(low),
        "grad_norm": norm,
        "grad_norm_error": error / (2 * norm),
    }


def _over(share: float) -> float:
    return 1 / share if share > 0 else math.inf

"""The RFT signal of a prompt, from its answers' rewards and scores.

Pure functions of the rows that `entangle rft` keeps: rewards, log-probs and the Gram matrix of K answers per
prompt. `entangle.rewards.summary` aggregates them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from entangle.analysis.statistics import Array
from entangle.rewards.bounds import fisher_bound, length_bound, paper_bound, trace_bound
from entangle.rewards.gradients import (
    GradientEstimate,
    centred_weights,
    expected_gradient,
    group_gradient_sq,
    grpo_weights,
    largest_eigenvalue,
    rloo_weights,
    trace_second_moment,
    weighted_norm,
)
from entangle.rewards.statistics import RewardStatistics, Support, dead_group_probability


@dataclass(frozen=True)
class Setting:
    """What the numbers of a run depend on beside the answers.

    Args:
        support: what is known of the rewards.
        group_size: answers per group in the GRPO and RLOO views.
        max_length: L, the longest answer in tokens.
        gamma: estimate of the largest Jacobian norm; NaN without one, and then bounds that need it are NaN.
    """

    support: Support = Support()
    group_size: int = 8
    max_length: int = 1
    gamma: float = math.nan


def gram_of(row: Mapping[str, Any]) -> Array:
    """The `(K, K)` Gram matrix that a row holds flattened."""
    flat = np.asarray(row["gram"], dtype=np.float64)
    size = math.isqrt(len(flat))
    return flat.reshape(size, size)


def measure(row: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """All numbers of one prompt.

    Args:
        row: `rewards`, `logps`, `ref_logps` (NaN without a reference), `lengths`, `finished`: `(K,)` each;
            `gram`.
        setting: support, group size and what the bounds need.

    Returns:
        Columns of prompts.parquet: the fields of `RewardStatistics` as reward_*, gradient norms and bounds in
        reward per unit of parameter, GRPO's and RLOO's view, KL's gradient.
    """
    rewards, gram = np.asarray(row["rewards"], dtype=np.float64), gram_of(row)
    statistics = RewardStatistics.from_rewards(rewards, setting.support)
    lengths = np.asarray(row["lengths"], dtype=np.float64)
    own = {f"reward_{name}": value for name, value in asdict(statistics).items() if name != "count"}
    return (
        own
        | {
            "signal": statistics.std / setting.support.half_range if setting.support.is_known else math.nan,
            "length_mean": float(lengths.mean()),
            "finished_share": float(np.mean(row["finished"])),
        }
        | _gradient_columns(gram, rewards, statistics, setting)
        | _group_columns(gram, rewards, setting.group_size)
        | _kl_columns(gram, rewards, row)
    )


def _gradient_columns(
    gram: Array, rewards: Array, statistics: RewardStatistics, setting: Setting
) -> dict[str, Any]:
    trace, eigenvalue = trace_second_moment(gram), largest_eigenvalue(gram)
    std, half_range = statistics.std, setting.support.half_range
    return _estimate("grad", expected_gradient(gram, rewards)) | {
        "score_trace": trace,
        "score_eigenvalue": eigenvalue,
        "bound_fisher": fisher_bound(std, eigenvalue),
        "bound_trace": trace_bound(std, trace),
        "bound_trace_high": trace_bound(statistics.std_high, trace),
        "bound_length": length_bound(std, setting.max_length, setting.gamma),
        "bound_paper": paper_bound(std, setting.max_length, setting.gamma, half_range),
    }


def _estimate(name: str, estimate: GradientEstimate) -> dict[str, float]:
    return {
        f"{name}_sq": estimate.sq,
        f"{name}_sq_error": estimate.error,
        f"{name}_norm": estimate.norm,
        f"{name}_norm_error": estimate.norm_error,
    }


def _group_columns(gram: Array, rewards: Array, size: int) -> dict[str, float]:
    """Views of GRPO and RLOO: expected gradients for groups of `size`, one group's own with its noise."""
    grpo, centred = (group_gradient_sq(gram, rewards, size, w) for w in (grpo_weights, centred_weights))
    single = len(rewards) < 2
    return {
        "rloo_sample_norm": math.nan if single else weighted_norm(gram, rloo_weights(rewards)),
        "grpo_sample_norm": math.nan if single else weighted_norm(gram, grpo_weights(rewards)),
        "grpo_grad_sq": grpo,
        "centred_grad_sq": centred,
        "dead_probability": dead_group_probability(rewards, size),
    }


def _kl_columns(gram: Array, rewards: Array, row: Mapping[str, Any]) -> dict[str, float]:
    """KL(pi || pi_ref) and its gradient Cov(log pi - log pi_ref, S), apart from the reward's."""
    ratios = np.asarray(row["logps"], dtype=np.float64) - np.asarray(row["ref_logps"], dtype=np.float64)
    names = (
        "kl",
        "kl_grad_sq",
        "kl_grad_sq_error",
        "kl_grad_norm",
        "kl_grad_norm_error",
        "kl_reward_product",
    )
    if not np.isfinite(ratios).all():
        return dict.fromkeys(names, math.nan)
    both = expected_gradient(gram, rewards, ratios)
    return {"kl": float(ratios.mean()), "kl_reward_product": both.sq} | _estimate(
        "kl_grad", expected_gradient(gram, ratios)
    )


def unmeasured() -> dict[str, float]:
    """The numbers of a prompt that has none."""
    row = dict(rewards=[0.0, 1.0], logps=[0.0] * 2, ref_logps=[0.0] * 2, lengths=[1] * 2, finished=[True] * 2)
    return dict.fromkeys(measure(row | {"gram": [0.0] * 4}, Setting()), math.nan)

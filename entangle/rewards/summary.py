"""A run over many prompts: prevalence of a small spread, distributions, bounds, and TRL's own metrics.

Pure functions of the rows of `entangle.rewards.signals.measure`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from entangle.analysis.statistics import (
    Array,
    bootstrap_mean,
    mean_and_error,
    quantiles,
    rank_correlation,
    share,
)
from entangle.rewards.statistics import Support, prevalence_low, trl_metrics

TRL_SENTENCE = (
    "TRL's reward_std is the std of all rewards of a batch, so it holds the differences between prompts and can be "
    "large while no prompt has any spread; the std here is within a prompt. TRL's frac_reward_zero_std counts groups "
    "whose answers tie exactly: it depends on the group size, counts prompts whose answers would differ if more were "
    "drawn, and doesn't see a small std that isn't 0."
)


@dataclass(frozen=True)
class Thresholds:
    """What counts as small.

    Args:
        std: a std below it is small.
        mean: a mean reward below it is low.
    """

    std: float
    mean: float

    @classmethod
    def choose(
        cls, prompts: pd.DataFrame, support: Support, std_share: float, mean: float | None
    ) -> Thresholds:
        """From the options: the std as a share of the half-range, the mean by default the middle of the range.

        Without a known range, the std of all prompts' means and variances together takes the half-range's
        place, and the median of the means the middle's.

        Args:
            prompts: measured rows of prompts.parquet.
            support: what is known of the rewards.
            std_share: a std below this share of the half-range is small.
            mean: a mean reward below it is low; None: see above.
        """
        if support.is_known:
            return cls(
                std_share * support.half_range, support.low + support.half_range if mean is None else mean
            )
        total = math.sqrt(max(prompts["reward_variance"].mean() + prompts["reward_mean"].var(ddof=0), 0.0))
        return cls(std_share * total, float(prompts["reward_mean"].median()) if mean is None else mean)


def summarise(
    prompts: pd.DataFrame, rewards: Array, support: Support, thresholds: Thresholds
) -> dict[str, Any]:
    """Aggregates of a run: prevalence, distributions, bounds, TRL's own metrics.

    Args:
        prompts: measured rows of prompts.parquet.
        rewards: `(N, K)` rewards of the same prompts; `(0, 0)` where K differs between prompts.
        support: what is known of the rewards.
        thresholds: what counts as small.
    """
    if prompts.empty:
        return {}
    summary: dict[str, Any] = {
        "thresholds": asdict(thresholds),
        "prevalence": prevalence(prompts, thresholds),
        "within_prompt_std": math.sqrt(float(prompts["reward_variance"].mean())),
        "tied": share(int((prompts["reward_distinct"] == 1).sum()), len(prompts)),
        "dead_probability": float(prompts["dead_probability"].mean()),
        "quantiles": {
            name: quantiles(prompts[name])
            for name in ("reward_mean", "reward_std", "grad_norm", "bound_trace", "kl")
        },
        "gradient": gradient_summary(prompts),
        "kl_gradient": kl_summary(prompts),
        "histogram": joint_histogram(prompts),
    }
    if rewards.size:
        summary["trl"] = trl_metrics(rewards) | {"explanation": TRL_SENTENCE}
        if support.is_binary and 0 < thresholds.std / (2 * support.half_range) <= 0.5:
            tau = thresholds.std / (2 * support.half_range)
            summary["true_prevalence_low"] = prevalence_low(summary["tied"]["share"], rewards.shape[1], tau)
    return summary


def prevalence(prompts: pd.DataFrame, thresholds: Thresholds) -> dict[str, dict[str, float]]:
    """Shares of prompts with a small empirical std, split by mean reward, with Wilson and bootstrap intervals.

    The harmful kind is `small_low`: little spread and a low mean, where RFT would have most to gain.
    `small_high` are prompts that are solved.

    Args:
        prompts: measured rows of prompts.parquet.
        thresholds: what counts as small.
    """
    small = (prompts["reward_std"] < thresholds.std).to_numpy()
    low = (prompts["reward_mean"] < thresholds.mean).to_numpy()
    result = {}
    for name, flags in {"small": small, "small_low": small & low, "small_high": small & ~low}.items():
        ends = bootstrap_mean(flags)
        result[name] = share(int(flags.sum()), len(flags)) | {
            "bootstrap_low": ends[0],
            "bootstrap_high": ends[1],
        }
    return result


def gradient_summary(prompts: pd.DataFrame) -> dict[str, Any]:
    """How the gradient follows the std, how tight the bounds are, and in how many prompts it stands out of noise.

    Over prompts squares are averaged, since they are unbiased and their roots aren't: `rms_norm` is
    sqrt(mean ||grad V||^2), with the error of the mean over prompts, and `share_of_bound` divides it by the
    root mean square of the bound. `signal_in_one_group` is mean ||grad V||^2 / mean |RLOO estimate|^2: the
    part of one group's squared gradient that isn't noise. All are NaN where the mean square isn't above 0.
    """
    usable = prompts[prompts["grad_sq"].notna()]
    certain = usable["grad_sq"] > 2 * usable["grad_sq_error"]
    mean_sq, error = mean_and_error(usable["grad_sq"])
    rms = math.sqrt(mean_sq) if mean_sq > 0 else math.nan
    bounds = ("bound_fisher", "bound_trace", "bound_length", "bound_paper")
    return {
        "above_two_errors": share(int(certain.sum()), len(usable)),
        "rms_norm": rms,
        "rms_norm_error": error / (2 * rms),
        "mean_sq": mean_sq,
        "mean_sq_error": error,
        "std_rank_correlation": rank_correlation(usable["reward_std"], usable["grad_norm"]),
        "share_of_bound": {
            name: rms / math.sqrt(float((usable[name] ** 2).mean()) or math.nan) for name in bounds
        },
        "signal_in_one_group": mean_sq / (float((usable["rloo_sample_norm"] ** 2).mean()) or math.nan),
    }


def kl_summary(prompts: pd.DataFrame) -> dict[str, float]:
    """Means over prompts, with errors, of ||grad KL||^2 and of <grad V, grad KL>, both unbiased per prompt.

    A positive product: following the reward leads away from the reference, at first order. NaN without a
    reference.
    """
    summary = {}
    for name, column in {"mean_sq": "kl_grad_sq", "reward_product": "kl_reward_product"}.items():
        summary[name], summary[f"{name}_error"] = mean_and_error(prompts[column])
    return summary


def joint_histogram(prompts: pd.DataFrame, bins: int = 8) -> dict[str, Any]:
    """Counts of prompts by mean reward (rows) and std (columns), with the edges of the bins.

    Args:
        prompts: measured rows of prompts.parquet.
        bins: of each of the two.
    """
    counts, means, stds = np.histogram2d(prompts["reward_mean"], prompts["reward_std"], bins=bins)
    return {"mean_edges": means.tolist(), "std_edges": stds.tolist(), "counts": counts.astype(int).tolist()}

"""The RFT signal of a prompt, from its answers' rewards and scores, and its aggregates over prompts.

Pure functions of the rows that `entangle rft` keeps: rewards, log-probs and the Gram matrix of K answers per
prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from entangle.analysis.summary import QUANTILES, share
from entangle.rewards.statistics import (
    LEVEL,
    Array,
    GradientEstimate,
    RewardStatistics,
    Support,
    bootstrap_share,
    centred_weights,
    dead_group_probability,
    expected_gradient,
    fisher_bound,
    group_gradient_sq,
    grpo_weights,
    largest_eigenvalue,
    length_bound,
    paper_bound,
    prevalence_low,
    rloo_weights,
    trace_bound,
    trace_second_moment,
    trl_metrics,
    weighted_norm,
)

TRL_SENTENCE = (
    "TRL's reward_std is the std of all rewards of a batch, so it holds the differences between prompts and can be "
    "large while no prompt has any spread; the std here is within a prompt. TRL's frac_reward_zero_std counts groups "
    "whose answers tie exactly: it depends on the group size, counts prompts whose answers would differ if more were "
    "drawn, and doesn't see a small std that isn't 0."
)


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


# --- over the data set --------------------------------------------------------------------------------------


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
            name: dict(
                zip(
                    map("{:g}".format, QUANTILES),
                    prompts[name].quantile(list(QUANTILES)).tolist(),
                    strict=True,
                )
            )
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

    The harmful cell is `small_low`: little spread and a low mean, where RFT would have most to gain.
    `small_high` are prompts that are solved.
    """
    small = (prompts["reward_std"] < thresholds.std).to_numpy()
    low = (prompts["reward_mean"] < thresholds.mean).to_numpy()
    cells = {"small": small, "small_low": small & low, "small_high": small & ~low}
    result = {}
    for name, flags in cells.items():
        bootstrap = bootstrap_share(flags)
        result[name] = share(int(flags.sum()), len(flags)) | {
            "bootstrap_low": bootstrap[0],
            "bootstrap_high": bootstrap[1],
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
    squares = usable["grad_sq"].to_numpy()
    mean_sq = float(squares.mean()) if len(squares) else math.nan
    error = float(squares.std(ddof=1)) / math.sqrt(len(squares)) if len(squares) > 1 else math.nan
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
        values = prompts[column].dropna().to_numpy()
        summary[name] = float(values.mean()) if len(values) else math.nan
        summary[f"{name}_error"] = (
            float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        )
    return summary


def rank_correlation(first: pd.Series, second: pd.Series) -> dict[str, float]:
    """Spearman's rho with an interval at `LEVEL` by Fisher's z, error sqrt((1 + rho^2/2) / (n-3)) (Bonett, Wright)."""
    both = pd.DataFrame({"first": first, "second": second}).dropna()
    if len(both) < 5 or both["first"].nunique() < 2 or both["second"].nunique() < 2:
        return {"rho": math.nan, "low": math.nan, "high": math.nan}
    rho = float(stats.spearmanr(both["first"], both["second"])[0])  # pyright: ignore[reportArgumentType]
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt((1 + rho**2 / 2) / (len(both) - 3))
    z = math.atanh(min(max(rho, -1 + 1e-12), 1 - 1e-12))
    return {"rho": rho, "low": math.tanh(z - half), "high": math.tanh(z + half)}


def joint_histogram(prompts: pd.DataFrame, bins: int = 8) -> dict[str, Any]:
    """Counts of prompts by mean reward (rows) and std (columns), with the edges of the bins."""
    counts, means, stds = np.histogram2d(prompts["reward_mean"], prompts["reward_std"], bins=bins)
    return {"mean_edges": means.tolist(), "std_edges": stds.tolist(), "counts": counts.astype(int).tolist()}

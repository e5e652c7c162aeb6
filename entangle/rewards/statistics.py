"""Rewards of K sampled answers: how much they vary, how surely, and what that makes of their gradient.

Notation: one prompt x; answers y_1..y_K drawn independently from pi(.|x), with rewards r_i and scores
S_i = grad log pi(y_i|x). V = E[r]; STD = standard deviation of r under pi; F = E[S S^T]; Gram matrix
G_ij = <S_i, S_j>. The gradient that reinforcement fine-tuning follows is grad V = E[r S] = Cov(r, S), so it
vanishes with STD (arXiv 2310.20703): answers that tie give nothing to learn from, whatever the mean reward.

Everything here is a pure function of numbers. [derived] marks what is derived in this project and tested by
enumeration; the paper's own bound is named as the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from entangle.analysis.statistics import LEVEL, Array, exact_share, mean_and_error, std_interval

# --- one prompt's rewards -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Support:
    """What is known of the rewards before any is seen; intervals that need it are NaN without it.

    Args:
        low: smallest possible reward; NaN: unknown.
        high: largest possible reward; NaN: unknown.
        is_binary: whether `low` and `high` are the only rewards.

    Raises:
        ValueError: high isn't above low.
    """

    low: float = math.nan
    high: float = math.nan
    is_binary: bool = False

    def __post_init__(self) -> None:
        if self.high <= self.low or (self.is_binary and not self.is_known):
            raise ValueError(
                f"Support needs low < high (both, for binary rewards); got {self.low}, {self.high}."
            )

    @property
    def is_known(self) -> bool:
        """Whether both ends are known."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def half_range(self) -> float:
        """R = (high - low) / 2: no STD is larger."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class RewardStatistics:
    """What K rewards of one prompt say about the rewards under the policy.

    Args:
        count: K.
        mean: unbiased for V.
        variance: s^2 with K - 1, unbiased for STD^2; average this over prompts, not s. NaN for K = 1.
        std: s = sqrt(variance), as a std biased low.
        std_low: lower end of the interval for STD, see `reward_std_interval`.
        std_high: its upper end.
        std_high_bounded: largest STD at `LEVEL` from s and the range of the rewards alone; NaN without a
            range.
        hidden_std: largest STD that answers which all tie still allow at `LEVEL`; NaN where they don't all
            tie.
        skew: third standardised moment, bias-adjusted (G1); positive when few answers are good, negative when
            few are bad. NaN for ties or K < 3.
        above: share of the answers above the mean: few informative answers if it is far from 1/2. 0 for ties.
        distinct: number of different rewards.
    """

    count: int
    mean: float
    variance: float
    std: float
    std_low: float
    std_high: float
    std_high_bounded: float
    hidden_std: float
    skew: float
    above: float
    distinct: int

    @classmethod
    def from_rewards(cls, rewards: Array, support: Support | None = None) -> RewardStatistics:
        """Statistics of one prompt's rewards `(K,)`.

        Laws: adding a constant to the rewards and to the support changes the mean alone; scaling both by
        k > 0 scales mean and stds by k.

        Args:
            rewards: `(K,)`, of one prompt.
            support: what is known of them; None: nothing.

        Raises:
            ValueError: there is no reward, or one isn't finite.

        Examples:
            >>> RewardStatistics.from_rewards(np.array([0.0, 0.0, 1.0, 1.0])).variance
            0.3333333333333333
        """
        rewards, support = checked(rewards), support or Support()
        count, mean, is_tied = len(rewards), float(rewards.mean()), bool((rewards == rewards[0]).all())
        variance = math.nan if count < 2 else 0.0 if is_tied else float(rewards.var(ddof=1))
        low, high = reward_std_interval(rewards, support)
        std = math.sqrt(variance)
        return cls(
            count=count,
            mean=float(rewards[0]) if is_tied else mean,
            variance=variance,
            std=std,
            std_low=low,
            std_high=high,
            std_high_bounded=bounded_std_high(std, count, support),
            hidden_std=largest_hidden_std(count, float(rewards[0]), support) if is_tied else math.nan,
            skew=math.nan if is_tied or count < 3 else float(stats.skew(rewards, bias=False)),
            above=0.0 if is_tied else float((rewards > mean).mean()),
            distinct=len(np.unique(rewards)),
        )


def checked(rewards: Array) -> Array:
    """`(K,)` finite float64 rewards.

    Raises:
        ValueError: the shape is another, there is none, or one isn't finite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 1 or not len(rewards) or not np.isfinite(rewards).all():
        raise ValueError(
            f"Expected finite rewards of shape (K,), K >= 1; got shape {rewards.shape}: {rewards}."
        )
    return rewards


def reward_std_interval(rewards: Array, support: Support) -> tuple[float, float]:
    """A two-sided interval for STD at `LEVEL`.

    - binary rewards: the exact (Clopper-Pearson) interval of P = pi(high), carried through
      STD = (high - low) sqrt(P(1-P)); it holds for every K;
    - rewards that all tie: from 0 to `largest_hidden_std`;
    - otherwise: `entangle.analysis.statistics.std_interval`, which doesn't take rewards for normal (its coverage for
      skewed and zero-inflated ones stands there), cut at the half-range; for fewer than 4 answers, of which it says
      nothing, from 0 to `bounded_std_high`.

    Args:
        rewards: `(K,)`.
        support: what is known of them; ends that need it are NaN without it.

    Examples:
        >>> low, high = reward_std_interval(np.array([0.0, 0.0, 0.0, 1.0]), Support(0.0, 1.0, is_binary=True))
        >>> round(low, 2), high  # P from 0.006 to 0.81
        (0.08, 0.5)
    """
    count = len(rewards)
    if support.is_binary:
        return _binary_std_interval(int((rewards == support.high).sum()), count, 2 * support.half_range)
    if (rewards == rewards[0]).all():
        return 0.0, largest_hidden_std(count, float(rewards[0]), support)
    if count < 4:
        return 0.0, bounded_std_high(float(rewards.std(ddof=1)), count, support)
    low, high = std_interval(rewards)
    return low, min(high, support.half_range) if support.is_known else high


def _binary_std_interval(successes: int, count: int, span: float) -> tuple[float, float]:
    low, high = exact_share(successes, count)
    ends = [span * math.sqrt(p * (1 - p)) for p in (low, high)]
    return min(ends), span / 2 if low <= 0.5 <= high else max(ends)


def bounded_std_high(std: float, count: int, support: Support) -> float:
    """Largest STD at `LEVEL` that s allows for rewards of a known range, whatever their distribution.

    STD <= s + (high - low) sqrt(2 ln(1/delta) / (K-1)), cut at the half-range, delta = 1 - LEVEL, one-sided.
    Wide: it says something beyond the half-range only from K of about 30 on. Source: Maurer and Pontil,
    "Empirical Bernstein bounds" (2009); the constant is from memory, not read there.

    Args:
        std: s, with K - 1.
        count: K.
        support: the range; without one nothing can be said.
    """
    if not support.is_known or count < 2:
        return math.nan
    slack = math.sqrt(2 * math.log(1 / (1 - LEVEL)) / (count - 1))
    return min(std + 2 * support.half_range * slack, support.half_range)


def largest_hidden_std(count: int, value: float, support: Support) -> float:
    """Largest STD that is compatible, at `LEVEL`, with `count` answers that all got the reward `value`.

    All-equal samples are weak evidence. If another reward has probability P, K equal ones come with
    probability (1-P)^K, so P <= 1 - (1-LEVEL)^(1/K). The largest variance is had with that P at the ends of
    the range, all of it at the farther end (P(1-P) distance^2), or, for a value near the middle, at both
    [derived]. NaN without a known range.

    Args:
        count: K, answers that tie.
        value: their reward.
        support: the range; without one nothing can be said.

    Examples:
        >>> round(largest_hidden_std(10, 0.0, Support(0.0, 1.0)), 3)
        0.438
    """
    if not support.is_known:
        return math.nan
    other = 1 - (1 - LEVEL) ** (1 / count)
    a, b = value - support.low, support.high - value
    if support.is_binary:
        return (a + b) * math.sqrt(min(other, 0.5) * (1 - min(other, 0.5)))
    # a share q of P at the upper end maximises P [q b^2 + (1-q) a^2] - P^2 [q b - (1-q) a]^2, concave in q
    q = min(max((a + (b - a) / (2 * other)) / (a + b), 0.0), 1.0)
    variance = other * (q * b**2 + (1 - q) * a**2) - (other * (q * b - (1 - q) * a)) ** 2
    return math.sqrt(variance)


def samples_to_certify(tau: float, level: float = LEVEL) -> int:
    """Answers that must all tie before STD <= tau is certified, for rewards in {0, 1}.

    K >= ln(1-level) / ln(1-p), p = (1 - sqrt(1 - 4 tau^2)) / 2, the P at which STD = tau.

    Args:
        tau: the std, in (0, 0.5].
        level: confidence.

    Examples:
        >>> [samples_to_certify(tau) for tau in (0.2, 0.1, 0.05)]
        [71, 296, 1194]
    """
    return math.ceil(math.log(1 - level) / math.log1p(-_rare(tau)))


def _rare(tau: float) -> float:
    if not 0 < tau <= 0.5:
        raise ValueError(f"The std of rewards in {{0, 1}} lies in (0, 0.5]; got tau = {tau}.")
    return (1 - math.sqrt(1 - 4 * tau**2)) / 2


# --- over the data set --------------------------------------------------------------------------------------


def prevalence_low(tied_share: float, count: int, tau: float) -> float:
    """Lower bound on the share of prompts with true STD <= tau, for rewards in {0, 1} [derived].

    A prompt with STD > tau ties with probability at most q = p^K + (1-p)^K (p as in `samples_to_certify`), so
    pi0 >= (f0 - q) / (1 - q), f0 = expected share of prompts whose K answers all tie.

    Args:
        tied_share: f0.
        count: K, answers per prompt.
        tau: the std, in (0, 0.5].
    """
    p = _rare(tau)
    q = p**count + (1 - p) ** count
    return max(0.0, (tied_share - q) / (1 - q)) if q < 1 else 0.0


def cut_answers(finished: Sequence[Sequence[bool]], rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """How many answers were cut before they ended, and what their rewards have to do with it.

    Args:
        finished: by prompt, whether each answer ended by itself.
        rewards: their rewards.

    Returns:
        count and share of the cut answers; `reward_gap`: mean reward of the cut minus that of the finished ones
        of the same prompt, averaged over the prompts that have both, with its standard error.
    """
    ended = [np.asarray(entry, dtype=bool) for entry in finished]
    values = [np.asarray(entry, dtype=np.float64) for entry in rewards]
    cut, total = sum(int((~e).sum()) for e in ended), sum(map(len, ended))
    gaps = np.array(
        [v[~e].mean() - v[e].mean() for e, v in zip(ended, values, strict=True) if 0 < e.sum() < len(e)]
    )
    gap, error = mean_and_error(gaps)
    return {"count": cut, "share": cut / total, "reward_gap": gap, "reward_gap_error": error}


def trl_metrics(rewards: Array, scale_rewards: str = "group") -> dict[str, float]:
    """TRL 1.16's `reward_std` and `frac_reward_zero_std` for groups `(N, K)` as one batch.

    reward_std is the std (ddof 1) of **all** N K rewards, so it stays large when every group ties but groups
    differ. frac_reward_zero_std is the share of completions whose group has a std within 1e-8 of 0; with
    scale_rewards="batch" the std is the batch's, so the share is 0 or 1.

    Args:
        rewards: `(N, K)`, a group per row.
        scale_rewards: group or batch, as the option of GRPOConfig.
    """
    batch_std = float(rewards.std(ddof=1))
    stds = np.array([batch_std]) if scale_rewards == "batch" else rewards.std(axis=1, ddof=1)
    return {
        "reward_std": batch_std,
        "frac_reward_zero_std": float(np.isclose(stds, 0.0, rtol=0.0, atol=1e-8).mean()),
    }


def dead_group_probability(rewards: Array, group_size: int) -> float:
    """Probability that a group of `group_size` answers ties, estimated without bias from at least as many.

    The share of the subsets of that size that tie: sum over rewards v of C(n_v, k) / C(K, k). For binary
    rewards it estimates P^k + (1-P)^k. NaN where there are fewer answers than that.

    Args:
        rewards: `(K,)`, of one prompt.
        group_size: k, answers per group.

    Examples:
        >>> dead_group_probability(np.array([0.0, 0.0, 1.0]), 2)
        0.3333333333333333
    """
    rewards = checked(rewards)
    if group_size > len(rewards):
        return math.nan
    counts = np.unique(rewards, return_counts=True)[1]
    return sum(math.comb(int(n), group_size) for n in counts) / math.comb(len(rewards), group_size)

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

LEVEL = 0.95
"""Confidence of every interval."""

TRL_EPSILON = 1e-4
"""What TRL's GRPO adds to a group's standard deviation before it divides by it."""


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
        std: s = sqrt(variance), as a std biased low (for normal rewards E[s] = c4(K) STD).
        std_low: lower end of the interval for STD, see `std_interval`.
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

        Laws: adding a constant to the rewards and to the support changes the mean alone; scaling both by k >
            0
        scales mean and stds by k.

        Raises:
            ValueError: there is no reward, or one isn't finite.

        Examples:
            >>> RewardStatistics.from_rewards(np.array([0.0, 0.0, 1.0, 1.0])).variance
            0.3333333333333333
        """
        rewards, support = checked(rewards), support or Support()
        count, mean, is_tied = len(rewards), float(rewards.mean()), bool((rewards == rewards[0]).all())
        variance = math.nan if count < 2 else 0.0 if is_tied else float(rewards.var(ddof=1))
        low, high = std_interval(rewards, support)
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


def c4(count: int) -> float:
    """E[s] / STD for `count` normal rewards: sqrt(2 / (K-1)) Gamma(K/2) / Gamma((K-1)/2).

    Examples:
        >>> round(c4(10), 6)
        0.972659
    """
    return math.sqrt(2 / (count - 1)) * math.exp(math.lgamma(count / 2) - math.lgamma((count - 1) / 2))


def std_interval(rewards: Array, support: Support) -> tuple[float, float]:
    """A two-sided small-sample interval for STD at `LEVEL`.

    - binary rewards: the exact (Clopper-Pearson) interval of P = pi(high), carried through
      STD = (high - low) sqrt(P(1-P)); coverage is at least `LEVEL`;
    - rewards that all tie: from 0 to `largest_hidden_std`;
    - otherwise: sqrt((K-1) s^2 / chi2 quantiles). It assumes **normal** rewards, and is cut at the
      half-range.
    """
    count = len(rewards)
    if support.is_binary:
        return _binary_std_interval(int((rewards == support.high).sum()), count, 2 * support.half_range)
    if (rewards == rewards[0]).all():
        return 0.0, largest_hidden_std(count, float(rewards[0]), support)
    spread = float(((rewards - rewards.mean()) ** 2).sum())
    tails = ((1 + LEVEL) / 2, (1 - LEVEL) / 2)
    low, high = (math.sqrt(spread / float(stats.chi2.ppf(tail, count - 1))) for tail in tails)
    return low, min(high, support.half_range) if support.is_known else high


def _binary_std_interval(successes: int, count: int, span: float) -> tuple[float, float]:
    interval = stats.binomtest(successes, count).proportion_ci(LEVEL, method="exact")
    low, high = float(interval.low), float(interval.high)
    ends = [span * math.sqrt(p * (1 - p)) for p in (low, high)]
    return min(ends), span / 2 if low <= 0.5 <= high else max(ends)


def bounded_std_high(std: float, count: int, support: Support) -> float:
    """Largest STD at `LEVEL` that s allows for rewards of a known range, whatever their distribution.

    STD <= s + (high - low) sqrt(2 ln(1/delta) / (K-1)), cut at the half-range, delta = 1 - LEVEL, one-sided.
    Wide: it says something beyond the half-range only from K of about 30 on. Source: Maurer and Pontil,
    "Empirical Bernstein bounds" (2009); the constant is from memory, not read there.
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
    """
    p = _rare(tau)
    q = p**count + (1 - p) ** count
    return max(0.0, (tied_share - q) / (1 - q)) if q < 1 else 0.0


def bootstrap_share(flags: NDArray[np.bool_], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of a share at `LEVEL`, drawing prompts with replacement."""
    if not len(flags):
        return math.nan, math.nan
    draw = np.random.default_rng(seed)
    shares = draw.binomial(len(flags), float(np.mean(flags)), size=draws) / len(flags)
    low, high = np.quantile(shares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap_mean(values: Array, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of a mean at `LEVEL`, drawing prompts with replacement."""
    if not len(values):
        return math.nan, math.nan
    draw = np.random.default_rng(seed)
    means = values[draw.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


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
    error = float(gaps.std(ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    gap = float(gaps.mean()) if len(gaps) else math.nan
    return {"count": cut, "share": cut / total, "reward_gap": gap, "reward_gap_error": error}


def trl_metrics(rewards: Array, scale_rewards: str = "group") -> dict[str, float]:
    """TRL 1.16's `reward_std` and `frac_reward_zero_std` for groups `(N, K)` as one batch.

    reward_std is the std (ddof 1) of **all** N K rewards, so it stays large when every group ties but groups
    differ. frac_reward_zero_std is the share of completions whose group has a std within 1e-8 of 0; with
    scale_rewards="batch" the std is the batch's, so the share is 0 or 1.
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

    Examples:
        >>> dead_group_probability(np.array([0.0, 0.0, 1.0]), 2)
        0.3333333333333333
    """
    rewards = checked(rewards)
    if group_size > len(rewards):
        return math.nan
    counts = np.unique(rewards, return_counts=True)[1]
    return sum(math.comb(int(n), group_size) for n in counts) / math.comb(len(rewards), group_size)


# --- the gradient of the expected reward, from the Gram matrix ----------------------------------------------


@dataclass(frozen=True)
class GradientEstimate:
    """A squared norm (or an inner product) of expected gradients, estimated without bias.

    Args:
        sq: the estimate; a squared norm's can be negative where noise is larger than the gradient.
        error: its standard error by the jackknife over answers (its square is biased upward: Efron and Stein
            1981); NaN for fewer than 5 answers.
    """

    sq: float
    error: float

    @property
    def norm(self) -> float:
        """sqrt(max(sq, 0)): the norm, biased as any root of an unbiased square is."""
        return math.sqrt(max(self.sq, 0.0)) if self.sq == self.sq else math.nan

    @property
    def norm_error(self) -> float:
        """Standard error of the norm by the delta method; NaN where the square isn't above 0."""
        return self.error / (2 * self.norm) if self.norm > 0 else math.nan


def gradient_product(gram: Array, rewards: Array, others: Array | None = None) -> float:
    """<Cov(r, S), Cov(q, S)> from K answers, without bias; with q = r it is ||grad V||^2.

    The U-statistic of the four-answer kernel (1/4) (r_i - r_j)(q_k - q_l) <S_i - S_j, S_k - S_l>, averaged
    over all ordered quadruples of distinct answers: pairs (i, j) and (k, l) are independent, and each
    estimates its covariance. In O(K^2): with r, q centred, H = C G C the centred Gram matrix, t = tr H, d =
    sum r_i q_i H_ii, Q = r^T H q, m = sum r_i q_i, it is [derived]

        (Q - d) / K(2) - 2 (2 d - Q) / K(3) + (2 Q - 6 d + m t) / K(4),   K(n) = K (K-1) ... (K-n+1).

    It doesn't need E[S] = 0, so it is right for truncated sampling (top-k, top-p) too: there it estimates the
    covariance under the distribution that was sampled. The plain |RLOO estimate|^2 is larger by the
    estimate's variance, however small the gradient.

    Args:
        gram: `(K, K)` dot products of scores.
        rewards: `(K,)`.
        others: `(K,)` second weights, such as the log-ratios of KL; None: the rewards again.

    Returns:
        The estimate; NaN for K < 4. Law: unchanged by r -> r + const, exactly 0 for constant r.
    """
    r = checked(rewards)
    q = r if others is None else checked(others)
    gram = np.asarray(gram, dtype=np.float64)
    count = len(r)
    if gram.shape != (count, count) or len(q) != count:
        raise ValueError(
            f"Expected a Gram matrix {(count, count)} and weights {(count,)}; got {gram.shape}, {q.shape}."
        )
    if count < 4:
        return math.nan
    if (r == r[0]).all() or (q == q[0]).all():
        return 0.0
    r, q = r - r.mean(), q - q.mean()
    centred = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    own, both = float((r * q * np.diag(centred)).sum()), float(r @ centred @ q)
    moment = float(r @ q) * float(np.trace(centred))
    pairs = count * (count - 1)
    triples = pairs * (count - 2)
    return (
        (both - own) / pairs
        - 2 * (2 * own - both) / triples
        + (2 * both - 6 * own + moment) / (triples * (count - 3))
    )


def expected_gradient(gram: Array, rewards: Array, others: Array | None = None) -> GradientEstimate:
    """`gradient_product` with its jackknife error, sqrt((K-1)/K sum_i (U_(-i) - mean U_(-.))^2)."""
    value, count = gradient_product(gram, rewards, others), len(rewards)
    if count < 5:
        return GradientEstimate(value, math.nan)
    left = np.empty(count)
    for i in range(count):
        kept = np.arange(count) != i
        rest = None if others is None else others[kept]
        left[i] = gradient_product(gram[np.ix_(kept, kept)], rewards[kept], rest)
    return GradientEstimate(value, math.sqrt((count - 1) / count * float(((left - left.mean()) ** 2).sum())))


def weighted_norm(gram: Array, weights: Array) -> float:
    """|sum_i w_i S_i| from the Gram matrix: the norm of one group's gradient estimate, its noise included."""
    return math.sqrt(max(float(weights @ gram @ weights), 0.0))


def trace_second_moment(gram: Array) -> float:
    """Estimate tr F = E|S|^2 without bias: the mean squared norm."""
    return float(np.trace(gram)) / len(gram)


def largest_eigenvalue(gram: Array) -> float:
    """lambda_max of the answers' own second moment (1/K) sum S S^T: on average at least lambda_max(F)."""
    return float(np.linalg.eigvalsh(gram)[-1]) / len(gram)


# --- GRPO and RLOO ------------------------------------------------------------------------------------------


def rloo_weights(rewards: Array) -> Array:
    """Weights w of RLOO's gradient estimate sum_i w_i S_i: (r_i - rbar) / (K-1) = (r_i - mean of others) / K.

    Equal for every sample to the pair form (1 / (K(K-1))) sum_{i<j} (r_i - r_j)(S_i - S_j), and unbiased.
    """
    return (rewards - rewards.mean()) / (len(rewards) - 1)


def centred_weights(rewards: Array) -> Array:
    """(r_i - rbar) / K: GRPO without its division by the std; its mean is (1 - 1/K) grad V."""
    return (rewards - rewards.mean()) / len(rewards)


def grpo_weights(rewards: Array, epsilon: float = TRL_EPSILON) -> Array:
    """(r_i - rbar) / (K (s + epsilon)), s with ddof 1: TRL's GRPO. 0 for a group that ties."""
    return (rewards - rewards.mean()) / (len(rewards) * (rewards.std(ddof=1) + epsilon))


def rloo_factor(p: float) -> float:
    """Factor p (1-p): for rewards in {0, 1}, RLOO's expected gradient is this times (S+ - S-), as is grad V.

    S+ and S- are the mean scores of correct and incorrect answers, p the probability of a correct one
    [derived].
    """
    return p * (1 - p)


def centred_factor(p: float, group_size: int) -> float:
    """(1 - 1/K) p (1-p), in place of `rloo_factor`: advantages centred at the group's mean, not divided."""
    return (1 - 1 / group_size) * p * (1 - p)


def grpo_factor(p: float, group_size: int, epsilon: float = 0.0) -> float:
    """E[ph(1-ph) / (s + epsilon)], K ph ~ Bin(K, p): GRPO's factor in place of `rloo_factor` [derived].

    With epsilon = 0 it is sqrt((K-1)/K) E[sqrt(ph(1-ph))]: towards sqrt(p(1-p)) for large K p, yet about
    sqrt(K) p once K p << 1.

    Examples:
        >>> [round(grpo_factor(0.1, k), 3) for k in (8, 64)]
        [0.196, 0.291]
    """
    successes = np.arange(1, group_size)
    share = successes / group_size
    s = np.sqrt(share * (1 - share) * group_size / (group_size - 1))
    chances = stats.binom.pmf(successes, group_size, p)
    return float((chances * share * (1 - share) / (s + epsilon)).sum())


def group_gradient_sq(
    gram: Array, rewards: Array, group_size: int, weights: Callable[[Array], Array] = grpo_weights,
    *, splits: int = 200, seed: int = 0,
) -> float:  # fmt: skip
    """||E[gradient of a group]||^2 for groups of `group_size`, without bias, from K >= 2 group_size answers.

    <gradient of one group, gradient of another one> for two disjoint groups among the answers, averaged over
    random splits (over all of them where there are no more than `splits`).

    Returns:
        The estimate; NaN for fewer answers. 0 for answers that all tie.
    """
    rewards, count = checked(rewards), len(rewards)
    if count < 2 * group_size or group_size < 2:
        return math.nan
    groups = _disjoint_groups(count, group_size, splits, seed)
    values = []
    for first, second in groups:
        left, right = weights(rewards[first]), weights(rewards[second])
        values.append(float(left @ gram[np.ix_(first, second)] @ right))
    return float(np.mean(values))


def _disjoint_groups(
    count: int, size: int, splits: int, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    number = math.comb(count, size) * math.comb(count - size, size)
    if number <= 2 * splits:
        return [
            (np.array(first), np.array(second))
            for first in combinations(range(count), size)
            for second in combinations([i for i in range(count) if i not in first], size)
        ]
    draw = np.random.default_rng(seed)
    orders = [draw.permutation(count)[: 2 * size] for _ in range(splits)]
    return [(order[:size], order[size:]) for order in orders]


# --- bounds on ||grad V|| -----------------------------------------------------------------------------------


def paper_bound(std: float, length: float, gamma: float, half_range: float = 1.0) -> float:
    """6 L gamma R^(1/3) STD^(2/3) >= ||grad V||: the bound of arXiv 2310.20703 (there R = 1).

    L: the longest output in tokens; gamma: largest spectral norm, over outputs and positions, of the Jacobian
        of the
    next-token logits in the parameters. The constant 6 and the form for R other than 1 are re-derived here,
    not quoted. With a gamma estimated from samples (always too small) it isn't certified.
    """
    return 6 * length * gamma * half_range ** (1 / 3) * std ** (2 / 3)


def fisher_bound(std: float, eigenvalue: float) -> float:
    """STD sqrt(lambda_max(F)) >= ||grad V||, for any rewards [derived]; equal for two tokens at even odds."""
    return std * math.sqrt(eigenvalue)


def trace_bound(std: float, trace: float) -> float:
    """STD sqrt(tr F) >= STD sqrt(lambda_max(F)) >= ||grad V||, for any rewards [derived].

    tr F is an expectation, so samples estimate it without bias; no gamma and no length is needed.
    """
    return std * math.sqrt(trace)


def length_bound(std: float, length: float, gamma: float) -> float:
    """STD gamma sqrt(L) >= STD sqrt(tr F) >= ||grad V|| [derived]; always below `paper_bound`."""
    return std * gamma * math.sqrt(length)


def ppo_bound(std: float, eigenvalue: float, baseline_error: float = 0.0) -> float:
    """sqrt(lambda_max(F) (STD^2 + (V-b)^2)) >= the norm of PPO's clipped surrogate gradient [derived].

    For a sequence-level ratio, any clip, any sampling policy, and the advantage r - b with one b per prompt
    (not for token-level GAE); F, STD and V under the current policy.

    Args:
        std: STD.
        eigenvalue: lambda_max(F).
        baseline_error: V - b.
    """
    return math.sqrt(eigenvalue * (std**2 + baseline_error**2))

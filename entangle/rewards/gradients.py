"""The gradient of the expected reward, from K answers' rewards and the Gram matrix of their scores.

grad V = E[r S] = Cov(r, S) (notation: `entangle.rewards.statistics`). No score is needed, only G_ij = <S_i, S_j>:
squared norms, inner products with other gradients, and what RLOO and GRPO make of a group of answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from entangle.analysis.statistics import Array, jackknife_error
from entangle.rewards.statistics import checked

TRL_EPSILON = 1e-4
"""What TRL's GRPO adds to a group's standard deviation before it divides by it."""


@dataclass(frozen=True)
class GradientEstimate:
    """A squared norm (or an inner product) of expected gradients, estimated without bias.

    Args:
        sq: the estimate; a squared norm's can be negative where noise is larger than the gradient.
        error: its standard error by the jackknife over answers (its square is biased upward: Efron and Stein
            1981); NaN for fewer than 5 answers. Two of them on either side aren't 95 %: over 300 draws from each of
            three policies with 12 outcomes the truth was within 1.96 errors in 39 to 95 % with 8 answers, 70 to 92 %
            with 16 and 81 to 94 % with 32.
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
    """`gradient_product` with its jackknife error, sqrt((K-1)/K sum_i (U_(-i) - mean U_(-.))^2).

    Args:
        gram: `(K, K)` dot products of scores, 1/parameter^2.
        rewards: `(K,)`.
        others: `(K,)` second weights; None: the rewards again.
    """
    value, count = gradient_product(gram, rewards, others), len(rewards)
    if count < 5:
        return GradientEstimate(value, math.nan)
    left = np.empty(count)
    for i in range(count):
        kept = np.arange(count) != i
        rest = None if others is None else others[kept]
        left[i] = gradient_product(gram[np.ix_(kept, kept)], rewards[kept], rest)
    return GradientEstimate(value, jackknife_error(left))


def weighted_norm(gram: Array, weights: Array) -> float:
    """|sum_i w_i S_i| from the Gram matrix: the norm of one group's gradient estimate, its noise included.

    Args:
        gram: `(K, K)` dot products of scores, 1/parameter^2.
        weights: w, `(K,)`, such as `rloo_weights`.
    """
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
    """(r_i - rbar) / (K (s + epsilon)), s with ddof 1: TRL's GRPO with `scale_rewards: group`. 0 for a group that ties.

    They weigh whole answers' scores, sums over tokens, and so are the gradient of TRL's `loss_type: dr_grpo` on fresh
    samples, but for its constant 1 / max_completion_length, and of `dapo` (the default), but for the tokens in a batch.
    Under `loss_type: grpo` an answer's weight is divided by its own length besides, which isn't done here.

    Args:
        rewards: `(K,)`, of one group.
        epsilon: added to s.
    """
    return (rewards - rewards.mean()) / (len(rewards) * (rewards.std(ddof=1) + epsilon))


def rloo_factor(p: float) -> float:
    """Factor p (1-p): for rewards in {0, 1}, RLOO's expected gradient is this times (S+ - S-), as is grad V.

    S+ and S- are the mean scores of correct and incorrect answers, p the probability of a correct one
    [derived].
    """
    return p * (1 - p)


def centred_factor(p: float, group_size: int) -> float:
    """(1 - 1/K) p (1-p), in place of `rloo_factor`: advantages centred at the group's mean, not divided.

    Args:
        p: probability of a correct answer.
        group_size: K, answers per group.
    """
    return (1 - 1 / group_size) * p * (1 - p)


def grpo_factor(p: float, group_size: int, epsilon: float = 0.0) -> float:
    """E[ph(1-ph) / (s + epsilon)], K ph ~ Bin(K, p): GRPO's factor in place of `rloo_factor` [derived].

    With epsilon = 0 it is sqrt((K-1)/K) E[sqrt(ph(1-ph))]: towards sqrt(p(1-p)) for large K p, yet about
    sqrt(K) p once K p << 1.

    Args:
        p: probability of a correct answer.
        group_size: K, answers per group.
        epsilon: added to the std.

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
    gram: Array,
    rewards: Array,
    group_size: int,
    weights: Callable[[Array], Array] = grpo_weights,
    *,
    splits: int = 200,
    seed: int = 0,
) -> float:
    """||E[gradient of a group]||^2 for groups of `group_size`, without bias, from K >= 2 group_size answers.

    <gradient of one group, gradient of another one> for two disjoint groups among the answers, averaged over
    random splits (over all of them where there are no more than `splits`).

    Args:
        gram: `(K, K)` dot products of scores, 1/parameter^2.
        rewards: `(K,)`.
        group_size: answers per group.
        weights: rewards of a group -> weights of its answers' scores.
        splits: random splits of the answers into two groups.
        seed: of the splits.

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

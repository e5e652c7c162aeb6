"""Inner products of expected steps that are made of pairs of answers, without bias, from one Gram matrix.

A kernel gives every unordered pair of answers a vector h(i, j) = C_ij S_i + C_ji S_j; its step is E[h] over
two independent answers. RFT and preference losses on sampled pairs are both of this form:

    expected reward gradient      C_ij = (r_i - r_j) / 2
    preference loss               C_ij = d_w, C_ji = -d_l  where r_i > r_j;  0 where rewards tie
"""

from __future__ import annotations

import math

import numpy as np

from entangle.analysis.statistics import Array


def reward_kernel(rewards: Array) -> Array:
    """C of the expected reward gradient, `(K, K)`: E[h] = Cov(r, S)."""
    return (rewards[:, None] - rewards[None, :]) / 2


def preference_kernel(rewards: Array, chosen: Array, rejected: Array) -> Array:
    """C of a preference loss on sampled pairs, `(K, K)`.

    Args:
        rewards: `(K,)`.
        chosen: `(K, K)`, entry (i, j) the incentive d_w of the pair in which i is chosen and j rejected.
        rejected: its d_l.
    """
    wins = rewards[:, None] > rewards[None, :]
    return np.where(wins, chosen, 0.0) - np.where(wins, rejected, 0.0).T


def kernel_product(gram: Array, first: Array, second: Array) -> float:
    """<E[h], E[h']> from K answers, unbiased: the mean of <h(i, j), h'(k, l)> over disjoint pairs of answers.

    In O(K^2) [derived]: all pairs of pairs, minus those that share an answer (summed answer by answer), plus
    those that are one pair (which that counts twice).

    Args:
        gram: `(K, K)` dot products of the answers' scores.
        first: C of h; its diagonal is 0.
        second: C of h'.

    Returns:
        The estimate; NaN for K < 4.
    """
    count = len(gram)
    if count < 4:
        return math.nan
    totals = first.sum(1), second.sum(1)
    around = [kernel.T + np.diag(total) for kernel, total in zip((first, second), totals, strict=True)]
    every = float(totals[0] @ gram @ totals[1])
    sharing = float(np.einsum("aj,jk,ak->", around[0], gram, around[1]))
    same = float((np.diag(gram)[:, None] * first * second + gram * first * second.T).sum())
    return (every - sharing + same) / (math.comb(count, 2) * math.comb(count - 2, 2))

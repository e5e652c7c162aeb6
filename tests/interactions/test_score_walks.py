"""Where the two halves meet: powers of the Gram matrix of scores count weighted walks on the graph of responses."""

from __future__ import annotations

from itertools import product
from math import comb, prod

import numpy as np


def listed_walks(gram: np.ndarray, steps: int) -> np.ndarray:
    """Over all walks of some steps from i to j, the sum of the products of their edges' inner products; `(n, n)`."""
    n = len(gram)
    sums = np.zeros((n, n))
    for walk in product(range(n), repeat=steps + 1):
        sums[walk[0], walk[-1]] += prod(gram[i, j] for i, j in zip(walk, walk[1:], strict=False))
    return sums


def test_gradient_steps_on_squared_error_add_up_weighted_walks():
    """Exact where log-probs are linear in theta (their linearisation) and the loss is |target - logp|^2 / 2.

    After t steps of size eta,

        change = sum_{k=1}^{t} C(t, k) (-1)^{k-1} eta^k K^k (target - logp at the start),

    and (K^k)_ij is the sum over walks of k steps from i to j, self-loops included.
    """
    rng, eta, steps = np.random.default_rng(0), 0.05, 4
    scores, start, target = rng.normal(size=(4, 7)), rng.normal(size=4), rng.normal(size=4)
    theta = np.zeros(7)
    for _ in range(steps):
        theta += eta * scores.T @ (target - start - scores @ theta)
    gram = scores @ scores.T
    walks = sum(
        comb(steps, k) * (-1) ** (k - 1) * eta**k * listed_walks(gram, k) for k in range(1, steps + 1)
    )
    np.testing.assert_allclose(scores @ theta, walks @ (target - start), rtol=1e-10)


def test_a_margin_loss_weighs_every_stop_by_its_curvature():
    """DPO on one pair whose log-probs start at their reference's, both zero.

    Two steps, to second order in eta:

        change = 2 eta K d - eta^2 K H K d,   d = -gradient, H = Hessian of the loss in the log-probs.

    The plain K^2 would be wrong. Incentives that don't answer to the log-probs (H = 0) leave walks of one step only.
    """
    rng, beta = np.random.default_rng(1), 0.7
    scores, signs = rng.normal(size=(2, 5)), np.array([1.0, -1.0])

    def incentive(logps: np.ndarray) -> np.ndarray:
        return signs * beta / (1 + np.exp(beta * signs @ logps))

    gram, first = scores @ scores.T, incentive(np.zeros(2))
    curvature = np.outer(signs, signs) * beta**2 / 4
    remainders, plain = [], []
    for eta in (1e-2, 1e-3):
        theta = np.zeros(5)
        for _ in range(2):
            theta += eta * scores.T @ incentive(scores @ theta)
        to_first = scores @ theta - 2 * eta * gram @ first
        remainders.append(np.abs(to_first + eta**2 * gram @ curvature @ gram @ first).max())
        plain.append(np.abs(to_first + eta**2 * gram @ gram @ first).max())
    assert remainders[1] < remainders[0] * 2e-3  # of third order or higher: a tenth of eta, a thousandth
    assert plain[1] > plain[0] * 5e-3  # of second order

"""Products of pairwise steps: the closed form against all quadruples, unbiased by enumeration."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from entangle.commands.joint.products import kernel_product, preference_kernel, reward_kernel
from entangle.rewards.gradients import gradient_product
from experiments.rft.exact import Outputs
from tests.rft.test_reward_gradients import a_policy, samples


def a_sample(count: int, seed: int = 0):
    """Scores, rewards with a tie, and incentives that differ by pair and by side."""
    draw = np.random.default_rng(seed)
    rewards = np.append(draw.normal(size=count - 1), 0.0)
    rewards[0] = 0.0
    chosen, rejected = draw.uniform(0.1, 1, (2, count, count))
    return draw.normal(size=(count, 6)), rewards, chosen, rejected


def step_of(scores, rewards, chosen, rejected, i, j):
    """d_w S_w - d_l S_l of one pair of answers, in plain words."""
    if rewards[i] == rewards[j]:
        return np.zeros_like(scores[0])
    w, loser = (i, j) if rewards[i] > rewards[j] else (j, i)
    return chosen[w, loser] * scores[w] - rejected[w, loser] * scores[loser]


@pytest.mark.parametrize("count", [4, 5, 7])
def test_product_is_the_mean_over_disjoint_pairs(count):
    scores, rewards, chosen, rejected = a_sample(count)
    gram, kernel = scores @ scores.T, preference_kernel(rewards, chosen, rejected)
    pairs = list(combinations(range(count), 2))
    steps = [step_of(scores, rewards, chosen, rejected, i, j) for i, j in pairs]
    slopes = [(rewards[i] - rewards[j]) / 2 * (scores[i] - scores[j]) for i, j in pairs]
    apart = [(p, q) for p in range(len(pairs)) for q in range(len(pairs)) if not {*pairs[p]} & {*pairs[q]}]
    own = np.mean([steps[p] @ steps[q] for p, q in apart])
    mixed = np.mean([steps[p] @ slopes[q] for p, q in apart])
    assert kernel_product(gram, kernel, kernel) == pytest.approx(own, rel=1e-10)
    assert kernel_product(gram, kernel, reward_kernel(rewards)) == pytest.approx(mixed, rel=1e-10)


def test_with_the_rewards_alone_it_is_the_squared_reward_gradient():
    scores, rewards, *_ = a_sample(9)
    kernel = reward_kernel(rewards)
    assert kernel_product(scores @ scores.T, kernel, kernel) == pytest.approx(
        gradient_product(scores @ scores.T, rewards), rel=1e-10
    )
    assert math.isnan(kernel_product(np.eye(3), np.zeros((3, 3)), np.zeros((3, 3))))


def expected_step(outputs: Outputs, r, chosen, rejected):
    """E[step] over two independent outputs."""
    p, count = outputs.probabilities, len(r)
    steps = (
        p[i] * p[j] * step_of(outputs.scores, r, chosen, rejected, i, j)
        for i in range(count)
        for j in range(count)
    )
    return np.sum(list(steps), axis=0)


def test_products_are_unbiased_by_enumeration():
    """All 4^4 samples of a policy with 4 outputs; the square of a sample's own mean step is larger (noise)."""
    outputs, r = a_policy(3, vocabulary=2, length=2)
    draw = np.random.default_rng(1)
    chosen, rejected = draw.uniform(0.1, 1, (4, 4)), draw.uniform(0.1, 1, (4, 4))
    step, gradient = expected_step(outputs, r, chosen, rejected), outputs.gradient(r)
    own = mixed = plain = 0.0
    for d, p in samples(outputs, 4):
        kernel = preference_kernel(r[d], chosen[np.ix_(d, d)], rejected[np.ix_(d, d)])
        gram = outputs.gram[np.ix_(d, d)]
        own += p * kernel_product(gram, kernel, kernel)
        mixed += p * kernel_product(gram, kernel, reward_kernel(r[d]))
        plain += p * float(kernel.sum(1) @ gram @ kernel.sum(1)) / 36
    assert own == pytest.approx(float(step @ step), rel=1e-10)
    assert mixed == pytest.approx(float(step @ gradient), rel=1e-10)
    assert plain > 1.5 * own

"""What K rewards say: moments, intervals, certificates, prevalence. Expectations are exact sums."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from entangle.analysis.statistics import bootstrap_mean, share
from entangle.rewards.statistics import (
    RewardStatistics,
    Support,
    bounded_std_high,
    cut_answers,
    dead_group_probability,
    largest_hidden_std,
    prevalence_low,
    reward_std_interval,
    samples_to_certify,
    trl_metrics,
)

BINARY = Support(0.0, 1.0, is_binary=True)
REWARDS = {
    "normal": (lambda rng, count: rng.normal(2.0, 3.0, count), 3.0),
    "exponential": (lambda rng, count: rng.exponential(2.0, count), 2.0),
    "beta": (lambda rng, count: rng.beta(0.5, 3.0, count), math.sqrt(0.5 * 3 / (3.5**2 * 4.5))),
    "many_zeros": (
        lambda rng, count: (rng.random(count) < 0.3) * rng.random(count),
        math.sqrt(0.1 - 0.15**2),
    ),
}
"""Draws of rewards, and their standard deviation."""

CHANCES, VALUES = np.array([0.2, 0.5, 0.3]), np.array([-1.0, 0.5, 2.0])


def samples(chances, count):
    """Every sample of `count` draws, with its probability."""
    for draw in product(range(len(chances)), repeat=count):
        yield np.array(draw), float(np.prod(chances[list(draw)]))


def test_mean_and_variance_are_unbiased():
    """By enumeration of all samples of 4: exact up to rounding."""
    mean = CHANCES @ VALUES
    drawn = [(RewardStatistics.from_rewards(VALUES[draw]), p) for draw, p in samples(CHANCES, 4)]
    assert sum(p * s.mean for s, p in drawn) == pytest.approx(mean, abs=1e-12)
    assert sum(p * s.variance for s, p in drawn) == pytest.approx(CHANCES @ (VALUES - mean) ** 2, abs=1e-12)


def test_statistics_follow_shift_and_scale():
    rewards, support = np.array([0.0, 1.0, 1.0, 4.0, 2.0]), Support(0.0, 4.0)
    before = RewardStatistics.from_rewards(rewards, support)
    after = RewardStatistics.from_rewards(3 * rewards + 7, Support(7.0, 19.0))
    assert after.mean == pytest.approx(3 * before.mean + 7)
    for name in ("std", "std_low", "std_high", "std_high_bounded"):
        assert getattr(after, name) == pytest.approx(3 * getattr(before, name), rel=1e-12), name
    assert (after.skew, after.above, after.distinct) == (
        pytest.approx(before.skew),
        before.above,
        before.distinct,
    )


@pytest.mark.parametrize(
    ("rewards", "above"),
    [
        ([0, 0, 0, 1], 0.25),
        ([0, 1, 1, 1], 0.75),
        ([1, 2, 3], 1 / 3),
        ([0, 0, 5, 1], 0.25),
        ([0.3, 0.3, 0.3], 0.0),
    ],
)
def test_share_of_answers_above_the_mean(rewards, above):
    """Few good answers: small; few bad ones: large; an answer at the mean isn't above it; ties have none."""
    assert RewardStatistics.from_rewards(np.array(rewards, dtype=float)).above == above


def test_cut_answers_and_their_rewards():
    """Three of seven were cut; the gap is averaged over the two prompts that have both kinds."""
    finished = [[True, False], [False, True, False], [True, True]]
    found = cut_answers(finished, [[1.0, 0.5], [0.2, 1.0, 0.4], [9.0, 9.0]])
    assert (found["count"], found["share"]) == (3, 3 / 7)
    assert found["reward_gap"] == pytest.approx((-0.5 - 0.7) / 2)
    assert found["reward_gap_error"] == pytest.approx(0.1)
    whole = cut_answers([[True, True]], [[1.0, 0.0]])
    assert whole["count"] == 0 and math.isnan(whole["reward_gap"])


@pytest.mark.parametrize("count", [4, 10, 16])
def test_binary_interval_covers_the_true_std(count):
    """Exact coverage over the binomial distribution, on a grid of P that has the border cases."""
    ends = [reward_std_interval(np.arange(count) < k, BINARY) for k in range(count + 1)]
    for p in np.linspace(0.01, 0.99, 49):
        std = math.sqrt(p * (1 - p))
        chance = [math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(count + 1)]
        covered = sum(
            c for c, (low, high) in zip(chance, ends, strict=True) if low - 1e-12 <= std <= high + 1e-12
        )
        assert covered >= 0.95, p


@pytest.mark.parametrize("count", [4, 8, 16, 64])
@pytest.mark.parametrize("kind", REWARDS)
def test_interval_covers_the_std_of_rewards_that_arent_normal(kind: str, count: int):
    """The truth lies inside in 88 % of 2000 samples at least, ties included (normal theory: 71 to 91 %)."""
    draw, std = REWARDS[kind]
    rng = np.random.default_rng(0)
    ends = np.array([reward_std_interval(draw(rng, count), Support()) for _ in range(2000)])
    covered = (ends[:, 0] <= std) & ~(ends[:, 1] < std)  # ties without a range have no upper end
    assert covered.mean() >= (0.935 if kind == "normal" else 0.88)


def test_interval_of_normal_rewards_nears_the_normal_theorys():
    """Of 400 normal values, both ends are within 8 % of sqrt((n-1) s^2 / chi2)."""
    rewards = np.random.default_rng(3).normal(2.0, 3.0, size=400)
    expected = [math.sqrt(399 * rewards.var(ddof=1) / chi2.ppf(tail, 399)) for tail in (0.975, 0.025)]
    assert reward_std_interval(rewards, Support()) == pytest.approx(expected, rel=0.08)


def test_too_few_rewards_say_what_their_range_says():
    assert reward_std_interval(np.array([0.2, 0.4, 0.9]), Support(0.0, 1.0)) == (0.0, 0.5)
    low, high = reward_std_interval(np.array([0.2, 0.4, 0.9]), Support())
    assert low == 0 and math.isnan(high)


def test_bounded_interval_covers_and_needs_a_range():
    assert math.isnan(bounded_std_high(0.1, 10, Support()))
    assert (
        bounded_std_high(0.1, 10, Support(0.0, 1.0)) == 0.5
    )  # too few answers to say more than the range does
    assert bounded_std_high(0.1, 5001, Support(0.0, 2.0)) == pytest.approx(
        0.1 + 2 * math.sqrt(2 * math.log(20) / 5000)
    )


def test_all_equal_certificate_for_binary_rewards():
    """10 ties allow P up to 1 - .05^(1/10) = .2589, so a std of .438 for {0, 1}, twice that for {-1, 1}."""
    assert largest_hidden_std(10, 0.0, BINARY) == pytest.approx(0.438, abs=5e-4)
    assert largest_hidden_std(10, -1.0, Support(-1.0, 1.0)) == pytest.approx(0.876, abs=5e-4)
    assert [samples_to_certify(tau) for tau in (0.2, 0.1, 0.05)] == [71, 296, 1194]
    tied = RewardStatistics.from_rewards(np.zeros(10), BINARY)
    assert (tied.std, tied.std_high) == (0.0, pytest.approx(0.4619, abs=5e-5))  # two-sided: 1-.025^(1/10)
    for tau in (0.2, 0.1, 0.05):  # one answer fewer doesn't certify tau
        count = samples_to_certify(tau)
        assert largest_hidden_std(count, 0.0, BINARY) <= tau < largest_hidden_std(count - 1, 0.0, BINARY)


@pytest.mark.parametrize(("count", "value"), [(3, 0.5), (4, 0.0), (10, 0.5), (10, 0.2), (10, 1.0), (40, 0.4)])
def test_hidden_std_is_the_largest_that_is_allowed(count, value):
    """No distribution on a grid of [0, 1] with at most P outside `value` has a larger std; one reaches it."""
    other = 1 - 0.05 ** (1 / count)
    bound = largest_hidden_std(count, value, Support(0.0, 1.0))
    largest = 0.0
    for mass in np.linspace(0, other, 41):
        for upper in np.linspace(0, 1, 401):
            chances = np.array([1 - mass, mass * upper, mass * (1 - upper)])
            points = np.array([value, 1.0, 0.0])
            largest = max(largest, chances @ points**2 - (chances @ points) ** 2)
    assert largest <= bound**2 + 1e-12
    assert math.sqrt(largest) == pytest.approx(bound, rel=1e-4)


def test_ties_without_a_known_range_certify_nothing():
    tied = RewardStatistics.from_rewards(np.full(8, 0.3))
    assert (tied.std, tied.std_low) == (0.0, 0.0)
    assert math.isnan(tied.std_high) and math.isnan(tied.hidden_std)


def test_prevalence_bound_holds_in_the_worst_case():
    """A share pi0 of prompts has std 0, the rest just above tau: the expected tied share gives pi0 back."""
    for pi0, tau, count in ((0.3, 0.2, 10), (0.0, 0.1, 16), (0.9, 0.4, 5)):
        p = (1 - math.sqrt(1 - 4 * tau**2)) / 2
        tied = pi0 + (1 - pi0) * (p**count + (1 - p) ** count)
        assert prevalence_low(tied, count, tau) == pytest.approx(pi0, abs=1e-12)
    assert prevalence_low(0.0, 10, 0.2) == 0.0


def test_wilson_interval_against_its_formula():
    """Wilson's centre and half-width, with z = 1.959964, for 8 of 10: [.4902, .9433]."""
    row = share(8, 10)
    assert (row["low"], row["high"]) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    z, f, n = 1.959963984540054, 0.8, 10
    centre, width = f + z**2 / (2 * n), z * math.sqrt(f * (1 - f) / n + z**2 / (4 * n**2))
    assert row["low"] == pytest.approx((centre - width) / (1 + z**2 / n), abs=1e-12)


def test_bootstrap_agrees_with_the_normal_interval_for_many_prompts():
    flags = np.arange(2000) < 600
    low, high = bootstrap_mean(flags, seed=1)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 2000)
    assert (low, high) == (pytest.approx(0.3 - half, abs=2e-3), pytest.approx(0.3 + half, abs=2e-3))


def test_dead_group_probability_is_unbiased():
    """Over all samples of 5 its mean is the sum over rewards of P(reward)^3."""
    expected = float((CHANCES**3).sum())
    mean = sum(p * dead_group_probability(VALUES[draw], 3) for draw, p in samples(CHANCES, 5))
    assert mean == pytest.approx(expected, abs=1e-12)
    assert math.isnan(dead_group_probability(VALUES, 4))


def test_trl_metrics_are_trls():
    """TRL's own expressions (nanstd over the batch; isclose on group stds): two of four groups are dead.

    reward_std stays large although half of the groups give no gradient; with the batch's std none seems dead.
    """
    utils = pytest.importorskip("trl.trainer.utils")
    rewards = np.array([[0.0] * 4, [5.0] * 4, [1.0, 2.0, 1.0, 2.0], [0.0, 1.0, 0.0, 0.0]])
    tensor = torch.tensor(rewards)
    stds = tensor.std(dim=1)
    expected = float(torch.isclose(stds, torch.zeros_like(stds)).float().mean())
    ours = trl_metrics(rewards)
    assert ours["frac_reward_zero_std"] == expected == 0.5
    assert ours["reward_std"] == pytest.approx(float(utils.nanstd(tensor.flatten())), rel=1e-6)
    assert ours["reward_std"] > 1.9
    assert trl_metrics(rewards, "batch")["frac_reward_zero_std"] == 0.0


@pytest.mark.parametrize("rewards", [np.array([]), np.array([1.0, np.nan]), np.zeros((2, 2))])
def test_unusable_rewards_are_refused(rewards):
    with pytest.raises(ValueError, match="Expected finite rewards"):
        RewardStatistics.from_rewards(rewards)

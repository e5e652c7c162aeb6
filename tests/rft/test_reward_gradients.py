"""Gradient of the expected reward: identities, bounds, estimators, on enumerated policies."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from entangle.rewards.bounds import fisher_bound, length_bound, paper_bound, ppo_bound, trace_bound
from entangle.rewards.gradients import (
    centred_factor,
    centred_weights,
    expected_gradient,
    gradient_product,
    group_gradient_sq,
    grpo_factor,
    grpo_weights,
    largest_eigenvalue,
    rloo_factor,
    rloo_weights,
    trace_second_moment,
    weighted_norm,
)
from experiments.rft.closed_forms import speed_rft, speed_sft, time_rft, time_sft
from experiments.rft.exact import Autoregressive, Outputs, softmax, softmax_outputs
from experiments.rft.time_to_fit import GROUP, direction, softmax_start, time_to_fit


def a_policy(seed: int, vocabulary: int = 3, length: int = 2, width: int = 4) -> tuple[Outputs, np.ndarray]:
    """A random enumerated policy and rewards in [-1, 1] for its outputs."""
    draw = np.random.default_rng(seed)
    model = Autoregressive.random(vocabulary, length, width, seed)
    outputs = model(draw.normal(scale=draw.uniform(0.1, 2.0), size=(vocabulary, width)))
    return outputs, draw.uniform(-1, 1, size=len(outputs.probabilities))


def samples(outputs: Outputs, count: int):
    """Every sample of `count` outputs, with its probability."""
    for draw in product(range(len(outputs.probabilities)), repeat=count):
        yield list(draw), float(np.prod(outputs.probabilities[list(draw)]))


# --- the enumerated policy itself ---------------------------------------------------------------------------


def test_enumerated_scores_are_autograds():
    model = Autoregressive.random(3, 3, 4, seed=5)
    weights = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    outputs = model(weights.detach().numpy())
    assert outputs.probabilities.sum() == pytest.approx(1, abs=1e-12)
    for i in (0, 7, 26):
        tokens = model.outputs[i]
        logp = sum(
            torch.log_softmax(weights @ torch.tensor(model.features[tokens[:t]]), -1)[token]
            for t, token in enumerate(tokens)
        )
        (grad,) = torch.autograd.grad(logp, weights)
        np.testing.assert_allclose(outputs.scores[i], grad.ravel(), atol=1e-13)
        assert math.log(outputs.probabilities[i]) == pytest.approx(float(logp.detach()), abs=1e-12)


# --- identities of grad V -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_gradient_is_covariance_and_pair_form(seed):
    outputs, r = a_policy(seed)
    p, s = outputs.probabilities, outputs.scores
    covariance = (p * (r - outputs.value(r))) @ (s - p @ s)
    pairs = 0.5 * np.einsum("i,j,ij,ijd->d", p, p, r[:, None] - r, s[:, None] - s)
    np.testing.assert_allclose(outputs.gradient(r), covariance, atol=1e-13)
    np.testing.assert_allclose(outputs.gradient(r), pairs, atol=1e-13)


def test_gradient_under_shift_scale_and_ties():
    outputs, r = a_policy(1)
    np.testing.assert_allclose(outputs.gradient(r + 5), outputs.gradient(r), atol=1e-13)
    np.testing.assert_allclose(outputs.gradient(3 * r), 3 * outputs.gradient(r), atol=1e-13)
    np.testing.assert_allclose(outputs.gradient(np.full_like(r, 0.7)), 0, atol=1e-13)


def test_binary_rewards_scale_the_supervised_gradient_by_the_probability():
    """Grad V = (r1 - r0) P grad log P: RFT is SFT on the correct set, times P."""
    outputs, _ = a_policy(2)
    correct = np.arange(len(outputs.probabilities)) % 4 == 1
    p = outputs.probabilities[correct].sum()
    grad_log_p = outputs.probabilities[correct] @ outputs.scores[correct] / p
    r = np.where(correct, 1.0, -1.0)
    np.testing.assert_allclose(outputs.gradient(r), 2 * p * grad_log_p, atol=1e-13)
    assert outputs.std(r) == pytest.approx(2 * math.sqrt(p * (1 - p)), abs=1e-12)


def test_chain_of_bounds_on_300_policies():
    """||grad V|| <= STD sqrt(lambda_max) <= STD sqrt(tr F) <= STD gamma sqrt(L) <= the paper's; |r| <= 1."""
    for seed in range(300):
        outputs, r = a_policy(seed, length=1 + seed % 3, width=2 + seed % 3)
        std, length, gamma = outputs.std(r), outputs.length, outputs.gamma
        chain = [
            float(np.linalg.norm(outputs.gradient(r))),
            fisher_bound(std, outputs.eigenvalue),
            trace_bound(std, outputs.trace),
            length_bound(std, length, gamma),
            paper_bound(std, length, gamma),
        ]
        assert all(small <= large * (1 + 1e-12) for small, large in zip(chain, chain[1:], strict=False)), seed


def test_bounds_scale_with_the_rewards():
    """All are homogeneous in the reward, the paper's form too, by its half-range."""
    assert paper_bound(0.6, 5, 1.3, half_range=2.0) == pytest.approx(2 * paper_bound(0.3, 5, 1.3))
    assert fisher_bound(0.6, 2.0) == 2 * fisher_bound(0.3, 2.0)


def test_fisher_bound_is_reached_by_two_tokens_at_even_odds():
    """At z = (0, 0), r = (1, -1): ||grad V|| = sqrt(1/2) = STD sqrt(lambda_max F)."""
    outputs, r = softmax_outputs(np.zeros(2)), np.array([1.0, -1.0])
    assert np.linalg.norm(outputs.gradient(r)) == pytest.approx(math.sqrt(0.5), abs=1e-12)
    assert fisher_bound(outputs.std(r), outputs.eigenvalue) == pytest.approx(math.sqrt(0.5), abs=1e-12)


def test_ppo_bound_on_random_softmax_policies():
    """Gradient of the clipped surrogate: E_pi[A S] over the outputs whose clipping isn't active."""
    draw = np.random.default_rng(0)
    largest = 0.0
    for _ in range(500):
        outputs = softmax_outputs(draw.normal(scale=2, size=5))
        old = softmax(draw.normal(scale=2, size=5))
        r, clip, b = draw.uniform(-1, 1, size=5), draw.uniform(0.05, 0.5), draw.uniform(-1, 1)
        ratio, advantage = outputs.probabilities / old, r - b
        active = np.where(advantage > 0, ratio < 1 + clip, ratio > 1 - clip)
        gradient = (outputs.probabilities * advantage * active) @ outputs.scores
        bound = ppo_bound(outputs.std(r), outputs.eigenvalue, outputs.value(r) - b)
        largest = max(largest, float(np.linalg.norm(gradient)) / bound)
    assert 0.9 < largest <= 1 + 1e-12  # it holds, and it is nearly reached


# --- estimators ---------------------------------------------------------------------------------------------


def brute_force(gram, r, q):
    """Mean of the four-answer kernel over every ordered quadruple of distinct answers."""
    kernel = [
        0.25 * (r[i] - r[j]) * (q[k] - q[m]) * (gram[i, k] - gram[i, m] - gram[j, k] + gram[j, m])
        for i, j, k, m in permutations(range(len(r)), 4)
    ]
    return float(np.mean(kernel))


@pytest.mark.parametrize("count", [4, 5, 7])
def test_closed_form_is_the_mean_over_all_quadruples(count):
    draw = np.random.default_rng(count)
    s, r, q = draw.normal(size=(count, 6)), draw.normal(size=count), draw.normal(size=count)
    gram = s @ s.T
    assert gradient_product(gram, r) == pytest.approx(brute_force(gram, r, r), rel=1e-10)
    assert gradient_product(gram, r, q) == pytest.approx(brute_force(gram, r, q), rel=1e-10)


@pytest.mark.parametrize("count", [4, 5])
def test_squared_norm_is_unbiased_by_enumeration(count):
    """All 4^K samples of a policy with 4 outputs; the plain squared norm is larger (noise)."""
    outputs, r = a_policy(3, vocabulary=2, length=2)
    truth = float(outputs.gradient(r) @ outputs.gradient(r))
    mean = plain = 0.0
    for draw, p in samples(outputs, count):
        gram = outputs.gram[np.ix_(draw, draw)]
        mean += p * gradient_product(gram, r[draw])
        plain += p * weighted_norm(gram, rloo_weights(r[draw])) ** 2
    assert mean == pytest.approx(truth, rel=1e-10)
    assert plain > 2 * truth


def test_squared_norm_is_unbiased_when_scores_dont_average_to_zero():
    """Under truncated sampling E[S] isn't 0; what is estimated is the covariance under what was sampled."""
    full, r = a_policy(4, vocabulary=2, length=2)
    kept = np.array([0, 2, 3])
    q = full.probabilities[kept] / full.probabilities[kept].sum()
    outputs, r = Outputs(q, full.scores[kept], full.length, full.gamma), r[kept]
    assert np.linalg.norm(q @ outputs.scores) > 0.05
    covariance = (q * (r - q @ r)) @ outputs.scores
    mean = sum(p * gradient_product(outputs.gram[np.ix_(d, d)], r[d]) for d, p in samples(outputs, 5))
    assert mean == pytest.approx(covariance @ covariance, rel=1e-10)


def test_product_of_two_gradients_is_unbiased():
    """As for the reward's and KL's: <grad V, grad KL>, with log-ratios as the second weights."""
    outputs, r = a_policy(6, vocabulary=2, length=2)
    logs = np.log(outputs.probabilities) - np.log(softmax(np.arange(4.0)))
    mean = sum(
        p * gradient_product(outputs.gram[np.ix_(d, d)], r[d], logs[d]) for d, p in samples(outputs, 4)
    )
    assert mean == pytest.approx(float(outputs.gradient(r) @ outputs.gradient(logs)), rel=1e-10)


def test_squared_norm_follows_shift_scale_and_ties():
    draw = np.random.default_rng(0)
    s, r = draw.normal(size=(8, 5)), draw.normal(size=8)
    gram = s @ s.T
    value = gradient_product(gram, r)
    assert gradient_product(gram, r + 3) == pytest.approx(value, rel=1e-9)
    assert gradient_product(gram, 2 * r) == pytest.approx(4 * value, rel=1e-12)
    assert gradient_product(gram, np.full(8, 0.1)) == 0.0
    assert math.isnan(gradient_product(gram[:3, :3], r[:3]))


def test_jackknife_error_isnt_too_small():
    """Efron and Stein: sum_i (U_(-i) - mean)^2 has at least the variance of U from one answer fewer."""
    outputs, r = a_policy(3, vocabulary=2, length=2)
    truth = float(outputs.gradient(r) @ outputs.gradient(r))
    variance = sum(
        p * (gradient_product(outputs.gram[np.ix_(d, d)], r[d]) - truth) ** 2 for d, p in samples(outputs, 4)
    )
    jackknife = sum(
        p * 5 / 4 * expected_gradient(outputs.gram[np.ix_(d, d)], r[d]).error ** 2
        for d, p in samples(outputs, 5)
    )
    assert variance <= jackknife < 4 * variance


def test_second_moment_estimates():
    """The trace is unbiased; the sample's largest eigenvalue is on average at least the true one."""
    outputs, _ = a_policy(3, vocabulary=2, length=2)
    grams = [(outputs.gram[np.ix_(d, d)], p) for d, p in samples(outputs, 4)]
    assert sum(p * trace_second_moment(g) for g, p in grams) == pytest.approx(outputs.trace, rel=1e-12)
    assert sum(p * largest_eigenvalue(g) for g, p in grams) >= outputs.eigenvalue


# --- RLOO and GRPO ------------------------------------------------------------------------------------------


def test_rloo_is_the_pair_form_for_every_sample():
    """(1/K) sum (r_i - mean of the others) S_i = (1 / (K(K-1))) sum_{i<j} (r_i - r_j)(S_i - S_j), exactly."""
    draw = np.random.default_rng(0)
    s, r, count = draw.normal(size=(6, 4)), draw.normal(size=6), 6
    others = (r.sum() - r) / (count - 1)
    pairs = sum((r[i] - r[j]) * (s[i] - s[j]) for i in range(count) for j in range(i)) / (count * (count - 1))
    np.testing.assert_allclose(rloo_weights(r) @ s, (r - others) @ s / count, atol=1e-14)
    np.testing.assert_allclose(rloo_weights(r) @ s, pairs, atol=1e-14)
    assert weighted_norm(s @ s.T, rloo_weights(r)) == pytest.approx(float(np.linalg.norm(pairs)), rel=1e-12)


def expected_group_gradient(outputs, r, count, weights):
    return sum(p * (weights(r[d]) @ outputs.scores[d]) for d, p in samples(outputs, count))


def exact_grpo(rewards):
    return np.zeros(len(rewards)) if np.ptp(rewards) == 0 else grpo_weights(rewards, epsilon=0.0)


def test_factors_of_binary_rewards_by_enumeration():
    """K = 4, z = (-.5, .3, .1), r = (1, 0, 0): RLOO 1, centred 3/4, GRPO 1.436149020190938 times grad V."""
    outputs, r = softmax_outputs(np.array([-0.5, 0.3, 0.1])), np.array([1.0, 0.0, 0.0])
    gradient, p = outputs.gradient(r), float(outputs.probabilities[0])
    between = outputs.scores[0] - outputs.probabilities[1:] @ outputs.scores[1:] / (1 - p)
    np.testing.assert_allclose(rloo_factor(p) * between, gradient, atol=1e-13)
    for weights, factor, ratio in (
        (rloo_weights, rloo_factor(p), 1.0),
        (centred_weights, centred_factor(p, 4), 0.75),
        (exact_grpo, grpo_factor(p, 4), 1.436149020190938),
    ):
        expected = expected_group_gradient(outputs, r, 4, weights)
        np.testing.assert_allclose(expected, ratio * gradient, atol=1e-13)
        np.testing.assert_allclose(expected, factor * between, atol=1e-13)


def test_grpo_lifts_the_signal_and_still_vanishes():
    """P = .1: .196 (K 8), .291 (K 64) for .09; P = .001: .00247, .00773 for .000999, about sqrt(K) P."""
    found = [grpo_factor(p, k) for p in (0.1, 0.001) for k in (8, 64)]
    np.testing.assert_allclose(found, [0.196, 0.291, 0.00247, 0.00773], rtol=3e-3)
    assert grpo_factor(1e-6, 16) == pytest.approx(math.sqrt(15 / 16) * math.sqrt(15 / 16) * 4e-6, rel=1e-4)


@pytest.mark.parametrize("weights", [grpo_weights, centred_weights])
def test_squared_norm_of_a_groups_expected_gradient_is_unbiased(weights):
    """Groups of 2 among 4 answers, rewards that aren't binary, TRL's epsilon; all splits."""
    outputs, r = a_policy(3, vocabulary=2, length=2)
    expected = expected_group_gradient(outputs, r, 2, weights)
    mean = sum(
        p * group_gradient_sq(outputs.gram[np.ix_(d, d)], r[d], 2, weights) for d, p in samples(outputs, 4)
    )
    assert mean == pytest.approx(float(expected @ expected), rel=1e-10)


def test_random_splits_agree_with_all_of_them():
    draw = np.random.default_rng(0)
    s, r = draw.normal(size=(10, 5)) + 1, draw.normal(size=10)
    gram = s @ s.T
    every = group_gradient_sq(gram, r, 3, splits=10_000)
    some = group_gradient_sq(gram, r, 3, splits=1500, seed=1)
    assert some == pytest.approx(every, abs=0.05 * float(np.trace(gram)) / 10)
    assert math.isnan(group_gradient_sq(gram, r, 6))


# --- time to fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "labels", "rft", "sft"),
    [(0.1, 2, 4.951482, 3.736204), (0.02, 2, 15.821455, 4.628853), (0.02, 5, 25.314328, 7.406165)],
)
def test_times_to_fit_against_integration(start, labels, rft, sft):
    """Gradient flow of the logits themselves, integrated; the closed forms know only p."""
    assert time_rft(start, 0.8, labels) == pytest.approx(rft, abs=1e-6)
    assert time_sft(start, 0.8, labels) == pytest.approx(sft, abs=1e-6)
    logits = np.log(np.array([start] + [(1 - start) / (labels - 1)] * (labels - 1)))
    r = np.array([1.0] + [-1.0] * (labels - 1))
    one_hot = np.eye(labels)[0]
    flows = {
        rft: lambda _, z: softmax_outputs(z).gradient(r),
        sft: lambda _, z: one_hot - softmax(z),
    }
    for expected, flow in flows.items():

        def reached(_, z):
            return softmax(z)[0] - 0.8

        reached.terminal = True
        path = solve_ivp(flow, (0, 100), logits, events=reached, rtol=1e-10, atol=1e-12)
        assert path.t_events[0][0] == pytest.approx(expected, rel=1e-6)


def test_the_studys_ascent_follows_the_closed_forms():
    """Steps of about 1 % in p: within 2 % of gradient flow; GRPO's direction has its factor."""
    for start in (0.2, 0.01):
        for method, closed in (("rft", time_rft), ("sft", time_sft)):
            found = time_to_fit(softmax_outputs, softmax_start(start), 0, method)
            assert found == pytest.approx(closed(start, 0.8, labels=5), rel=0.02), (start, method)
    outputs = softmax_outputs(softmax_start(0.3))
    expected = grpo_factor(0.3, GROUP) * (
        outputs.scores[0] - outputs.probabilities[1:] @ outputs.scores[1:] / 0.7
    )
    np.testing.assert_allclose(direction("grpo", outputs, 0), expected, atol=1e-13)


def test_rft_is_slower_than_sft_by_twice_the_probability():
    for p in (0.001, 0.1, 0.7):
        outputs = softmax_outputs(np.log(np.array([p, (1 - p) / 2, (1 - p) / 2])))
        r, first = np.array([1.0, -1.0, -1.0]), outputs.scores[0]
        assert p * first @ outputs.gradient(r) == pytest.approx(speed_rft(p, 3), rel=1e-12)
        assert p * first @ first == pytest.approx(speed_sft(p, 3), rel=1e-12)
        assert speed_rft(p, 3) / speed_sft(p, 3) == pytest.approx(2 * p, rel=1e-12)

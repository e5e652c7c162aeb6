"""Regimes: the sign table for any incentives, the band, the critical weights, and finite steps that agree."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from entangle.analysis.geometry import PairGeometry
from entangle.analysis.regimes import (
    REGIMES,
    Regime,
    band_coordinate,
    critical_addition,
    critical_shift,
    predict,
)
from losses import DPO, Incentives, PairLogps
from tests.toys import LogProb, geometry, one_token, score, shared_prefix, shared_suffix

ZERO = torch.zeros(4, dtype=torch.float64)


def blocks(pairs: int = 4000) -> PairGeometry:
    chosen, rejected = torch.randn(2, pairs, 3, dtype=torch.float64)
    return PairGeometry.from_scores(chosen * torch.rand(pairs, 1) * 3, rejected)


def incentives(chosen: float | Tensor, rejected: float | Tensor, pairs: int) -> Incentives:
    return Incentives(*(torch.as_tensor(v, dtype=torch.float64).expand(pairs) for v in (chosen, rejected)))


def one_pair(block: PairGeometry, chosen: float = 1.0, rejected: float = 1.0) -> Regime:
    return predict(block, incentives(chosen, rejected, 1)).regimes[0]


IMPOSSIBLE = {
    (1, 1): {Regime.INVERTED},
    (-1, -1): {Regime.IDEAL},
    (1, -1): {Regime.BOTH_DOWN},
    (-1, 1): {Regime.BOTH_UP},
    (1, 0): {Regime.BOTH_DOWN, Regime.INVERTED},
    (0, 1): {Regime.BOTH_UP, Regime.INVERTED},
    (-1, 0): {Regime.BOTH_UP, Regime.IDEAL},
    (0, -1): {Regime.BOTH_DOWN, Regime.IDEAL},
    (0, 0): set(REGIMES) - {Regime.DEGENERATE},
}


@pytest.mark.parametrize("signs", list(IMPOSSIBLE))
def test_no_pair_lands_in_the_quadrant_against_its_incentives(signs: tuple[int, int]):
    block = blocks()
    sizes = torch.rand(2, len(block.inner), dtype=torch.float64) + 0.01
    seen = set(predict(block, Incentives(signs[0] * sizes[0], signs[1] * sizes[1])).regimes)
    assert not seen & IMPOSSIBLE[signs]
    possible = set(REGIMES) - IMPOSSIBLE[signs] - {Regime.DEGENERATE}
    assert possible <= seen or signs == (0, 0)


def test_weighted_changes_sum_to_the_squared_gradient_of_the_loss():
    chosen, rejected = torch.randn(2, 300, 3, dtype=torch.float64)
    d_w, d_l = torch.randn(2, 300, dtype=torch.float64)
    prediction = predict(PairGeometry.from_scores(chosen, rejected), Incentives(d_w, d_l))
    gradient = d_w[:, None] * chosen - d_l[:, None] * rejected
    assert_close(d_w * prediction.change_chosen - d_l * prediction.change_rejected, (gradient**2).sum(1))


def test_changes_are_the_gram_matrix_times_the_incentives():
    block, d = blocks(100), torch.randn(2, 100, dtype=torch.float64)
    prediction = predict(block, Incentives(*d))
    assert_close(prediction.change_chosen, d[0] * block.sq_chosen - d[1] * block.inner)
    assert_close(prediction.change_rejected, d[0] * block.inner - d[1] * block.sq_rejected)


def test_equal_incentives_never_shrink_the_margin():
    block = blocks(300)
    margin = predict(block, incentives(0.7, 0.7, 300)).margin_change
    assert_close(margin, 0.7 * (block.sq_chosen + block.sq_rejected - 2 * block.inner))
    assert (margin >= 0).all()


def test_unequal_incentives_can_shrink_the_margin():
    """A = 1, B = 9, c = 2 with incentives (1, .1) gives -0.3."""
    one = torch.ones(1, dtype=torch.float64)
    block = PairGeometry(one, 9 * one, 2 * one, -one, 7 * one)
    assert predict(block, incentives(1.0, 0.1, 1)).margin_change.item() == pytest.approx(-0.3, abs=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_three_ways_to_the_regime_agree(sign: int):
    """From signs, from rho against (c/A, B/c), and from the band coordinate, for incentives of one sign."""
    block = blocks()
    block = block[block.inner > 0]
    sizes = torch.rand(2, len(block.inner), dtype=torch.float64) * 2 + 0.01
    incentives = Incentives(sign * sizes[0], sign * sizes[1])
    regimes = predict(block, incentives).regimes
    tau, slack = band_coordinate(block, incentives)
    lower, upper = block.critical_ratio
    rho = sizes[0] / sizes[1]
    names = {
        1: (Regime.BOTH_DOWN, Regime.IDEAL, Regime.BOTH_UP),
        -1: (Regime.BOTH_UP, Regime.INVERTED, Regime.BOTH_DOWN),
    }[sign]
    for i, regime in enumerate(regimes):
        by_ratio = names[0] if rho[i] < lower[i] else names[2] if rho[i] > upper[i] else names[1]
        by_band = names[0] if tau[i] < -1 else names[2] if tau[i] > 1 else names[1]
        assert regime == by_ratio == by_band
        assert (slack[i] > 0) == (regime == names[1])


def test_band_coordinate_is_undefined_where_it_has_no_meaning():
    block = blocks(50)
    tau, slack = band_coordinate(block, incentives(1.0, -1.0, 50))
    assert tau.isnan().all() and slack.isnan().all()
    tau, slack = band_coordinate(block, incentives(1.0, 1.0, 50))
    assert (tau.isnan() == (block.inner <= 0)).all()
    assert torch.isposinf(slack[block.inner <= 0]).all()


def test_exchanging_the_responses_exchanges_the_changes():
    chosen, rejected = torch.randn(2, 60, 4, dtype=torch.float64)
    d_w, d_l = torch.randn(2, 60, dtype=torch.float64)
    there = predict(PairGeometry.from_scores(chosen, rejected), Incentives(d_w, d_l))
    back = predict(PairGeometry.from_scores(rejected, chosen), Incentives(-d_l, -d_w))
    assert_close(there.change_chosen, back.change_rejected)
    assert_close(there.change_rejected, back.change_chosen)


def test_scaling_both_incentives_changes_no_regime():
    block, d = blocks(300), torch.randn(2, 300, dtype=torch.float64)
    assert predict(block, Incentives(*d)).regimes == predict(block, Incentives(*(1e6 * d))).regimes


def test_identical_responses_are_degenerate_for_equal_incentives():
    scores = torch.randn(5, 9, dtype=torch.float64)
    block = PairGeometry.from_scores(scores, scores)
    assert set(predict(block, incentives(0.3, 0.3, 5)).regimes) == {Regime.DEGENERATE}
    assert set(predict(block, incentives(0.4, 0.3, 5)).regimes) == {Regime.BOTH_UP}


def test_orthogonal_scores_are_always_ideal():
    chosen, rejected = torch.eye(2, dtype=torch.float64)[:, None, :]
    assert one_pair(PairGeometry.from_scores(chosen, rejected), 3.0, 0.01) is Regime.IDEAL


def test_a_change_below_the_arithmetic_is_degenerate_not_guessed():
    one = torch.ones(1, dtype=torch.float64)
    block = PairGeometry(one, one * 2, one, one * 3e-7, one, resolution=1e-6)
    assert one_pair(block) is Regime.DEGENERATE
    assert one_pair(PairGeometry(one, one * 2, one, one * 3e-6, one, resolution=1e-6)) is Regime.IDEAL


def test_non_finite_numbers_are_degenerate():
    one = torch.ones(1, dtype=torch.float64)
    assert one_pair(PairGeometry(one, one, one * torch.nan, one, one)) is Regime.DEGENERATE


def test_suffix_flips_the_regime_between_four_and_five_tokens():
    """T3: both_down beyond T* = 1 / sqrt(2 (1-p)(p-q)) = 4.0825; with p and q exchanged both_up."""
    assert 1 / math.sqrt(2 * 0.1 * 0.3) == pytest.approx(4.0825, abs=1e-4)
    for suffix, expected in [(3, "ideal"), (4, "ideal"), (5, "both_down"), (8, "both_down")]:
        block = geometry(shared_suffix(0, suffix, 0.9), shared_suffix(1, suffix, 0.6), ZERO)
        assert one_pair(block) == expected
    mirrored = geometry(shared_suffix(0, 5, 0.6), shared_suffix(1, 5, 0.9), ZERO)
    assert one_pair(mirrored) is Regime.BOTH_UP


@pytest.mark.parametrize("prefix", [3, 100])
def test_prefix_leaves_equal_incentives_ideal_and_makes_others_fragile(prefix: int):
    theta = torch.zeros(2 * (prefix + 1), dtype=torch.float64)
    block = geometry(shared_prefix(0, prefix), shared_prefix(1, prefix), theta)
    assert one_pair(block) is Regime.IDEAL
    if prefix == 100:
        assert one_pair(block, 1.03, 1.0) is Regime.BOTH_UP
        assert one_pair(block, 0.97, 1.0) is Regime.BOTH_DOWN


PAIRS: list[tuple[str, LogProb, LogProb, Tensor]] = [
    ("one token", one_token(0), one_token(1), torch.tensor([1.0, 0.5, -0.2, 2.0, 0.0], dtype=torch.float64)),
    ("prefix", shared_prefix(0, 4), shared_prefix(1, 4), torch.zeros(10, dtype=torch.float64)),
    *((f"suffix {t}", shared_suffix(0, t, 0.9), shared_suffix(1, t, 0.6), ZERO) for t in (3, 4, 5, 8)),
]


@pytest.mark.parametrize(("chosen", "rejected", "theta"), [p[1:] for p in PAIRS], ids=[p[0] for p in PAIRS])
def test_a_real_step_goes_where_the_prediction_says_with_second_order_error(chosen, rejected, theta):
    """Error of the prediction falls by 4 when the step is halved; the signs agree."""
    logps = chosen(theta)[None], rejected(theta)[None]
    length = torch.ones(1, dtype=torch.float64)
    d = DPO(beta=1.0).incentives(PairLogps(*logps, length, length, *logps))
    prediction = predict(geometry(chosen, rejected, theta), d)
    direction = d.chosen * score(chosen, theta) - d.rejected * score(rejected, theta)

    def error(rate: float, logp: LogProb, change: Tensor) -> float:
        measured = (logp(theta + rate * direction) - logp(theta)).item()
        assert math.copysign(1, measured) == math.copysign(1, change.item())
        return measured - rate * change.item()

    for logp, change in ((chosen, prediction.change_chosen), (rejected, prediction.change_rejected)):
        assert 3.8 < error(1e-3, logp, change) / error(5e-4, logp, change) < 4.2


def test_critical_weights_are_the_borders_of_the_ideal_regime():
    """A = 1, B = 8.5, c = 1.5, base .05: an NLL weight in (.025, .2333) makes the pair ideal."""
    one = torch.ones(1, dtype=torch.float64)
    block = PairGeometry(one, 8.5 * one, 1.5 * one, -0.5 * one, 7 * one)
    lower, upper = critical_addition(block, 0.05 * one)
    assert (lower.item(), upper.item()) == pytest.approx((0.025, 0.05 * 4.6666666667), abs=1e-9)
    for weight, regime in [(0.024, "both_down"), (0.026, "ideal"), (0.233, "ideal"), (0.234, "both_up")]:
        assert one_pair(block, 0.05 + weight, 0.05) == regime
    lower, upper = critical_shift(block)
    assert (lower.item(), upper.item()) == pytest.approx((1.5 / 8.5, 1 / 1.5), abs=1e-12)
    for shift, side in itertools.product([lower.item(), upper.item()], [-1, 1]):
        inside = (shift == lower.item()) == (side == 1)
        assert (one_pair(block, 1.0, shift * (1 + 1e-4 * side)) is Regime.IDEAL) == inside

"""Gram blocks: identities, fixtures worked out by hand, and digits where subtraction loses them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from entangle.analysis.geometry import GEOMETRY_COLUMNS, PairGeometry
from tests.toys import geometry, one_token, shared_prefix, shared_suffix


def values(block: PairGeometry) -> dict[str, float]:
    return {name: getattr(block, name).item() for name in GEOMETRY_COLUMNS}


def random_block(pairs: int = 500, size: int = 3) -> PairGeometry:
    return PairGeometry.from_scores(*torch.randn(2, pairs, size, dtype=torch.float64))


def test_one_softmax_token_has_the_closed_form():
    """T1: A = 1 - 2 p_w + |p|^2, c = |p|^2 - p_w - p_l, to 1e-9."""
    theta = torch.tensor([1.0, 0.5, -0.2, 2.0, 0.0], dtype=torch.float64)
    block = values(geometry(one_token(0), one_token(1), theta))
    expected = {
        "sq_chosen": 0.9597101895,
        "sq_rejected": 1.1172906105,
        "inner": 0.0385004000,
        "gap_chosen": 0.9212097895,
        "gap_rejected": 1.0787902105,
    }
    assert block == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("prefix", [1, 10, 100])
def test_shared_prefix_has_the_closed_form(prefix: int):
    """T2 with every probability 1/2: A = B = (n + 1) / 2, c = (n - 1) / 2, A - c = 1."""
    theta = torch.zeros(2 * (prefix + 1), dtype=torch.float64)
    block = geometry(shared_prefix(0, prefix), shared_prefix(1, prefix), theta)
    square, inner = (prefix + 1) / 2, (prefix - 1) / 2
    expected = [square, square, inner, 1.0, 1.0]
    assert list(values(block).values()) == pytest.approx(expected, abs=1e-12)
    assert block.cosine.item() == pytest.approx(inner / square, abs=1e-12)


def test_hundred_prefix_tokens_leave_a_band_of_two_percent():
    theta = torch.zeros(202, dtype=torch.float64)
    block = geometry(shared_prefix(0, 100), shared_prefix(1, 100), theta)
    assert block.cosine.item() == pytest.approx(0.980198, abs=1e-6)
    lower, upper = block.critical_ratio
    assert (lower.item(), upper.item()) == pytest.approx((0.980198, 1.020202), abs=1e-6)


@pytest.mark.parametrize(
    ("suffix", "sq_chosen", "sq_rejected", "inner", "gap_chosen"),
    [
        (3, 0.68, 3.38, 0.22, 0.46),
        (4, 0.82, 5.62, 0.78, 0.04),
        (5, 1.0, 8.5, 1.5, -0.5),
        (8, 1.78, 20.98, 4.62, -2.84),
    ],
)
def test_shared_suffix_has_the_closed_form(suffix, sq_chosen, sq_rejected, inner, gap_chosen):
    """T3, p = .9, q = .6: A = 1/2 + 2 T^2 (1-p)^2, c = -1/2 + 2 T^2 (1-p)(1-q)."""
    theta = torch.zeros(4, dtype=torch.float64)
    block = geometry(shared_suffix(0, suffix, 0.9), shared_suffix(1, suffix, 0.6), theta)
    expected = [sq_chosen, sq_rejected, inner, gap_chosen, sq_rejected - inner]
    assert list(values(block).values()) == pytest.approx(expected, abs=1e-9)


def test_suffix_of_five_has_the_band_worked_out_by_hand():
    theta = torch.zeros(4, dtype=torch.float64)
    block = geometry(shared_suffix(0, 5, 0.9), shared_suffix(1, 5, 0.6), theta)
    assert block.cosine.item() == pytest.approx(1.5 / math.sqrt(8.5), abs=1e-12)
    assert block.norm_ratio.item() == pytest.approx(2.9154759474, abs=1e-9)
    lower, upper = block.critical_ratio
    assert (lower.item(), upper.item()) == pytest.approx((1.5, 8.5 / 1.5), abs=1e-9)


def test_band_is_centred_on_the_norm_ratio_with_half_width_minus_log_cosine():
    block = random_block()
    block = block[block.inner > 0]
    lower, upper = block.log_band
    assert_close((lower + upper) / 2, block.norm_ratio.log(), rtol=0, atol=1e-12)
    assert_close((upper - lower) / 2, -block.cosine.log(), rtol=0, atol=1e-12)


def test_cauchy_schwarz_keeps_the_band_open_unless_parallel():
    block = random_block()
    assert (block.inner**2 <= block.sq_chosen * block.sq_rejected * (1 + 1e-12)).all()
    assert not block.is_parallel.any()
    scores = torch.randn(20, 5, dtype=torch.float64)
    assert PairGeometry.from_scores(scores, 3 * scores).is_parallel.all()


def test_band_is_unbounded_where_the_inner_product_is_negative():
    block = random_block()
    lower, upper = block[block.inner <= 0].critical_ratio
    assert len(lower) and (lower == 0).all() and torch.isposinf(upper).all()


def test_identical_scores_have_no_gap():
    scores = torch.randn(4, 7, dtype=torch.float64)
    block = PairGeometry.from_scores(scores, scores)
    assert (block.gap_chosen == 0).all() and (block.gap_rejected == 0).all()
    assert_close(block.sq_chosen, block.inner)


def test_disjoint_parameter_blocks_are_orthogonal():
    chosen, rejected = torch.randn(2, 4, 6, dtype=torch.float64)
    chosen[:, :3], rejected[:, 3:] = 0, 0
    assert (PairGeometry.from_scores(chosen, rejected).inner == 0).all()


def test_scaling_the_parameters_changes_no_ratio():
    chosen, rejected = torch.randn(2, 50, 6, dtype=torch.float64)
    block, scaled = (
        PairGeometry.from_scores(chosen, rejected),
        PairGeometry.from_scores(7 * chosen, 7 * rejected),
    )
    assert_close(scaled.sq_chosen, 49 * block.sq_chosen)
    assert_close(scaled.cosine, block.cosine)
    assert_close(scaled.norm_ratio, block.norm_ratio)
    order = torch.randperm(6)
    assert_close(PairGeometry.from_scores(chosen[:, order], rejected[:, order]).inner, block.inner)


def test_difference_form_keeps_the_sign_that_float32_subtraction_loses():
    """Nearly parallel float32 scores of 2e6 entries: A - c of two float32 dots is noise, <g, g - h> is not."""
    generator = torch.Generator().manual_seed(3)
    chosen = torch.randn(2_000_000, generator=generator)
    rejected = chosen + 1e-4 * torch.randn(2_000_000, generator=generator)
    exact = (chosen.double() * (chosen.double() - rejected.double())).sum().item()
    block = PairGeometry.from_scores(chosen[None], rejected[None])
    assert block.gap_chosen.item() == pytest.approx(exact, rel=1e-9)
    subtracted = (torch.dot(chosen, chosen) - torch.dot(chosen, rejected)).item()
    assert abs(subtracted - exact) > 100 * abs(block.gap_chosen.item() - exact)


def test_fields_of_different_shape_are_refused():
    good = torch.ones(4)
    with pytest.raises(ValueError, match="must share one shape"):
        PairGeometry(good, good, good, good, torch.ones(4, 1))


def test_non_finite_pairs_are_told_from_finite_ones():
    scores = torch.ones(2, 3)
    broken = scores.clone()
    broken[1, 0] = torch.nan
    assert PairGeometry.from_scores(scores, broken).is_finite.tolist() == [True, False]

"""The set's block: unbiased, its intervals cover, and its laws hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from scipy import stats
from torch import Tensor

from entangle.analysis.geometry import PairGeometry
from entangle.analysis.jackknife import Jackknife, assign_groups
from entangle.analysis.regimes import Regime, predict
from entangle.analysis.sets import SetGeometry, by_kind, drift, sums_of_gram
from losses import Incentives

CHOSEN_MEAN = torch.tensor([1.0, 0.3, 0.0, 0.0]).double()
REJECTED_MEAN = torch.tensor([0.8, 0.0, 0.4, 0.0]).double()
U_WW, U_WL, U_LL = 1.09, 0.8, 0.8
"""Their products."""


def draw(
    pairs: int, noise: float, seed: int, *, dims: int = 24, per_prompt: int = 1
) -> tuple[Tensor, list[str]]:
    """Scores `(2N, dims)` about these means, and prompts; pairs of a prompt share half of their noise's variance."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.stack([CHOSEN_MEAN, REJECTED_MEAN])[:, None]
    own = torch.randn(2, pairs, dims, generator=generator).double()
    prompts = torch.arange(pairs) // per_prompt
    shared = torch.randn(2, pairs, dims, generator=generator).double()[:, prompts]
    scores = noise * (own if per_prompt == 1 else (own + shared) / 2**0.5)
    scores[..., :4] += mean
    return scores.reshape(2 * pairs, dims), [str(prompt) for prompt in prompts.tolist()]


def set_of(
    scores: Tensor, prompts: Sequence[str], groups: int = 12, weights: Tensor | None = None
) -> SetGeometry:
    return SetGeometry.from_sums(
        sums_of_gram(scores @ scores.T, assign_groups(prompts, groups)[0], prompts, weights=weights)
    )


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_is_the_mean_of_the_gram_matrix_over_different_prompts(per_prompt: int) -> None:
    scores, prompts = draw(18, 1.0, seed=0, per_prompt=per_prompt)
    found, gram = set_of(scores, prompts), (scores @ scores.T).view(2, 18, 2, 18)
    same = torch.tensor([[a == b for b in prompts] for a in prompts])
    for i, j in ((0, 0), (0, 1), (1, 1)):
        block = gram[i, :, j]
        assert found.products[i, j] == pytest.approx(float(block[~same].mean()), rel=1e-12)
        assert found.own[i, j] == pytest.approx(float(block[same].sum()) / 18, rel=1e-12)
        assert found.epoch().products[i, j] == pytest.approx(float(block.mean()), rel=1e-12)
    assert (found.pairs, found.prompts, found.pairs_per_prompt) == (18, 18 // per_prompt, per_prompt)
    assert found.epoch(40).products[0, 1] == pytest.approx(
        float(((40 - per_prompt) * found.products[0, 1] + found.own[0, 1]) / 40), rel=1e-12
    )


def test_a_replicate_is_the_set_without_a_group() -> None:
    scores, prompts = draw(18, 1.0, seed=0, per_prompt=3)
    groups, _ = assign_groups(prompts, 4)
    found = SetGeometry.from_sums(sums_of_gram(scores @ scores.T, groups, prompts))
    for group in range(4):
        kept = (groups != group).nonzero()[:, 0]
        rows = torch.cat([kept, kept + 18])
        left = set_of(scores[rows], [prompts[i] for i in kept.tolist()], groups=3)
        torch.testing.assert_close(found.replicates[group, 0], left.products, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.replicates[group, 1], left.own, rtol=1e-12, atol=1e-12)


def test_unknown_own_terms_leave_the_products_between_groups() -> None:
    """Unbiased all the same: only pairs of different groups count where a group's prompts came in several passes."""
    scores, prompts = draw(18, 1.0, seed=0)
    groups, _ = assign_groups(prompts, 3)
    sums = sums_of_gram(scores @ scores.T, groups, prompts)
    sums.own[:2] = torch.nan
    apart = groups[:, None] != groups
    apart |= (groups == 2)[:, None] & (groups == 2) & ~torch.eye(18, dtype=torch.bool)
    gram = (scores @ scores.T).view(2, 18, 2, 18)
    found = SetGeometry.from_sums(sums)
    assert found.products[0, 1] == pytest.approx(float(gram[0, :, 1][apart].mean()), rel=1e-12)
    assert found.own.isnan().all() and math.isfinite(found.inner.low)


@pytest.mark.parametrize(("per_prompt", "pairs"), [(1, 48), (3, 72)])
def test_unbiased_and_covering(per_prompt: int, pairs: int) -> None:
    """400 data sets: the means of U are right, and 95 % intervals hold the truth as often as they say."""
    truth = {
        "sq_chosen": U_WW,
        "inner": U_WL,
        "sq_rejected": U_LL,
        "cosine": U_WL / (U_WW * U_LL) ** 0.5,
        "norm_ratio": (U_LL / U_WW) ** 0.5,
        "lower": U_WL / U_WW,
        "upper": U_LL / U_WL,
        "drift": (U_WW - U_LL) / (2 * (U_WW - 2 * U_WL + U_LL)),
        "up": U_WW - 0.8 * U_WL,
    }
    held, values = dict.fromkeys(truth, 0), []
    for seed in range(400):
        found = set_of(*draw(pairs, 0.5, seed, per_prompt=per_prompt))
        lower, upper = found.band
        numbers = {name: getattr(found, name) for name in list(truth)[:5]}
        numbers |= {
            "lower": lower,
            "upper": upper,
            "drift": found.move(1.0, 1.0).drift,
            "up": found.move(1.0, 0.8).chosen,
        }
        values.append(found.products)
        for name, number in numbers.items():
            held[name] += number.low <= truth[name] <= number.high
    values = torch.stack(values)
    error = values.std(0) / 400**0.5
    assert ((values.mean(0) - torch.tensor([[U_WW, U_WL], [U_WL, U_LL]])).abs() < 3 * error).all()
    for name, count in held.items():
        most = 1.0 if name in ("drift", "lower", "upper") else 0.985  # Fieller's may be the whole line
        assert 0.92 <= count / 400 <= most, (name, count / 400)


def test_pairs_of_one_prompt_dont_count_as_independent() -> None:
    """What goes wrong otherwise: own terms of prompts bias U upwards, and intervals are too short."""
    off, held = [], 0
    for seed in range(100):
        scores, _ = draw(72, 1.0, seed, per_prompt=3)
        found = set_of(scores, [str(i) for i in range(72)]).sq_chosen
        off.append(found.value - U_WW)
        held += found.low <= U_WW <= found.high
    assert sum(off) / 100 > 0.2 and held < 90


@pytest.mark.parametrize(("noise", "pairs"), [(0.6, 16), (0.8, 24)])
def test_too_few_pairs_are_said_to_be_and_how_many_would_do(noise: float, pairs: int) -> None:
    """With as many as are asked for, most intervals have a meaning; with as few as were there, most had none."""
    asked, meant = [], 0
    for seed in range(60):
        found = set_of(*draw(pairs, noise, seed)).move(1.0, 1.0).drift
        meant += found.has_meaning
        if not found.has_meaning and found.pairs_needed is not None:
            assert found.low == -math.inf or found.low < -0.5 < 0.5 < found.high
            assert found.pairs_needed > pairs
            asked.append(found.pairs_needed)
    assert meant < 30
    enough = sorted(asked)[len(asked) // 2]
    later = sum(
        set_of(*draw(enough, noise, 1000 + seed)).move(1.0, 1.0).drift.has_meaning for seed in range(30)
    )
    assert later / 30 > max(0.5, meant / 60 + 0.2), (enough, later / 30, meant / 60)


def test_exact_for_incentives_that_differ() -> None:
    """A direction of its own: mean over i, j of different prompts of <S_wi, d_wj S_wj - d_lj S_lj>."""
    scores, prompts = draw(18, 1.0, seed=0, per_prompt=2)
    incentives = torch.rand(2, 18, generator=torch.Generator().manual_seed(1)).double()
    weights = torch.cat([incentives[0], -incentives[1]])[None]
    found = set_of(scores, prompts, weights=weights)
    gram = (scores @ scores.T).view(2, 18, 2, 18)
    apart = torch.tensor([[a != b for b in prompts] for a in prompts])
    moved = gram[:, :, 0] * incentives[0] - gram[:, :, 1] * incentives[1]  # (side, i, j)
    move = found.move_along(2)
    assert move.chosen.value == pytest.approx(float(moved[0][apart].mean()), rel=1e-12)
    assert move.rejected.value == pytest.approx(float(moved[1][apart].mean()), rel=1e-12)
    common = (move.chosen.value + move.rejected.value) / 2
    assert move.drift.value == pytest.approx(common / move.margin.value, rel=1e-12)


def test_equal_incentives_along_a_direction_are_equal_incentives() -> None:
    scores, prompts = draw(18, 1.0, seed=0)
    weights = torch.cat([torch.full((18,), 0.7), torch.full((18,), -0.4)])[None]
    found = set_of(scores, prompts, weights=weights)
    one, other = found.move(0.7, 0.4), found.move_along(2)
    for name in ("chosen", "rejected", "margin", "drift"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), rel=1e-6)


def test_drift_and_regime_agree() -> None:
    """20 000 random blocks and incentives of any sign: where a margin is gained, |drift| < 1/2 iff ideal, and so on."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(20_000, 2, 3, generator=generator).double()
    geometry = PairGeometry.from_scores(vectors[:, 0], vectors[:, 1])
    incentives = Incentives(*torch.randn(2, 20_000, generator=generator).double())
    gram = vectors @ vectors.transpose(1, 2)
    found = drift(
        incentives.chosen, incentives.rejected, torch.stack([gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]], 1)
    )
    prediction = predict(geometry, incentives)
    regimes = [str(regime) for regime in prediction.regimes]
    assert (found.isnan() == (prediction.margin_change <= 0)).all()
    seen = set()
    for value, regime in zip(found.tolist(), regimes, strict=True):
        if not math.isnan(value) and regime != Regime.DEGENERATE:
            expected = Regime.BOTH_UP if value > 0.5 else Regime.BOTH_DOWN if value < -0.5 else Regime.IDEAL
            assert regime == expected
            seen.add(regime)
    assert seen == {"ideal", "both_up", "both_down"}


def test_laws_of_drift() -> None:
    block = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)).double() + torch.tensor(
        [1.0, 0.0, 1.0]
    )
    one = torch.ones(50).double()
    sq_chosen, inner, sq_rejected = block.unbind(1)
    equal = (sq_chosen - sq_rejected) / (2 * (sq_chosen - 2 * inner + sq_rejected))
    torch.testing.assert_close(drift(one, one, block), equal, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(drift(3 * one, 3 * one, 5 * block), equal, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(drift(one, one, block[:, [2, 1, 0]]), -equal, rtol=1e-12, atol=1e-12)
    # identical sides: no margin; opposite sides: ideal and nothing in common
    assert drift(one[0], one[0], torch.tensor([1.0, 1.0, 1.0]).double()).isnan()
    assert drift(one[0], one[0], torch.tensor([2.0, -2.0, 2.0]).double()) == 0
    # chosen pushes alone: both rise by U_ww and U_wl
    assert drift(one[0], 0 * one[0], torch.tensor([2.0, 1.0, 9.0]).double()) == 1.5


def test_scale_doesnt_matter() -> None:
    """Scores in other units, incentives in others: cosine, ratios, drift and regime stay."""
    scores, prompts = draw(36, 0.5, seed=3)
    one, other = set_of(scores, prompts), set_of(7 * scores, prompts)
    for a, b in (
        (one.cosine, other.cosine),
        (one.norm_ratio, other.norm_ratio),
        (one.band[0], other.band[0]),
        (one.move(1.0, 0.9).drift, other.move(0.2, 0.18).drift),
    ):
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), rel=1e-9)
    assert one.move(1.0, 0.9).regime == other.move(0.2, 0.18).regime


def test_one_pair_is_no_set() -> None:
    """Nothing is known, and nothing is claimed."""
    found = set_of(*draw(1, 1.0, seed=0))
    assert found.products.isnan().all() and (found.pairs, found.prompts) == (1, 1)
    move = found.move(1.0, 1.0)
    for number in (found.sq_chosen, found.cosine, found.norm_ratio, *found.band, move.drift):
        assert math.isnan(number.value) and not number.has_meaning and number.pairs_needed is None
    assert (found.cosine.low, found.cosine.high) == (-1, 1)
    assert move.regime == Regime.DEGENERATE and not move.is_certain and found.may_be_parallel


def test_parallel_means_are_never_a_fact() -> None:
    """Sides with one mean: U may break Cauchy's inequality, a cosine stays within 1, and nobody claims to know."""
    above = 0
    for seed in range(40):
        scores, prompts = draw(24, 0.4, seed)
        scores[24:, :4] += CHOSEN_MEAN - REJECTED_MEAN
        found = set_of(scores, prompts)
        above += float(found.products[0, 1] ** 2 / found.products[0, 0] / found.products[1, 1]) > 1
        assert found.cosine.value <= 1 and found.cosine.high <= 1
        lower, upper = found.band
        assert found.may_be_parallel or lower.value < upper.value
        assert found.may_be_parallel or found.cosine.high < 1
    assert above > 10
    identical = set_of(
        *[part[[*range(24), *range(24)]] if isinstance(part, Tensor) else part for part in draw(24, 0.4, 0)]
    )
    assert identical.may_be_parallel and identical.move(1.0, 1.0).regime == Regime.DEGENERATE


def test_opposite_sides() -> None:
    """Every ratio is ideal: the band is (0, inf), and both moves are what each side wants."""
    scores, prompts = draw(48, 0.3, seed=0)
    scores = torch.cat([scores[:48], -scores[:48]])
    found = set_of(scores, prompts)
    lower, upper = found.band
    assert (lower.value, lower.high, upper.value, upper.low) == (0, 0, math.inf, math.inf)
    move = found.move(1.0, 3.0)
    assert move.regime == Regime.IDEAL and move.is_certain and found.cosine.value == pytest.approx(-1)


def test_a_loss_that_gains_no_margin_has_no_drift() -> None:
    scores, prompts = draw(48, 0.3, seed=0)
    move = set_of(scores, prompts).move(-1.0, -1.0)
    assert math.isnan(move.drift.value) and move.drift.low == -math.inf and move.regime != Regime.IDEAL
    assert move.margin.high < 0 or not move.margin.excludes_zero


def test_kinds_on_kinds() -> None:
    """(a, b) holds mean products of a's pairs with b's, of different prompts; the kinds' mixture is the whole."""
    scores, prompts = draw(30, 1.0, seed=0)
    kinds = ["x" if i < 20 else "y" for i in range(30)]
    groups, names = assign_groups(prompts, 6, kinds)
    assert sorted(names) == ["x"] * 4 + ["y"] * 2
    sums, gram = sums_of_gram(scores @ scores.T, groups, prompts), (scores @ scores.T).view(2, 30, 2, 30)
    found = by_kind(sums, names)
    x, y, apart = slice(0, 20), slice(20, 30), ~torch.eye(30, dtype=torch.bool)
    assert found["x", "y"].products[0, 1] == pytest.approx(float(gram[0, x, 1, y].mean()), rel=1e-12)
    assert found["y", "x"].products[0, 1] == pytest.approx(float(gram[0, y, 1, x].mean()), rel=1e-12)
    assert found["x", "x"].products[0, 1] == pytest.approx(
        float(gram[0, :, 1][x, x][apart[x, x]].mean()), rel=1e-12
    )
    assert (found["x", "y"].pairs, found["y", "x"].pairs) == (20, 10)
    assert len(found["x", "y"].jackknife.weights) == 6 and len(found["y", "y"].jackknife.weights) == 2
    whole = SetGeometry.from_sums(sums, names)
    mixed = (
        380 * found["x", "x"].products + 400 * (found["x", "y"].products + found["x", "y"].products.T) / 1
    ) / 1
    mixed = (380 * found["x", "x"].products + 200 * (found["x", "y"].products + found["y", "x"].products)) + (
        90 * found["y", "y"].products
    )
    torch.testing.assert_close(mixed / (30 * 29), whole.products, rtol=1e-12, atol=1e-12)


def test_kinds_are_strata() -> None:
    """Kinds whose means differ don't widen the interval: their mixture isn't a matter of chance."""
    held, widths = 0, []
    for seed in range(200):
        scores, prompts = draw(48, 0.4, seed)
        kinds = ["x" if i < 32 else "y" for i in range(48)]
        scores.view(2, 48, -1)[:, 32:, :4] *= 3
        groups, names = assign_groups(prompts, 12, kinds)
        found = SetGeometry.from_sums(sums_of_gram(scores @ scores.T, groups, prompts), names).sq_chosen
        plain = SetGeometry.from_sums(sums_of_gram(scores @ scores.T, groups, prompts)).sq_chosen
        # over pairs i != j of a fixed mixture: 32 of mean m, 16 of mean 3 m
        truth = U_WW * (32 * 31 + 2 * 32 * 16 * 3 + 16 * 15 * 9) / (48 * 47)
        held += found.low <= truth <= found.high
        widths.append((found.high - found.low) / (plain.high - plain.low))
    assert 0.92 <= held / 200 <= 0.985 and sum(widths) / 200 < 0.65


def test_groups_are_balanced_and_depend_on_prompts_alone() -> None:
    prompts = [f"prompt {i // 2}" for i in range(64)]
    groups, names = assign_groups(prompts, 16)
    assert torch.bincount(groups).tolist() == [4] * 16 and names == ("",) * 16
    assert all(groups[2 * i] == groups[2 * i + 1] for i in range(32))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    moved, _ = assign_groups([prompts[i] for i in order.tolist()], 16)
    assert torch.equal(moved, groups[order])
    assert torch.bincount(assign_groups(prompts[:6], 16)[0]).tolist() == [2, 2, 2]
    mixed, kinds = assign_groups(["a", "a", "b", "c"], 4, ["x", "y", "x", "y"])
    assert set(kinds) == {"mixed", "x", "y"} and mixed[0] == mixed[1]


def test_of_a_mean_it_is_the_textbook() -> None:
    """Groups of one: the standard error of a mean, Student's quantile."""
    values = torch.randn(9, generator=torch.Generator().manual_seed(0)).double()
    jackknife = Jackknife(torch.ones(9, dtype=torch.int64))
    replicates = (values.sum() - values) / 8
    found = jackknife.number(float(values.mean()), replicates)
    low, high = stats.t.interval(0.95, 8, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    lonely = Jackknife(torch.tensor([3, 0, 0, 2, 2]), ("a", "a", "b", "b", "b"))
    assert len(lonely.strata) == 1 and len(lonely.weights) == 3  # a's only group is counted among b's
    strata = Jackknife(torch.ones(9, dtype=torch.int64), tuple("xxxyyyyyy"))
    assert strata.quantile(torch.tensor([1.0, 0.0])) == pytest.approx(stats.t.ppf(0.975, 2))
    assert strata.quantile(torch.tensor([1.0, 1.0])) == pytest.approx(stats.t.ppf(0.975, 4 / (1 / 2 + 1 / 5)))


def test_pairs_that_a_ratio_needs_follow_its_half_width() -> None:
    """Where the denominator is well known Fieller's interval is symmetric; then N (half-width / target)^2."""
    common = torch.randn(16, generator=torch.Generator().manual_seed(0)).double()
    values = torch.stack([3 + 0.1 * common, 2 + 0.08 * common + 0.01 * common.flip(0)], 1)
    jackknife = Jackknife(torch.ones(16, dtype=torch.int64))
    top, bottom = values.mean(0).tolist()
    found = jackknife.ratio(
        top, bottom, (values.sum(0) - values) / 15, target=1e-3, rules_out=lambda low, high: False
    )
    half = (found.high - found.low) / 2
    assert found.pairs_needed == pytest.approx(16 * (half / 1e-3) ** 2, rel=0.02)

"""Each mitigation keeps the law that theory gives for it, as pure mathematics and in real steps of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from entangle.analysis.geometry import PairGeometry
from entangle.analysis.mitigations import (
    MITIGATIONS,
    PairwiseNormalised,
    RewardCalibration,
    Select,
    Sequential,
    TokenMasking,
    Vector,
    VirtualSplitting,
    backward_scaled,
    build_mitigation,
    kept_tokens,
    select_pairs,
)
from entangle.errors import ConfigError
from entangle.training.virtual_adamw import VirtualAdamW
from losses import Incentives
from tests import tiny

PAIRS = 200


def scores() -> tuple[Tensor, Tensor]:
    """Random scores of pairs with every sign of the inner product; the last pair's are parallel."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(PAIRS, 7, generator=generator, dtype=torch.float64)
    mix = torch.linspace(-2, 2, PAIRS, dtype=torch.float64)[:, None]
    chosen = torch.randn(PAIRS, 7, generator=generator, dtype=torch.float64) + shared
    rejected = torch.randn(PAIRS, 7, generator=generator, dtype=torch.float64) * 3 + mix * shared
    rejected[-1] = 2.5 * chosen[-1]
    return chosen, rejected


def incentives(equal: bool) -> Incentives:
    """Positive incentives of very different sizes."""
    generator = torch.Generator().manual_seed(2)
    chosen = torch.rand(PAIRS, generator=generator, dtype=torch.float64) + 0.01
    return Incentives(
        chosen, chosen if equal else 3 * torch.rand(PAIRS, generator=generator, dtype=torch.float64) + 0.01
    )


def changes(factors: tuple[Tensor, Tensor], d: Incentives) -> tuple[Tensor, Tensor]:
    """(dw, dl) of each pair's own step of size 1 along a_w d_w g_w - a_l d_l g_l."""
    g_w, g_l = scores()
    step = (factors[0] * d.chosen)[:, None] * g_w - (factors[1] * d.rejected)[:, None] * g_l
    return (g_w * step).sum(1), (g_l * step).sum(1)


def test_pairwise_normalised_gradients_make_every_pair_ideal():
    geometry, d = PairGeometry.from_scores(*scores()), incentives(equal=True)
    norms = geometry.sq_chosen.sqrt(), geometry.sq_rejected.sqrt()
    chosen, rejected = changes(PairwiseNormalised().factors(d, *norms, {}), d)
    apart = 1 - geometry.cosine
    torch.testing.assert_close(chosen, d.chosen * norms[0] * apart, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rejected, -d.chosen * norms[1] * apart, rtol=1e-10, atol=1e-12)
    assert bool((chosen[:-1] > 0).all()) and bool((rejected[:-1] < 0).all())
    plain = changes((torch.ones(PAIRS), torch.ones(PAIRS)), d)
    assert bool((plain[0][:-1] < 0).any())  # without it some chosen log-probs fall


def test_reward_calibration_makes_every_pair_ideal_whatever_the_loss():
    geometry, d = PairGeometry.from_scores(*scores()), incentives(equal=False)
    norms = geometry.sq_chosen.sqrt(), geometry.sq_rejected.sqrt()
    a_w, a_l = RewardCalibration().factors(d, *norms, {})
    torch.testing.assert_close(a_w * d.chosen * a_l * d.rejected, d.chosen * d.rejected)
    torch.testing.assert_close(a_w * d.chosen / (a_l * d.rejected), geometry.norm_ratio)
    size = (d.chosen * d.rejected).sqrt() * (geometry.sq_chosen * geometry.sq_rejected) ** 0.25
    size = size * (1 - geometry.cosine)
    chosen, rejected = changes((a_w, a_l), d)
    torch.testing.assert_close(chosen, size * norms[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rejected, -size * norms[1], rtol=1e-9, atol=1e-12)


def test_reward_calibration_leaves_pairs_without_a_ratio_alone():
    d = Incentives(torch.tensor([0.0, -1.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0]))
    norms = torch.tensor([1.0, 1.0, 1.0, 0.0, 4.0]), torch.ones(5)
    for norm in ("pair", "ema"):
        a_w, a_l = RewardCalibration(norms=norm).factors(d, *norms, {})
        assert a_w.tolist() == pytest.approx([1, 1, 1, 1, 0.5])
        assert a_l.tolist() == pytest.approx([1, 1, 1, 1, 2.0])


def test_moving_average_of_logs_of_batch_means():
    rule, state = RewardCalibration(norms="ema", decay=0.9), {}
    ones = Incentives(torch.ones(2), torch.ones(2))
    expected = None
    for mean in (2.0, 8.0, 3.0):
        log_ratio = np.log(mean)
        expected = log_ratio if expected is None else 0.9 * expected + 0.1 * log_ratio
        a_w, _ = rule.factors(ones, torch.ones(2), torch.tensor([mean - 1, mean + 1]), state)
        assert a_w.tolist() == pytest.approx([np.exp(expected / 2)] * 2)


def test_scaling_backward_leaves_the_forward_value():
    value = torch.randn(6, requires_grad=True)
    factor = torch.tensor([0.0, 1.0, 3.0, 1e8, 0.5, 2.0])
    scaled = backward_scaled(value, factor)
    assert torch.equal(scaled, value)
    scaled.sum().backward()
    torch.testing.assert_close(value.grad, factor)


def test_masks_drop_the_largest_positive_contributions():
    contributions = torch.tensor([3.0, -1.0, 5.0, 0.5, 0.0])
    assert kept_tokens(contributions, 0.4).tolist() == [False, True, False, True, True]
    assert kept_tokens(contributions, 0.99).tolist() == [False, True, False, False, True]
    assert kept_tokens(torch.tensor([2.0]), 0.9).tolist() == [True]
    assert TokenMasking(max_share=0.6, rounds=3).shares() == pytest.approx([0.2, 0.4, 0.6])


# --- split steps on a real transformer ----------------------------------------------------------------------


class Halves:
    """L = L+ + L- of two pairs under a tiny Llama in float64, as functions of its parameters."""

    def __init__(self) -> None:
        self.model = tiny.llama(layers=1).double()
        self.model.config._attn_implementation = "eager"
        self.names = [name for name, _ in self.model.named_parameters()]
        self.theta: Vector = [p.detach().clone() for p in self.model.parameters()]
        generator = torch.Generator().manual_seed(3)
        self.rows = torch.randint(3, 300, (4, 9), generator=generator)
        self.weights = torch.tensor([0.7, 1.3], dtype=torch.float64)

    def half(self, side: str, theta: Vector) -> Tensor:
        """L+ = -sum d_w w, or -L- = -sum d_l l: the functions whose gradients are g+ and g-."""
        rows = self.rows[:2] if side == "chosen" else self.rows[2:]
        output = functional_call(self.model, dict(zip(self.names, theta, strict=True)), (rows,))
        logps = output.logits[:, 3:-1].log_softmax(-1).gather(2, rows[:, 4:, None])[..., 0].sum(1)
        return -(self.weights * logps).sum() / 8

    def gradient(self, side: str, displacement: Vector | None = None) -> Vector:
        """G+ or g- at theta + displacement."""
        moved = (
            self.theta
            if displacement is None
            else [p + d for p, d in zip(self.theta, displacement, strict=True)]
        )
        leaves = [p.detach().requires_grad_() for p in moved]
        return list(torch.autograd.grad(self.half(side, leaves), leaves))

    def second(self, side: str, along: Vector) -> Vector:
        """(Jacobian of g+ or g-) times a direction; it is symmetric."""
        leaves = [p.detach().requires_grad_() for p in self.theta]
        grads = torch.autograd.grad(self.half(side, leaves), leaves, create_graph=True)
        return list(
            torch.autograd.grad(sum((g * v).sum() for g, v in zip(grads, along, strict=True)), leaves)
        )


@pytest.fixture(scope="module")
def halves() -> Halves:
    return Halves()


def total(halves: Halves) -> Vector:
    plus, minus = halves.gradient("chosen"), halves.gradient("rejected")
    return [p - m for p, m in zip(plus, minus, strict=True)]


def distance(first: Vector, second: Vector) -> float:
    return sum(float(((a - b) ** 2).sum()) for a, b in zip(first, second, strict=True)) ** 0.5


def split_error(halves: Halves, order: str, rate: float) -> float:
    """|theta_seq - (theta_agg + the law's correction)|."""
    plus, minus = halves.gradient("chosen"), halves.gradient("rejected")
    both = total(halves)
    minus_along = partial(halves.second, "rejected")
    correction = {
        "chosen_first": lambda: [-x for x in minus_along(plus)],
        "rejected_first": lambda: [-x for x in halves.second("chosen", minus)],
        "both": lambda: [
            -0.5 * (x + y) for x, y in zip(minus_along(plus), halves.second("chosen", minus), strict=True)
        ],
    }
    law = [-rate * g + rate**2 * x for g, x in zip(both, correction[order](), strict=True)]
    step = Sequential(order=order).step_gradient(both, halves.gradient, rate, Random(0))
    return distance([-rate * g for g in step], law)


@pytest.mark.parametrize("order", ["chosen_first", "rejected_first", "both"])
def test_sequential_step_is_the_aggregate_one_plus_its_second_order(order: str, halves: Halves):
    """Remainder O(h^3): halving h divides it by 8."""
    errors = [split_error(halves, order, rate) for rate in (0.04, 0.02, 0.01)]
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert ratios == pytest.approx([8, 8], rel=0.12)


def test_sequential_step_by_hand(halves: Halves):
    """chosen_first is theta1 = theta - h g+, then theta1 + h g-(theta1); half steps are that with h/2."""
    both = total(halves)
    for half_steps, rate in ((False, 0.03), (True, 0.06)):
        h = rate / 2 if half_steps else rate
        first = [-h * g for g in halves.gradient("chosen")]
        second = [d + h * g for d, g in zip(first, halves.gradient("rejected", first), strict=True)]
        rule = Sequential(half_steps=half_steps)
        step = rule.step_gradient(both, halves.gradient, rate, Random(0))
        assert distance([-rate * g for g in step], second) < 1e-12 * distance(second, [0 * g for g in second])


def test_random_order_is_one_of_both(halves: Halves):
    both = total(halves)

    def run(order: str, seed: int = 0) -> Vector:
        return Sequential(order=order).step_gradient(both, halves.gradient, 0.05, Random(seed))

    fixed = [run("chosen_first"), run("rejected_first")]
    seen = {min((0, 1), key=lambda i: distance(fixed[i], run("random", seed))) for seed in range(6)}
    assert seen == {0, 1}
    assert min(distance(fixed[i], run("random", 1)) for i in (0, 1)) == 0


def test_virtual_stage_is_the_gradient_of_the_inner_product(halves: Halves):
    """q_stage = q + (k h / 2) grad<g+, g-> + O(h^2): halving h divides the remainder by 4."""
    plus, minus = halves.gradient("chosen"), halves.gradient("rejected")
    both = total(halves)
    inner = [
        x + y for x, y in zip(halves.second("chosen", minus), halves.second("rejected", plus), strict=True)
    ]
    errors = []
    for rate in (0.04, 0.02, 0.01):
        stage = VirtualSplitting(k=1.5).stage(both, halves.gradient, rate)
        errors.append(distance(stage, [q + 0.75 * rate * x for q, x in zip(both, inner, strict=True)]))
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([4, 4], rel=0.12)
    assert VirtualSplitting(k=0).stage(both, halves.gradient, 0.1) is both


def descend(make: Callable[[list[Tensor]], torch.optim.Optimizer], stage: bool = False) -> Vector:
    """Six steps on a fixed quadratic-and-quartic; with `stage`, the momentum gets twice the gradient."""
    generator = torch.Generator().manual_seed(5)
    points = [
        torch.randn(4, 3, generator=generator).requires_grad_(),
        torch.randn(5, generator=generator).requires_grad_(),
    ]
    optimizer = make(points)
    for _ in range(6):
        optimizer.zero_grad()
        sum((p**4 + 3 * p**2).sum() for p in points).backward()
        if stage:
            optimizer.stage = {p: 2 * p.grad for p in points}
        optimizer.step()
    return [p.detach() for p in points]


def test_virtual_adamw_without_a_stage_is_adamw_bit_for_bit():
    options = {"lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    ours = descend(partial(VirtualAdamW, **options))
    theirs = descend(partial(torch.optim.AdamW, foreach=False, **options))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_virtual_adamw_gives_the_stage_to_the_momentum_alone():
    """Without decay, twice the momentum over the same second moment is twice the learning rate at the first step."""
    points = torch.randn(5).requires_grad_()
    moved = {}
    for factor in (1.0, 2.0):
        copy = points.detach().clone().requires_grad_()
        optimizer = VirtualAdamW([copy], lr=0.01, weight_decay=0.0)
        (copy**2).sum().backward()
        optimizer.stage = {copy: factor * copy.grad}
        optimizer.step()
        assert not optimizer.stage
        moved[factor] = copy.detach() - points.detach()
    torch.testing.assert_close(moved[2.0], 2 * moved[1.0], rtol=1e-4, atol=1e-6)
    assert (
        distance(descend(partial(VirtualAdamW, lr=0.05), stage=True), descend(partial(VirtualAdamW, lr=0.05)))
        > 0
    )


# --- selection and the registry -----------------------------------------------------------------------------


def test_selection_keeps_the_least_risky_pairs():
    rows = pd.DataFrame(
        {
            "ches": [3.0, -1.0, np.nan, 0.0],
            "cosine": [0.9, 0.1, 0.5, np.nan],
            "gap": [-0.2, 0.4, 0.1, np.inf],
            "edit_distance": [0.1, 0.9, 0.5, 0.5],
        }
    )
    assert select_pairs(rows, Select(by="ches", share=0.5)).tolist() == [False, True, False, True]
    assert select_pairs(rows, Select(by="cosine", threshold=0.6)).tolist() == [False, True, True, False]
    assert select_pairs(rows, Select(by="gap", threshold=0.0)).tolist() == [False, True, True, False]
    assert select_pairs(rows, Select(by="edit_distance", share=0.5)).tolist() == [False, True, True, False]
    assert select_pairs(rows, Select(by="edit_distance", share=0.1)).sum() == 1


def test_every_mitigation_is_built_back_from_its_config():
    assert set(MITIGATIONS) == {
        "pairwise_normalised",
        "reward_calibration",
        "token_masking",
        "sequential",
        "virtual_splitting",
        "set_band",
        "drift_free",
        "select",
    }
    for name in MITIGATIONS:
        spec = {"name": name} | ({"share": 0.5} if name == "select" else {})
        built = build_mitigation(spec)
        assert build_mitigation(built.config) == built


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "Known mitigations: drift_free, pairwise_normalised"),
        ({"name": "sequential", "first": "chosen"}, "It has: order, half_steps"),
        ({"name": "sequential", "order": "chosen"}, "chosen_first"),
        ({"name": "reward_calibration", "decay": 1.0}, "decay"),
        ({"name": "token_masking", "max_share": 1.0}, "max_share"),
        ({"name": "select", "by": "ches"}, "either a share"),
        ({"name": "select", "by": "ches", "share": 0.5, "threshold": 0.0}, "either a share"),
        ({"name": "select", "by": "luck", "share": 0.5}, "edit_distance"),
    ],
)
def test_what_makes_no_sense_is_refused(spec: str | dict, message: str):
    with pytest.raises(ConfigError, match=message):
        build_mitigation(spec)

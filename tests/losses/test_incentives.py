"""Incentives by autograd: equal to the closed forms, to the parameters' gradient, and finite everywhere."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from losses import (
    CATALOGUE,
    CDPO,
    DDRO,
    DPO,
    IPO,
    APODown,
    DiscoPOP,
    EXOPair,
    IPOAverage,
    NCAPair,
    PairLogps,
    PreferenceLoss,
    TokenLogps,
)
from tests.closed_forms import CLOSED_FORMS, Numbers, closed_form
from tests.losses.cases import BATCHES, DEFAULTS, LOSSES, PAIR_LOSSES, TOKEN_LOSSES, label, token_batch

KINKS = {
    "hinge": lambda h, n: h.beta * n.D - 1,
    "simpo_hinge": lambda h, n: h.beta * n.mean_m - h.gamma - 1,
    "repo": lambda h, n: n.mean_m - h.gamma,
    "rrhf": lambda h, n: n.mean_m,
    "dpop": lambda h, n: n.rw,
    "minor_dpo": lambda h, n: n.rl,
    "bpo": lambda h, n: n.rw + h.gap_adaptor * n.rl,
    "cpo_hinge": lambda h, n: h.beta * (n.w - n.l) - 1,
    "slic": lambda h, n: n.w - n.l - h.delta,
    "ddro": lambda h, n: n.rl - math.log(2),
    "cdpo": lambda h, n: h.beta * n.D - math.log((1 - h.label_smoothing) / h.label_smoothing),
    "exo_pair": lambda h, n: h.beta * n.D - math.log((1 - h.label_smoothing) / h.label_smoothing),
    "ipo": lambda h, n: n.D - 1 / (2 * h.tau),
    "ipo_avg": lambda h, n: n.mean_D - 1 / (2 * h.tau),
    "nca_pair": lambda h, n: h.beta * n.rw - math.log(2),
    "sppo_hard": lambda h, n: n.rl + 1 / (2 * h.beta),
    "cal_dpo": lambda h, n: closed_form(h, n.batch)[1],
    "cpo_ipo": lambda h, n: n.mean_m - 1 / (2 * h.tau),
    "apo_down": lambda h, n: n.D.abs() - n.rw.abs(),
}
"""Signed distance from a loss's kink or sign change."""


RATIOS = {
    "1": lambda batch: (1.0, 1.0),
    "n_l/n_w": lambda batch: (batch.length_chosen, batch.length_rejected),
    "0": lambda batch: (1.0, 0.0),
    "infinite": lambda batch: (0.0, 1.0),
}
"""The ratios that need no loss's own quantities, as factors that make d_w and d_l equal."""


def test_every_loss_has_a_closed_form() -> None:
    assert CLOSED_FORMS.keys() == CATALOGUE.keys()


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("loss", LOSSES, ids=label)
def test_incentives_equal_the_closed_form(loss: PreferenceLoss, batch: PairLogps) -> None:
    """Float64; the worst of them loses five digits to cancellation near its own sign change (apo_down)."""
    found, (chosen, rejected) = loss.incentives(batch), closed_form(loss, batch)
    torch.testing.assert_close(found.chosen, chosen, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found.rejected, rejected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", KINKS)
def test_the_batches_reach_both_sides_of_every_kink(name: str) -> None:
    losses = [loss for loss in LOSSES if loss.name == name]
    numbers = [Numbers.of(batch) for batch in BATCHES.values()]
    distances = torch.cat([KINKS[name](loss, n) for loss in losses for n in numbers])
    assert distances.min() < 0 < distances.max()


@pytest.mark.parametrize("loss", LOSSES, ids=label)
def test_gradient_in_parameters_is_minus_incentives_times_scores(loss: PreferenceLoss) -> None:
    """Law: grad loss = -(d_w grad w - d_l grad l) in theta, for a nonlinear model of the log-probs."""
    batch = BATCHES["middle"]
    tokens = batch.by_token
    theta = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64, requires_grad=True)

    def model(logps: torch.Tensor, phase: float) -> torch.Tensor:
        places = torch.arange(logps.numel(), dtype=torch.float64).reshape(logps.shape) + phase
        return logps + (theta[0] * places).sin() * theta[1] + theta[2] * places.cos()

    chosen, rejected = model(tokens.chosen, 0.3), model(tokens.rejected, 1.7)
    moved = dataclasses.replace(tokens, chosen=chosen, rejected=rejected)
    pairs = moved.pairs(score_gap=batch.score_gap)
    (gradient,) = torch.autograd.grad(loss.per_pair(pairs).sum(), theta, retain_graph=True)
    incentives = loss.incentives(pairs)
    source = pairs.by_token if loss.needs_tokens else pairs
    weighted = (incentives.chosen * source.chosen).sum() - (incentives.rejected * source.rejected).sum()
    (expected,) = torch.autograd.grad(-weighted, theta)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=label)
def test_incentives_keep_shape_dtype_and_leave_no_graph(loss: PreferenceLoss) -> None:
    batch = token_batch(0.5, dtype=torch.float32)
    found = loss.incentives(batch)
    source = batch.by_token if loss.needs_tokens else batch
    assert (found.chosen.shape, found.rejected.shape) == (source.chosen.shape, source.rejected.shape)
    assert found.chosen.dtype == found.rejected.dtype == torch.float32
    assert not found.chosen.requires_grad and not found.rejected.requires_grad
    with torch.no_grad():
        assert torch.equal(loss.incentives(batch).chosen, found.chosen)


@pytest.mark.parametrize("loss", PAIR_LOSSES, ids=label)
def test_pair_losses_are_finite_out_to_log_ratios_of_500_nats(loss: PreferenceLoss) -> None:
    """Float32, the grid of log-ratios {-500 .. 500}^2, at lengths of 1 and of 500 tokens."""
    steps = torch.tensor([-500.0, -80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0, 500.0])
    chosen, rejected = (-520.0 + ratio for ratio in torch.cartesian_prod(steps, steps).unbind(1))
    for length in (1, 500):
        lengths = torch.full_like(chosen, length)
        reference = torch.full_like(chosen, -520.0)
        _assert_finite(loss, PairLogps(chosen, rejected, lengths, lengths, reference, reference))


@pytest.mark.parametrize("loss", TOKEN_LOSSES, ids=label)
def test_token_losses_are_finite_out_to_log_ratios_of_500_nats(loss: PreferenceLoss) -> None:
    steps = torch.tensor([-10.0, -1.0, 0.0, 1.0, 10.0])
    ratios = torch.cartesian_prod(steps, steps)[:, :, None].expand(-1, -1, 50)
    chosen, rejected = (ratios - 10.5).unbind(1)
    reference, ones = torch.full_like(chosen, -10.5), torch.ones_like(chosen)
    tokens = TokenLogps(
        chosen, rejected, ones, ones, reference, reference, -100 * ones, -0.1 * ones, 5 * ones, 0.0 * ones
    )
    _assert_finite(loss, tokens.pairs())


@pytest.mark.parametrize("loss", LOSSES, ids=label)
def test_finite_for_a_response_of_certain_tokens(loss: PreferenceLoss) -> None:
    """A log-prob of exactly zero (a sure answer in a small vocabulary) is an ordinary value in float32."""
    zeros, ones = torch.zeros(3, 4), torch.ones(3, 4)
    tokens = TokenLogps(zeros, zeros - 1, ones, ones, zeros, zeros, zeros, zeros, zeros, zeros)
    _assert_finite(loss, tokens.pairs())


def _assert_finite(loss: PreferenceLoss, batch: PairLogps) -> None:
    assert loss.per_pair(batch).isfinite().all()
    found = loss.incentives(batch)
    assert found.chosen.isfinite().all() and found.rejected.isfinite().all()


def _at_margin(loss: PreferenceLoss, ratio_chosen: float, ratio_rejected: float = 0.0) -> tuple[float, float]:
    """Incentives of one pair of one-token responses at given log-ratios."""
    ratios = torch.tensor([[ratio_chosen], [ratio_rejected]], dtype=torch.float64)
    reference, length = torch.tensor([-3000.0], dtype=torch.float64), torch.ones(1)
    batch = PairLogps(reference + ratios[0], reference + ratios[1], length, length, reference, reference)
    found = loss.incentives(batch)
    return found.chosen.item(), found.rejected.item()


@pytest.mark.parametrize(
    ("loss", "root"),
    [
        (CDPO(beta=0.1, label_smoothing=0.2), math.log(4) / 0.1),
        (EXOPair(beta=0.1, label_smoothing=1e-3), math.log(999) / 0.1),
        (NCAPair(beta=0.01), math.log(2) / 0.01),
        (IPO(tau=0.1), 5.0),
        (IPOAverage(tau=0.1), 5.0),
        (DiscoPOP(beta=0.05, tau=0.05), -0.1185699 / 0.05),
        (DiscoPOP(beta=0.05, tau=0.05), 0.0720061 / 0.05),
    ],
    ids=label,
)
def test_chosen_incentive_changes_sign_at_its_root(loss: PreferenceLoss, root: float) -> None:
    """The printed roots of DiscoPOP have seven digits: they are bracketed at 1e-5."""
    below, above = _at_margin(loss, root - 1e-5)[0], _at_margin(loss, root + 1e-5)[0]
    assert below * above < 0


def test_discopop_pushes_the_wrong_way_at_the_reference_point() -> None:
    loss = DiscoPOP(beta=0.05, tau=0.05)
    expected = loss.beta * (0.75 - 5 * (1 - math.log(2)))
    assert _at_margin(loss, 0.0) == pytest.approx((expected, expected), rel=1e-12)
    assert expected < 0


def test_apo_down_has_no_chosen_incentive_at_the_reference_point() -> None:
    assert _at_margin(APODown(), 0.0) == pytest.approx((0.0, 0.025), abs=1e-15)


LN2 = math.log(2)
AT_REFERENCE = {
    "dpo": LN2,
    "cdpo": LN2,
    "robust": LN2,
    "hinge": 1.0,
    "ipo": 25.0,  # 1 / (2 tau)^2
    "exo_pair": -LN2 - (math.log(0.999) + math.log(0.001)) / 2,
    "discopop": (LN2 + 1) / 2,
    "gpo_exp": 1.0,
    "ipo_avg": 25.0,
    "sigmoid_norm": LN2,
    "dpop": LN2,
    "dpo_shift": LN2,
    "mappo": LN2,
    "minor_dpo": LN2,
    "bpo": LN2,
    "cal_dpo": LN2 + 500.0**2,
    "bco_pair": 2 * LN2,
    "bco": 2 * LN2,
    "nca_pair": 2 * LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "kto": 1.0,
    "sppo_hard": 2 * 500.0**2,
    "bce": 2 * LN2,
    "lsif": -0.5,
    "ddro": 2 * LN2,
    "npo": 20 * LN2,
    "f_dpo_forward_kl": LN2,
    "f_dpo_js": LN2,
    "f_dpo_alpha": LN2,
    "chipo": LN2,
    "beta_dpo": LN2,
    "ld_dpo": LN2,
    "tdpo1": LN2,
    "tdpo2": LN2,
    "tidpo": LN2,
}
"""Loss of any pair at the defaults where policy = reference, by hand."""


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_value_at_the_reference_point(name: str) -> None:
    found = CATALOGUE[name]().per_pair(BATCHES["reference"])
    torch.testing.assert_close(found, torch.full_like(found, AT_REFERENCE[name]))


def test_dpo_at_the_reference_point() -> None:
    """Incentives beta / 2."""
    assert _at_margin(DPO(beta=0.3), 0.0) == pytest.approx((0.15, 0.15), rel=1e-12)


SMOOTH = [loss for loss in PAIR_LOSSES if not loss.is_batch_coupled and loss.name != "ddro"]


@pytest.mark.parametrize("loss", SMOOTH, ids=label)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_value_is_the_integral_of_the_incentive(loss: PreferenceLoss, side: str) -> None:
    """No jumps at kinks, and no branch with another constant: trapezoids along a path through all of them.

    Steps of 5e-3 nats leave 1e-5 of curvature, and at a kink half a step times the jump of the incentive.
    (ddro, whose incentive jumps by 1e6, has its own test.)
    """
    steps = torch.arange(-15.0, 15.0, 5e-3, dtype=torch.float64)
    fixed, lengths = torch.full_like(steps, -15.02), torch.full_like(steps, 3.0)
    batch = PairLogps(fixed, fixed + 3.7, lengths, lengths, fixed, fixed)
    batch = dataclasses.replace(batch, **{side: fixed + steps})
    value, found = loss.per_pair(batch), getattr(loss.incentives(batch), side)
    sign = -1.0 if side == "chosen" else 1.0
    area = torch.cumulative_trapezoid(found, steps) * sign
    torch.testing.assert_close(value[1:] - value[0], area, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("loss", [loss for loss in DEFAULTS if loss.ratio in RATIOS], ids=label)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_the_stated_ratio_holds(loss: PreferenceLoss, batch: PairLogps) -> None:
    found = loss.incentives(batch)
    chosen, rejected = found.chosen, found.rejected
    if loss.needs_tokens:  # one incentive on every token: its mean over the tokens is the summed log-prob's
        chosen, rejected = chosen.sum(1) / batch.length_chosen, rejected.sum(1) / batch.length_rejected
    left, right = RATIOS[loss.ratio](batch)
    torch.testing.assert_close(chosen * left, rejected * right, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0.5, 2 * LN2 - math.log(1.5)),
        (1.999, 2 * LN2 - math.log(1e-3)),
        (2.5, 2 * LN2 - math.log(1e-6) + (0.5 + 1e-6) / 1e-6),
    ],
)
def test_ddro_on_both_sides_of_its_barrier(rate: float, expected: float) -> None:
    """By hand: 2 ln 2 - ln(2 - rate), linear in the rate beyond 2 - 1e-6; r_w = 1.5 takes 1.5 off."""
    rejected = -20.0 + torch.tensor([rate], dtype=torch.float64).log()
    reference, length = torch.full_like(rejected, -20.0), torch.ones(1)
    batch = PairLogps(reference + 1.5, rejected, length, length, reference, reference)
    assert DDRO().per_pair(batch).item() == pytest.approx(expected - 1.5, rel=1e-9)

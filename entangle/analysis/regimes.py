"""Geometry + incentives -> what one SGD step does to both log-probs (theory: arXiv 2410.13828, section 3).

One step theta += eta (d_w g_w - d_l g_l) changes the two log-probs, exact to first order in eta, by

    chosen   eta (d_w A - d_l c)         rejected   eta (d_w c - d_l B)

The regime is the pair of signs. Nothing here assumes the signs of the incentives.

A = 9, B = 5, c = 6 under d_w = d_l = 1: the changes are A - c = 3 and c - B = 1, so both rise.

    >>> block = PairGeometry(*torch.tensor([[9.0], [5.0], [6.0], [3.0], [-1.0]]))
    >>> one = torch.ones(1)
    >>> found = predict(block, Incentives(one, one))
    >>> found.change_chosen.item(), found.change_rejected.item(), str(found.regimes[0])
    (3.0, 1.0, 'both_up')
    >>> [round(end.item(), 3) for end in critical_addition(block, one)]  # c/A - 1 and B/c - 1: less weight, not more
    [-0.333, -0.167]
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from entangle.analysis.geometry import PairGeometry
from losses import Incentives


class Regime(StrEnum):
    """Which way the log-probs of (chosen, rejected) move in one small step."""

    IDEAL = "ideal"  # (+, -)
    BOTH_UP = "both_up"  # (+, +)
    BOTH_DOWN = "both_down"  # (-, -)
    INVERTED = "inverted"  # (-, +)
    DEGENERATE = "degenerate"  # at least one change is smaller than the arithmetic can tell from zero


REGIMES = tuple(Regime)


@dataclass(frozen=True)
class Prediction:
    """First-order effect of one SGD step on each pair's own loss; every field `(B,)`.

    Args:
        change_chosen: change of the chosen log-prob per unit learning rate, nats.
        change_rejected: the same for the rejected response.
        floor_chosen: size below which the sign of `change_chosen` isn't believed.
        floor_rejected: the same for the rejected response.
        band: band coordinate tau (see `band_coordinate`).
        slack: distance of ln rho to the nearer edge of the ideal band (negative: outside).
    """

    change_chosen: Tensor
    change_rejected: Tensor
    floor_chosen: Tensor
    floor_rejected: Tensor
    band: Tensor
    slack: Tensor

    @property
    def margin_change(self) -> Tensor:
        """Change of log pi(chosen) - log pi(rejected) per unit learning rate, nats. Can be negative."""
        return self.change_chosen - self.change_rejected

    @property
    def regime_codes(self) -> Tensor:
        """`(B,)` int64 indices into `REGIMES`; a non-finite change is `degenerate`."""
        up, down = self.change_chosen > 0, self.change_rejected < 0
        known = (self.change_chosen.abs() > self.floor_chosen) & (
            self.change_rejected.abs() > self.floor_rejected
        )
        codes = torch.where(up, torch.where(down, 0, 1), torch.where(down, 2, 3))
        return torch.where(known, codes, 4)

    @property
    def regimes(self) -> list[Regime]:
        """The regime of each pair, by name."""
        return [REGIMES[code] for code in self.regime_codes.tolist()]


def predict(geometry: PairGeometry, incentives: Incentives) -> Prediction:
    """First-order changes, regime and band coordinate of every pair under one loss.

    The changes are formed from the gaps, d_w A - d_l c = (d_w - d_l) A + d_l (A - c), which keeps the digits
    of nearly parallel pairs under losses with rho = 1. A dot product errs in proportion to the norms, however small
    it is itself: a change counts as zero within resolution * (|d_w| A + |d_l| sqrt(AB)), respectively
    resolution * (|d_w| sqrt(AB) + |d_l| B).

    Laws: d_w * change_chosen - d_l * change_rejected = |grad loss|^2 >= 0, so with both incentives positive
    no pair is `inverted`; scaling both incentives changes no regime.

    Args:
        geometry: the pairs' Gram blocks, `(B,)`, 1/parameter^2.
        incentives: d_w and d_l, `(B,)` each, loss units per nat.
    """
    d_w, d_l = incentives.chosen.double(), incentives.rejected.double()
    excess = d_w - d_l
    norms = (geometry.sq_chosen * geometry.sq_rejected).sqrt()
    norms = torch.where(geometry.is_finite, norms, torch.nan)  # so that no sign is believed
    band, slack = band_coordinate(geometry, incentives)
    return Prediction(
        change_chosen=excess * geometry.sq_chosen + d_l * geometry.gap_chosen,
        change_rejected=excess * geometry.sq_rejected - d_w * geometry.gap_rejected,
        floor_chosen=geometry.resolution * (d_w.abs() * geometry.sq_chosen + d_l.abs() * norms),
        floor_rejected=geometry.resolution * (d_w.abs() * norms + d_l.abs() * geometry.sq_rejected),
        band=band,
        slack=slack,
    )


def band_coordinate(geometry: PairGeometry, incentives: Incentives) -> tuple[Tensor, Tensor]:
    """Where a loss stands in a pair's ideal band: (tau, slack), each `(B,)`.

    tau = ln(rho / r*) / (-ln cos) with rho = d_w / d_l: |tau| < 1 ideal, tau < -1 both_down, tau > 1 both_up
    (for positive incentives; the opposite when both are negative). slack = min(ln rho - lower, upper - ln rho).
    NaN where undefined: incentives of different sign or zero; tau also where cos <= 0 (the band is unbounded,
    slack is then +inf) or the band is narrower than the arithmetic.

    Args:
        geometry: the pairs' Gram blocks, `(B,)`.
        incentives: d_w and d_l, `(B,)` each.
    """
    rho = incentives.chosen.double() / incentives.rejected.double()
    log_rho = torch.where(rho > 0, rho, torch.nan).log()
    lower, upper = geometry.log_band
    tau = (2 * log_rho - lower - upper) / (upper - lower)
    tau = torch.where(geometry.is_parallel | (geometry.inner <= 0), torch.nan, tau)
    return tau, torch.minimum(log_rho - lower, upper - log_rho)


def critical_addition(geometry: PairGeometry, base: Tensor) -> tuple[Tensor, Tensor]:
    """Weights x for which incentives (base + x, base) are ideal: open interval (lower, upper), each `(B,)`.

    For a loss with an NLL term on the chosen response (CPO, RPO, SLiC-HF; x = incentive of that term) and,
    with base = 1, for DPOP's lambda where it is active: base (c/A - 1) < x < base (B/c - 1). For c <= 0 the
    interval is (-base, inf). Empty iff cos = 1.

    Args:
        geometry: the pairs' Gram blocks, `(B,)`.
        base: `(B,)`, the incentive that both sides have without the term.
    """
    lower, upper = geometry.log_band
    return base * torch.expm1(lower), base * torch.expm1(upper)


def critical_shift(geometry: PairGeometry) -> tuple[Tensor, Tensor]:
    """Weights x on the rejected side for which incentives (d, x d) are ideal: (c/B, A/c), each `(B,)`.

    DPO-Shift's lambda (arXiv 2502.07599) and MaPPO's reward gap. (0, inf) where c <= 0.
    """
    lower, upper = geometry.critical_ratio
    return 1 / upper, 1 / lower

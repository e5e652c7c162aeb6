"""Hyper-parameters that move a loss's incentives along a line, and the settings that make each pair ideal.

A knob starts at a base loss and turns one number: an NLL weight, DPOP's lambda, DPO-Shift's lambda, a length
exponent. Up to a positive factor per pair (which no regime sees) its incentives are fixed + x slope. Both
predicted changes are then linear in x, so for each pair the ideal settings form one open interval, known
exactly, and the smallest setting that makes a wanted share of the pairs ideal is found by sorting interval
ends: no scan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from entangle.analysis.geometry import PairGeometry
from entangle.analysis.predictions import incentives_of
from entangle.analysis.regimes import predict
from losses import (
    CPO,
    DPO,
    DPOP,
    SFT,
    DPOShift,
    Incentives,
    PairLogps,
    PreferenceLoss,
    SFTBatch,
    SFTSum,
    WithSFT,
)

JUST_ABOVE = 1e-7
"""Interval ends are open: a setting is put this much (relatively) past one, or half way to the next."""


@dataclass(frozen=True)
class IncentiveLine:
    """Incentives of a pair as a function of a setting, up to a positive factor per pair.

    Args:
        fixed: incentives at x = 0, `(B,)` each.
        slope: their derivatives in x, `(B,)` each.
        log_growth: None where x is the setting itself; else `(B,)` with x = exp(setting * log_growth).
    """

    fixed: Incentives
    slope: Incentives
    log_growth: Tensor | None = None

    def at(self, setting: float) -> Incentives:
        """The incentives at one setting."""
        x = setting if self.log_growth is None else (setting * self.log_growth).exp()
        return Incentives(
            self.fixed.chosen + x * self.slope.chosen, self.fixed.rejected + x * self.slope.rejected
        )

    @property
    def acts(self) -> Tensor:
        """`(B,)` bool: pairs on which the setting has any effect."""
        moves = (self.slope.chosen != 0) | (self.slope.rejected != 0)
        return moves if self.log_growth is None else moves & (self.log_growth != 0)


def ideal_interval(geometry: PairGeometry, line: IncentiveLine) -> tuple[Tensor, Tensor]:
    """Settings between which each pair is ideal: an open interval (lower, upper), `(B,)` each; NaN for none.

    Exactly the settings at which `regimes.predict` says ideal, its tolerance for the arithmetic included.
    With tolerance t, a pair is ideal iff

        d_w A - d_l c > t (|d_w| A + |d_l c|)    and    d_w c - d_l B < -t (|d_w c| + |d_l| B).

    A concave piecewise linear function of x is positive iff its linear pieces all are, here four for each
    response (the signs of d_w, d_l): eight half-lines, whose intersection is an interval.

    Laws: for incentives (base + x, base) and t -> 0 it is `regimes.critical_addition`, for (1, x) it is
    `regimes.critical_shift` (theory: arXiv 2410.13828, section 3, solved for one hyper-parameter).

    Args:
        geometry: the pairs' Gram blocks, `(B,)`.
        line: their incentives as a function of the setting.
    """
    return _positive(_half_lines(geometry, line.fixed), _half_lines(geometry, line.slope), line.log_growth)


def falling_interval(geometry: PairGeometry, line: IncentiveLine) -> tuple[Tensor, Tensor]:
    """Settings between which each pair's step lowers its chosen log-prob: an open interval; NaN for none.

    Exactly the settings at which `regimes.predict` finds a change of the chosen below 0 by more than the error of the
    arithmetic, whatever the rejected does: -(d_w A - d_l c) > t (|d_w| A + |d_l| sqrt(AB)), concave in the setting as
    in `ideal_interval`.

    Args:
        geometry: the pairs' Gram blocks, `(B,)`.
        line: their incentives as a function of the setting.

    Returns:
        (lower, upper), `(B,)` each.
    """
    return _positive(
        _falling_lines(geometry, line.fixed), _falling_lines(geometry, line.slope), line.log_growth
    )


def _positive(fixed: Tensor, slope: Tensor, log_growth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where all of some linear functions fixed + x slope, `(L, B)` each, are positive: an open interval per pair."""
    crossing = -fixed / slope
    never = ((slope == 0) & ~(fixed > 0)) | fixed.isnan() | slope.isnan()
    lower = torch.where(slope > 0, crossing, -torch.inf).amax(0)
    upper = torch.where(slope < 0, crossing, torch.inf).amin(0)
    empty = never.any(0) | ~(lower < upper)
    if log_growth is not None:
        lower, upper, empty = _exponents(lower, upper, empty, log_growth)
    return torch.where(empty, torch.nan, lower), torch.where(empty, torch.nan, upper)


def _half_lines(geometry: PairGeometry, incentives: Incentives) -> Tensor:
    """The eight linear functions of the incentives that are all positive iff a pair is ideal, `(8, B)`."""
    d_w, d_l = incentives.chosen.double(), incentives.rejected.double()
    prediction = predict(geometry, Incentives(d_w, d_l))
    norms, t = (geometry.sq_chosen * geometry.sq_rejected).sqrt(), geometry.resolution
    rows = []
    for sign_w, sign_l in itertools.product((1, -1), repeat=2):
        rows.append(prediction.change_chosen - t * (sign_w * d_w * geometry.sq_chosen + sign_l * d_l * norms))
        rows.append(
            -prediction.change_rejected - t * (sign_w * d_w * norms + sign_l * d_l * geometry.sq_rejected)
        )
    return torch.stack(rows)


def _falling_lines(geometry: PairGeometry, incentives: Incentives) -> Tensor:
    """The four linear functions of the incentives that are all positive iff a pair's chosen falls, `(4, B)`."""
    d_w, d_l = incentives.chosen.double(), incentives.rejected.double()
    change = predict(geometry, Incentives(d_w, d_l)).change_chosen
    norms, t = (geometry.sq_chosen * geometry.sq_rejected).sqrt(), geometry.resolution
    return torch.stack(
        [
            -change - t * (sign_w * d_w * geometry.sq_chosen + sign_l * d_l * norms)
            for sign_w, sign_l in itertools.product((1, -1), repeat=2)
        ]
    )


def _exponents(
    lower: Tensor, upper: Tensor, empty: Tensor, log_growth: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """An interval of x = exp(p log_growth) as an interval of p."""
    ends = torch.stack([lower.clamp(min=0).log(), upper.clamp(min=0).log()]) / log_growth
    still = log_growth == 0  # x = 1 at every p
    holds = still & (lower < 1) & (upper > 1)
    low = torch.where(still, -torch.inf, ends.amin(0))
    high = torch.where(still, torch.inf, ends.amax(0))
    return low, high, empty | (upper <= 0) | (still & ~holds)


@dataclass(frozen=True)
class PartlyNormalised(PreferenceLoss):
    """DPO between summed and averaged log-probs: -ln s(beta (r_w/n_w^p - r_l/n_l^p)).

    d_w = (beta/n_w^p) s(-z), d_l = (beta/n_l^p) s(-z), z the argument of s. p = 0 is `dpo`, p = 1 is
    `sigmoid_norm`.

    Args:
        beta: per nat per token^p; 0.1.
        exponent: p; 0.
        against_reference: False takes w, l instead of r_w, r_l.

    Paper: none; an interpolation between two of the catalogue.
    """

    name: ClassVar = "partly_normalised"
    paper: ClassVar = "none"
    ratio: ClassVar = "(n_l/n_w)^p"
    needs_lengths: ClassVar = True

    beta: float = 0.1
    exponent: float = 0.0
    against_reference: bool = True

    @property
    def needs_reference(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether log-ratios or bare log-probs are compared."""
        return self.against_reference

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the partly normalised margin, `(B,)`."""
        chosen = logps.logratio_chosen if self.against_reference else logps.chosen
        rejected = logps.logratio_rejected if self.against_reference else logps.rejected
        margin = chosen / logps.length_chosen**self.exponent - rejected / logps.length_rejected**self.exponent
        return -F.logsigmoid(self.beta * margin)


@dataclass(frozen=True)
class Knob:
    """One number that turns a base loss into another.

    Args:
        name: as given on the command line; also names its columns.
        title: what is turned, with its unit.
        start: the setting that is the knob's base loss.
        end: the last setting that makes sense; the smallest change is looked for from `start` towards it.
        origin: base -> the catalogue's loss that the start is.
        loss: (base, setting) -> the loss at that setting.
        line: (base, log-probs, pairs per batch) -> the incentives as a function of the setting.
        needs_reference: it reads the reference log-probs.
        idle: why it may have no effect on a pair.
    """

    name: str
    title: str
    start: float
    end: float
    origin: Callable[[PreferenceLoss], PreferenceLoss]
    loss: Callable[[PreferenceLoss, float], PreferenceLoss]
    line: Callable[[PreferenceLoss, PairLogps, int], IncentiveLine]
    needs_reference: bool = False
    idle: str = ""


def default_base(has_reference: bool) -> PreferenceLoss:
    """DPO, or the same margin loss without a reference where there is none."""
    return DPO() if has_reference else CPO(nll_weight=0.0)


def _nll(name: str, unit: str, term: PreferenceLoss) -> Knob:
    return Knob(
        name,
        f"weight of an NLL term on the chosen response, {unit}",
        0.0,
        math.inf,
        origin=lambda base: base,
        loss=lambda base, setting: WithSFT(base, alpha=setting, sft=term),
        line=lambda base, logps, size: IncentiveLine(
            incentives_of(base, logps, size), incentives_of(term, logps, size)
        ),
    )


def _beta(base: PreferenceLoss) -> float:
    """DPO's beta where the base is DPO; regimes of the other knobs don't depend on it."""
    return base.beta if isinstance(base, DPO | CPO) else DPO().beta


def _dpo(base: PreferenceLoss) -> DPO:
    return DPO(beta=_beta(base))


def _dpop_line(base: PreferenceLoss, logps: PairLogps, size: int) -> IncentiveLine:
    ones, zeros = torch.ones_like(logps.chosen), torch.zeros_like(logps.chosen)
    return IncentiveLine(Incentives(ones, ones), Incentives((logps.logratio_chosen < 0).to(ones), zeros))


def _shift_line(base: PreferenceLoss, logps: PairLogps, size: int) -> IncentiveLine:
    ones, zeros = torch.ones_like(logps.chosen), torch.zeros_like(logps.chosen)
    return IncentiveLine(Incentives(ones, zeros), Incentives(zeros, ones))


def _length_line(base: PreferenceLoss, logps: PairLogps, size: int) -> IncentiveLine:
    ones, zeros = torch.ones_like(logps.chosen), torch.zeros_like(logps.chosen)
    growth = (logps.length_rejected / logps.length_chosen).log()
    return IncentiveLine(Incentives(zeros, ones), Incentives(ones, zeros), log_growth=growth)


KNOBS: dict[str, Knob] = {
    knob.name: knob
    for knob in (
        _nll("nll", "per chosen token of the pair", SFT()),
        _nll("nll_sum", "per sequence (summed log-prob)", SFTSum()),
        _nll("nll_batch", "per chosen token of the batch (TRL's rpo_alpha, cpo_alpha)", SFTBatch()),
        Knob(
            "dpop",
            "DPOP's lambda",
            0.0,
            math.inf,
            origin=_dpo,
            loss=lambda base, setting: DPOP(beta=_beta(base), penalty=setting),
            line=_dpop_line,
            needs_reference=True,
            idle="the penalty is off while the chosen log-prob isn't below the reference's",
        ),
        Knob(
            "shift",
            "DPO-Shift's lambda, from 1 downwards",
            1.0,
            0.0,
            origin=_dpo,
            loss=lambda base, setting: DPOShift(beta=_beta(base), shift=setting),
            line=_shift_line,
            needs_reference=True,
        ),
        Knob(
            "length",
            "length exponent, from 0 (summed) to 1 (averaged)",
            0.0,
            1.0,
            origin=lambda base: _dpo(base) if base.needs_reference else CPO(beta=_beta(base), nll_weight=0.0),
            loss=lambda base, setting: PartlyNormalised(_beta(base), setting, base.needs_reference),
            line=_length_line,
            idle="both responses have the same length",
        ),
    )
}
"""Every knob by name; `nll_sum` and `nll_batch` are `nll` in other units."""

DEFAULT_KNOBS = ("nll", "dpop", "shift", "length")


@dataclass(frozen=True)
class SettingRange:
    """A stretch of settings that makes at least some number of pairs ideal.

    Args:
        nearest: the setting nearest to the start that does.
        until: where it ends, seen from the start (infinite where it doesn't).
        count: ideal pairs at `nearest`.
    """

    nearest: float
    until: float
    count: int


def smallest_change(
    lower: Tensor, upper: Tensor, needed: int, start: float, end: float
) -> SettingRange | None:
    """The setting nearest to `start`, on the way to `end`, that lies in at least `needed` open intervals.

    Exact, in O(B log B): the count only grows just past a lower end (and at `start`).

    Args:
        lower: lower ends, `(B,)`; NaN for an empty interval.
        upper: upper ends, `(B,)`.
        needed: intervals that must hold the setting.
        start: where the search begins.
        end: where it ends.

    Returns:
        The stretch found, or None where no setting lies in that many.

    Examples:
        >>> ends = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])
        >>> smallest_change(*ends, needed=3, start=0.0, end=9.0).until
        3.0
    """
    ends = _IntervalEnds.make(lower, upper, start, end)
    counts = ends.counts
    enough = (counts >= needed).nonzero()
    return None if len(enough) == 0 else ends.range_from(int(enough[0]), needed)


def best_change(lower: Tensor, upper: Tensor, start: float, end: float) -> SettingRange:
    """The setting that lies in the most intervals; the one nearest to `start` of several.

    Args:
        lower: lower ends, `(B,)`; NaN for an empty interval.
        upper: upper ends, `(B,)`.
        start: where the search begins.
        end: where it ends.
    """
    ends = _IntervalEnds.make(lower, upper, start, end)
    best = int(ends.counts.argmax())  # the first of equals
    return ends.range_from(best, int(ends.counts[best]))


def fewest_change(lower: Tensor, upper: Tensor, start: float, end: float) -> SettingRange:
    """The setting that lies in the fewest open intervals; the one nearest to `start` of several.

    Exact: the count only falls at `start` and just past an upper end.

    Args:
        lower: lower ends, `(B,)`; NaN for an empty interval.
        upper: upper ends, `(B,)`.
        start: where the search begins.
        end: where it ends.

    Returns:
        The stretch; its `count` is of the intervals that still hold it, and it ends where one more does.

    Examples:
        >>> ends = torch.tensor([-1.0, -1.0, 6.0]), torch.tensor([3.0, 4.0, 9.0])
        >>> found = fewest_change(*ends, start=0.0, end=9.0)
        >>> round(found.nearest, 3), found.until, found.count
        (4.0, 6.0, 0)
    """
    ends = _IntervalEnds.make(lower, upper, start, end)
    ends = replace(ends, past=ends.upper[(ends.upper >= 0) & (ends.upper < abs(end - start))].unique())
    least = int(ends.counts.argmin())  # the first of equals
    return ends.few_from(least, int(ends.counts[least]))


@dataclass(frozen=True)
class _IntervalEnds:
    """Interval ends as distances from a start; candidate 0 is the start, the others are `past` an end (a lower one)."""

    lower: Tensor
    upper: Tensor
    past: Tensor
    start: float
    end: float

    @classmethod
    def make(cls, lower: Tensor, upper: Tensor, start: float, end: float) -> _IntervalEnds:
        real = ~lower.isnan()
        near, far = (lower - start, upper - start) if end > start else (start - upper, start - lower)
        near, far = near[real].sort().values, far[real].sort().values
        past = near[(near >= 0) & (near < abs(end - start))].unique()
        return cls(near, far, past, start, end)

    @property
    def counts(self) -> Tensor:
        """Intervals around each candidate, `(1 + number of lower ends,)`."""
        zero = torch.zeros(1, dtype=self.lower.dtype)
        return torch.cat(
            [self.at(zero), self._up_to(self.lower, self.past) - self._up_to(self.upper, self.past)]
        )

    def at(self, distances: Tensor) -> Tensor:
        """Intervals around distances themselves (an open interval doesn't hold its ends)."""
        return torch.searchsorted(self.lower, distances) - self._up_to(self.upper, distances)

    @staticmethod
    def _up_to(ends: Tensor, distances: Tensor) -> Tensor:
        return torch.searchsorted(ends, distances, right=True)

    def range_from(self, candidate: int, needed: int) -> SettingRange:
        nearest = 0.0 if candidate == 0 else self._step_past(self.past[candidate - 1].item())
        closing = self.upper[self.upper > nearest]
        short = closing[self.at(closing) < needed]
        until = min(short[0].item() if len(short) else math.inf, abs(self.end - self.start))
        return SettingRange(self._setting(nearest), self._setting(until), int(self.counts[candidate]))

    def few_from(self, candidate: int, allowed: int) -> SettingRange:
        nearest = 0.0 if candidate == 0 else self._step_past(self.past[candidate - 1].item())
        opening = self.lower[self.lower >= nearest]
        more = opening[self._up_to(self.lower, opening) - self._up_to(self.upper, opening) > allowed]
        until = min(more[0].item() if len(more) else math.inf, abs(self.end - self.start))
        return SettingRange(self._setting(nearest), self._setting(until), allowed)

    def _step_past(self, distance: float) -> float:
        ends = torch.cat([self.lower, self.upper])
        later = ends[ends > distance]
        room = min(later.min().item() if len(later) else math.inf, abs(self.end - self.start)) - distance
        scale = abs(distance) or min(room, 1.0)
        return distance + min(room / 2, JUST_ABOVE * scale)

    def _setting(self, distance: float) -> float:
        return self.start + distance if self.end > self.start else self.start - distance


def readable(found: SettingRange, start: float) -> float:
    """The roundest number within a stretch, at most what four digits past its near end need.

    Rounded away from the start, so that it still does what the stretch promises.

    Args:
        found: the stretch.
        start: the setting that is the knob's base loss.

    Examples:
        >>> readable(SettingRange(nearest=0.02500001, until=0.2, count=9), start=0.0)
        0.026
    """
    exact = found.nearest
    if exact == start or exact == 0:
        return exact
    away = math.ceil if found.until > exact else math.floor
    for digits in range(2, 15):
        factor = 10.0 ** (digits - 1 - math.floor(math.log10(abs(exact))))
        rounded = away(exact * factor) / factor
        if min(exact, found.until) <= rounded <= max(exact, found.until) and rounded != found.until:
            return rounded
    return exact

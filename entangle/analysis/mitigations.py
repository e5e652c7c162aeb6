"""Mitigations of entanglement: what they do to a pair's gradients or to the choice of pairs, as pure mathematics.

Any loss can be trained with one of them; `entangle.training.mitigated` puts them into TRL's trainer. Four kinds:

    Rescaling   the forward pass unchanged, a pair's two incentives multiplied in the backward pass
    Masking     the forward pass unchanged, some tokens left out of the backward pass
    Splitting   the gradients of the chosen and the rejected half taken at different parameters
    Steering    the optimiser's step corrected by what products across batches say of the set
    Select      pairs left out before training

With g_w, g_l the gradients of the two summed log-probs and d_w, d_l a loss's incentives in them (the one convention
for averages here: a loss that averages over tokens has its 1/n inside d).

Incentives 0.1 and norms 4 and 1: reward calibration brings d_w / d_l to |g_l| / |g_w| = 1/4.

    >>> d, norm_chosen, norm_rejected = (torch.tensor([x]) for x in (0.1, 4.0, 1.0))
    >>> chosen, rejected = RewardCalibration().factors(Incentives(d, d), norm_chosen, norm_rejected, {})
    >>> [round(float(factor * d), 4) for factor in (chosen, rejected)]
    [0.05, 0.2]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from random import Random
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from entangle.analysis.cross_batch import (
    FEWEST,
    centre_factor,
    common_share,
    drift_factor,
    edge_factor,
    steady_factor,
)
from entangle.analysis.sets import SetGeometry
from entangle.config.specs import construct
from entangle.errors import ConfigError
from losses import Incentives

MITIGATIONS: dict[str, type[Mitigation]] = {}
"""Every mitigation by name."""

Side = Literal["chosen", "rejected"]
Vector = list[Tensor]
"""A point or a direction in parameter space, a tensor per parameter."""

Gradient = Callable[[Side, Vector | None], Vector]
"""g+ (`chosen`) or g- (`rejected`) at the parameters moved by a displacement; None: as they are.

g+ = -d_w g_w and g- = -d_l g_l, batch means with d_w, d_l frozen: the loss's gradient is g+ - g-.
"""


@dataclass(frozen=True)
class Mitigation:
    """A change to training that a run asks for by name, with its options as fields."""

    name: ClassVar[str]
    source: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in cls.__dict__:
            MITIGATIONS[cls.name] = cls

    @property
    def config(self) -> dict[str, Any]:
        """`{"name": ..., options}`: what `build_mitigation` turns back into this."""
        return {"name": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}


def build_mitigation(spec: str | Mapping[str, Any]) -> Mitigation:
    """A mitigation from its name, `name:key=value,...`, or `{"name": "sequential", "order": "random"}`.

    Raises:
        ConfigError: the name, an option or its value isn't known.
    """
    return construct(spec, MITIGATIONS, Mitigation, "mitigation")


Total = Callable[[Tensor], Tensor]
"""The sum of a tensor over processes."""


def identity(value: Tensor) -> Tensor:
    """The `Total` of one process."""
    return value


def backward_scaled(value: Tensor, factor: Tensor) -> Tensor:
    """`value` forward, its gradient times `factor` backward: f v + (1 - f) sg v.

    Args:
        value: v, any shape.
        factor: f, in a shape that goes with it; not differentiated.
    """
    return value.detach() + factor * (value - value.detach())


# --- rescaled incentives ------------------------------------------------------------------------------------


class Rescaling(Mitigation, ABC):
    """Multiplies a pair's incentives by factors that aren't differentiated."""

    @abstractmethod
    def factors(
        self,
        incentives: Incentives,
        norm_chosen: Tensor,
        norm_rejected: Tensor,
        state: dict[str, float],
        total: Total = identity,
    ) -> tuple[Tensor, Tensor]:
        """(a_w, a_l), `(B,)` each: the step takes a_w d_w and a_l d_l.

        Args:
            incentives: d_w and d_l, `(B,)` each.
            norm_chosen: |g_w|, `(B,)`.
            norm_rejected: |g_l|, `(B,)`.
            state: what is carried from batch to batch; changed in place.
            total: sum over the processes that share the batch; each of them calls.
        """


@dataclass(frozen=True)
class PairwiseNormalised(Rescaling):
    """Each gradient over its norm: the step is d_w g_w/|g_w| - d_l g_l/|g_l|.

    Law: where d_w = d_l = d > 0 a pair's own step gives dw = eta d |g_w| (1 - cos) and dl = -eta d |g_l| (1 - cos),
    so it is ideal unless cos = 1. For other losses it is ideal iff |ln(d_w/d_l)| < -ln cos. Other pairs of the
    batch aren't controlled. A response without gradient keeps none.
    """

    name: ClassVar = "pairwise_normalised"
    source: ClassVar = "arXiv 2410.13828, proposed there as a direction; the formula is ours"

    def factors(
        self,
        incentives: Incentives,
        norm_chosen: Tensor,
        norm_rejected: Tensor,
        state: dict[str, float],
        total: Total = identity,
    ) -> tuple[Tensor, Tensor]:
        """(1/|g_w|, 1/|g_l|)."""
        return _inverse(norm_chosen), _inverse(norm_rejected)


@dataclass(frozen=True)
class RewardCalibration(Rescaling):
    """Reward calibration: a d_w and d_l / a with a = sqrt(r*/rho): the incentive ratio becomes r* = |g_l|/|g_w|.

    Laws: the product d_w d_l is kept; with norms per pair, dw = eta sqrt(d_w d_l) (AB)^(1/4) |g_w| (1 - cos) and
    dl = -eta sqrt(d_w d_l) (AB)^(1/4) |g_l| (1 - cos): ideal unless cos = 1. A pair with an incentive that isn't
    positive, or without a gradient, has no such ratio and is left alone.

    Args:
        norms: `pair`: a of every pair from its own numbers. `ema`: one a for all, from moving averages of the logs of
            batch means (over all processes), as in the authors' code.
        decay: of the moving average.
    """

    name: ClassVar = "reward_calibration"
    source: ClassVar = "arXiv 2604.18239"

    norms: Literal["pair", "ema"] = "pair"
    decay: float = 0.98

    def __post_init__(self) -> None:
        if self.norms not in ("pair", "ema") or not 0 <= self.decay < 1:
            raise ConfigError(
                f"reward_calibration expects norms 'pair' or 'ema' and 0 <= decay < 1; got {self.config}."
            )

    def factors(
        self,
        incentives: Incentives,
        norm_chosen: Tensor,
        norm_rejected: Tensor,
        state: dict[str, float],
        total: Total = identity,
    ) -> tuple[Tensor, Tensor]:
        """(a, 1/a), and 1 for a pair without a ratio."""
        columns = torch.stack([incentives.chosen, incentives.rejected, norm_chosen, norm_rejected]).double()
        usable = (columns > 0).all(0) & columns.isfinite().all(0)
        if self.norms == "pair":
            log_ratio = _log_ratio(columns.where(usable, 1.0))
        else:
            *sums, count = total(torch.cat([columns.where(usable, 0.0).sum(1), usable.sum()[None]]))
            if count:
                new = float(_log_ratio(torch.stack(sums) / count))
                state["log_ratio"] = self.decay * state.get("log_ratio", new) + (1 - self.decay) * new
            log_ratio = torch.full_like(columns[0], state.get("log_ratio", 0.0))
        factor = (log_ratio / 2).exp().where(usable, 1.0).to(incentives.chosen.dtype)
        return factor, 1 / factor


def _log_ratio(columns: Tensor) -> Tensor:
    """The log ratio ln r* - ln rho from d_w, d_l, |g_w|, |g_l|."""
    chosen, rejected, norm_chosen, norm_rejected = columns.log()
    return norm_rejected - norm_chosen - chosen + rejected


def _inverse(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, 1 / norm, 0.0)


# --- masked tokens ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenMasking(Mitigation):
    """Leaves the tokens that entangle a pair most out of the backward pass, until c < min(A, B) for what is left.

    arXiv 2410.13828 names token-level masks as a direction and gives no rule; this one is ours. Tokens are dropped
    on both sides in the order of what they contribute to c (<g_t, g_l> of a chosen token, <g_t, g_w> of a rejected
    one), only while that is positive, in growing shares; after each, A, B and c of what is left are computed exactly.
    A pair that isn't entangled keeps every token. Law: when it stops early, the masked pair is ideal for every loss
    with d_w = d_l > 0.

    Args:
        max_share: drop at most this share of a response's tokens.
        rounds: number of growing shares that are tried.
    """

    name: ClassVar = "token_masking"
    source: ClassVar = "a direction named in arXiv 2410.13828; the rule is ours"

    max_share: float = 0.5
    rounds: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.max_share < 1 or self.rounds < 1:
            raise ConfigError(f"token_masking expects 0 < max_share < 1 and rounds >= 1; got {self.config}.")

    def shares(self) -> list[float]:
        """The shares of tokens that are tried, growing."""
        return [self.max_share * (k + 1) / self.rounds for k in range(self.rounds)]


def kept_tokens(contributions: Tensor, share: float) -> Tensor:
    """Which tokens stay, `(T,)` bool: all but the largest positive contributions, at most `share` of them.

    At least one token stays.

    Args:
        contributions: `(T,)`, what each of a response's tokens adds to c.
        share: at most this share of them is dropped.
    """
    count = min(math.floor(share * len(contributions)), len(contributions) - 1)
    kept = torch.ones_like(contributions, dtype=torch.bool)
    largest = contributions.argsort(descending=True, stable=True)[:count]
    kept[largest[contributions[largest] > 0]] = False
    return kept


# --- split steps --------------------------------------------------------------------------------------------


class Splitting(Mitigation, ABC):
    """Takes the gradients of the two halves, L = L+ (chosen) + L- (rejected), at displaced parameters."""

    optimizers: ClassVar[tuple[str, ...]]
    """Optimisers of transformers (beginnings of their names) that it is made for."""


@dataclass(frozen=True)
class Sequential(Splitting):
    """Sequential (Lie-Trotter) splitting of an SGD step of size h: one half first, the other where that led to.

    chosen_first: theta1 = theta - h g+(theta), then theta1 + h g-(theta1); the weights d are those at theta. Laws:
    theta_seq = theta_agg - h^2 H- g+ + O(h^3), H- the Jacobian of g-; the average of both orders is
    theta_agg - (h^2/2) grad<g+, g-> + O(h^3). To first order nothing changes. Costs 3 further passes per step, 4
    with order `both`.

    Args:
        order: chosen_first, rejected_first, random (a coin per step, from the seed), or both (the average).
        half_steps: both halves with h/2 (the source says so in words, its formula takes h).
    """

    name: ClassVar = "sequential"
    source: ClassVar = "J. Yu, The implicit bias of gradient accumulation in RLHF (2026)"
    optimizers: ClassVar = ("sgd",)

    order: Literal["chosen_first", "rejected_first", "random", "both"] = "chosen_first"
    half_steps: bool = False

    def __post_init__(self) -> None:
        if self.order not in ("chosen_first", "rejected_first", "random", "both"):
            raise ConfigError(
                "sequential expects order chosen_first, rejected_first, random or both; got "
                + repr(self.order)
            )

    def step_gradient(self, total: Vector, gradient: Gradient, rate: float, coin: Random) -> Vector:
        """What SGD must step along: (theta - theta_seq) / h.

        Args:
            total: the loss's gradient g+ - g- at theta.
            gradient: see `Gradient`.
            rate: h.
            coin: for the random order.
        """
        scale = 0.5 if self.half_steps else 1.0
        order = coin.choice(("chosen_first", "rejected_first")) if self.order == "random" else self.order
        plus, minus = gradient("chosen", None), gradient("rejected", None)
        weight = 0.5 if order == "both" else 1.0
        found = total
        if order in ("chosen_first", "both"):
            moved = gradient("rejected", _times(plus, -scale * rate))
            found = _plus(found, _minus(moved, minus), -weight)
        if order in ("rejected_first", "both"):
            moved = gradient("chosen", _times(minus, scale * rate))
            found = _plus(found, _minus(moved, plus), weight)
        return _times(found, scale)


@dataclass(frozen=True)
class VirtualSplitting(Splitting):
    """Virtual splitting for Adam: the momentum gets q_stage, the second moment q = g+ - g- as ever.

    q_stage = g+(theta + (k h/2) g-) - g-(theta - (k h/2) g+) = q + (k h/2) grad<g+, g-> + O(h^2). The displaced
    parameters are neither kept nor differentiated through. Law: k = 0 is Adam, bit for bit. Costs 4 further passes
    per step.

    Args:
        k: strength; 1 is the size of the sequential arm's bias.
    """

    name: ClassVar = "virtual_splitting"
    source: ClassVar = Sequential.source
    optimizers: ClassVar = ("adamw_torch",)

    k: float = 1.0

    def stage(self, total: Vector, gradient: Gradient, rate: float) -> Vector:
        """q_stage for the gradient `total` = q and the learning rate h.

        Args:
            total: q = g+ - g-, the gradient at the parameters.
            gradient: see `Gradient`.
            rate: h, the learning rate.
        """
        if self.k == 0:
            return total
        plus, minus = gradient("chosen", None), gradient("rejected", None)
        reach = 0.5 * self.k * rate
        moved_plus = gradient("chosen", _times(minus, reach))
        moved_minus = gradient("rejected", _times(plus, -reach))
        return _plus(_plus(total, _minus(moved_plus, plus), 1.0), _minus(moved_minus, minus), -1.0)


def _times(vector: Vector, factor: float) -> Vector:
    return [factor * part for part in vector]


def _plus(vector: Vector, other: Vector, factor: float) -> Vector:
    return [part + factor * more for part, more in zip(vector, other, strict=True)]


def _minus(vector: Vector, other: Vector) -> Vector:
    return _plus(vector, other, -1.0)


# --- steered steps -----------------------------------------------------------------------------------------------


class Steering(Mitigation, ABC):
    """Corrects the optimiser's step so that the set keeps from drifting, as the run's own batches tell.

    It reads `entangle.analysis.cross_batch`: products of each batch's mean scores with the memory of earlier batches.
    These cost no pass. The last `window` steps count; until they tell anything, the step is the optimiser's own.
    """

    optimizers: ClassVar[tuple[str, ...]] = ("adamw_torch", "sgd")
    """Optimisers of transformers (beginnings of their names) that it is made for."""

    means: ClassVar[bool] = False
    """Whether it needs the memory of mean scores too."""

    window: int


@dataclass(frozen=True)
class SetBand(Steering):
    """Keeps the set in its band: the chosen half of the momentum times k, the same k for all pairs.

    The optimiser's momentum is kept in two halves, m = m_chosen + m_rejected, and the step goes along k m_chosen +
    m_rejected under the very preconditioner; v is that of the plain gradient. With E the effects of either half on the
    mean log-probs of fresh pairs, E_01 / E_00 < k < E_11 / E_10 raises the mean chosen and lowers the mean rejected
    one.
    Law: k = 1 is the optimiser's own step, bit for bit.

    Args:
        target: `edge`: the k nearest to 1 in the band, shrunk by a quarter of its log-width at either end. `centre`:
            the middle of the band on the log axis. `drift`: the k of a drift that is given.
        drift: nats of both log-probs per nat of margin, for the target `drift`.
        window: steps that are averaged over, at least 4.
    """

    name: ClassVar = "set_band"
    source: ClassVar = "arXiv 2410.13828's condition on mean gradients; the controller is ours"

    target: Literal["edge", "centre", "drift"] = "edge"
    drift: float = 0.0
    window: int = 8

    def __post_init__(self) -> None:
        if self.target not in ("edge", "centre", "drift") or self.window < FEWEST:
            raise ConfigError(
                f"set_band expects a target edge, centre or drift and a window of at least {FEWEST}; got {self.config}."
            )

    def factor(self, geometry: SetGeometry) -> float:
        """The factor k, within [1/4, 4].

        Args:
            geometry: of the last steps' products.
        """
        rules = {"edge": edge_factor, "centre": centre_factor}
        return steady_factor(rules.get(self.target, lambda block: drift_factor(block, self.drift)), geometry)


@dataclass(frozen=True)
class DriftFree(Steering):
    """Takes out of each step its part along the common direction P (C_w + C_l), C the mean scores.

    What is left moves the two mean log-probs of fresh pairs in opposite directions by the same amount, to first order;
    the rest of the step is as it was. See `entangle.analysis.cross_batch.common_share`.

    Args:
        of: `both`: the sum of both means doesn't move. `chosen`: only a fall of the mean chosen log-prob is taken out.
        window: steps that are averaged over, at least 4.
    """

    name: ClassVar = "drift_free"
    source: ClassVar = "ours; gradient projection with the gain estimated across batches"
    means: ClassVar = True

    of: Literal["both", "chosen"] = "both"
    window: int = 8

    def __post_init__(self) -> None:
        if self.of not in ("both", "chosen") or self.window < FEWEST:
            raise ConfigError(
                f"drift_free expects of = both or chosen and a window of at least {FEWEST}; got {self.config}."
            )

    def share(self, geometry: SetGeometry) -> float:
        """How much of the common direction is taken out.

        Args:
            geometry: of the last steps' products, with the directions of the mean scores.
        """
        return common_share(geometry, of_chosen=self.of == "chosen")


# --- selected pairs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Select(Mitigation):
    """Leaves out the pairs that promise the most displacement under the initial policy.

    ches: <H_w, H_l> - |H_w|^2, high is risky. cosine: of the two gradients, high is risky. gap: the smaller of
    (A - c)/A and (B - c)/B, low is risky (below 0 a loss with d_w = d_l isn't ideal). edit_distance: of the two
    responses' tokens over the longer one's length, low is risky. Pairs of which the number isn't finite are left out.

    Args:
        by: one of these numbers.
        share: keep this share of the pairs, the least risky ones.
        threshold: or keep the pairs on the safe side of this value of the number.
    """

    name: ClassVar = "select"
    source: ClassVar = (
        "ches and edit_distance: arXiv 2410.08847; cosine and gap: arXiv 2410.13828's condition"
    )
    RISK: ClassVar[Mapping[str, int]] = {"ches": 1, "cosine": 1, "gap": -1, "edit_distance": -1}
    """1 where a high number is risky, -1 where a low one is."""

    by: str = "ches"
    share: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        is_share = self.share is not None and 0 < self.share < 1
        if (
            self.by not in self.RISK
            or (self.share is None) == (self.threshold is None)
            or (self.share and not is_share)
        ):
            raise ConfigError(
                f"select expects by = one of {', '.join(self.RISK)}, and either a share between 0 and 1 or a "
                f"threshold; got {self.config}."
            )


def select_pairs(rows: pd.DataFrame, rule: Select) -> np.ndarray:
    """Which pairs are kept, `(rows,)` bool.

    Args:
        rows: one per pair with the column `rule.by`.
        rule: what is kept; of equal numbers at the border of a share the earlier rows are.
    """
    risk = Select.RISK[rule.by] * rows[rule.by].to_numpy(float)
    finite = np.isfinite(risk)
    if rule.threshold is not None:
        return finite & (risk < Select.RISK[rule.by] * rule.threshold)
    assert rule.share is not None
    order = np.argsort(np.where(finite, risk, np.inf), kind="stable")
    kept = np.zeros(len(rows), dtype=bool)
    kept[order[: max(1, math.floor(rule.share * len(rows)))]] = True
    return kept & finite

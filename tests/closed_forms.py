"""Closed forms of the incentives, as oracles for autograd: name -> (loss, batch) -> (d_w, d_l).

Written from the derivatives, not from the losses. Pair losses give two `(B,)`, token losses `(B, T)` and
`(B, U)`. In a formula: rw, rl log-ratios, D = rw - rl, w, l log-probs, nw, nl lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses import PairLogps

Pair = tuple[Tensor, Tensor]
Function = Callable[[Tensor], Tensor]
CLOSED_FORMS: dict[str, Callable[[Any, Numbers], Pair]] = {}
"""By the loss's name."""


@dataclass(frozen=True)
class Numbers:
    """The batch under the letters of the formulas."""

    batch: PairLogps
    w: Tensor
    l: Tensor  # noqa: E741
    rw: Tensor
    rl: Tensor
    nw: Tensor
    nl: Tensor

    @classmethod
    def of(cls, batch: PairLogps) -> Numbers:
        """Reads a batch that has everything."""
        return cls(
            batch,
            w=batch.chosen,
            l=batch.rejected,
            rw=batch.logratio_chosen,
            rl=batch.logratio_rejected,
            nw=batch.length_chosen.double(),
            nl=batch.length_rejected.double(),
        )

    @property
    def gap(self) -> Tensor:
        """The judge's gap."""
        assert self.batch.score_gap is not None
        return self.batch.score_gap

    @property
    def D(self) -> Tensor:  # noqa: N802
        """DPO's margin."""
        return self.rw - self.rl

    @property
    def mean_D(self) -> Tensor:  # noqa: N802
        """Margin of averaged log-ratios."""
        return self.rw / self.nw - self.rl / self.nl

    @property
    def mean_m(self) -> Tensor:
        """Margin of averaged log-probs."""
        return self.w / self.nw - self.l / self.nl

    @property
    def zero(self) -> Tensor:
        """Zeros."""
        return torch.zeros_like(self.w)


def closed_form(loss: Any, batch: PairLogps) -> Pair:
    """Incentives of one loss on a batch."""
    return CLOSED_FORMS[loss.name](loss, Numbers.of(batch))


def form(name: str) -> Callable:
    """Enter a function in the table."""

    def enter(function: Callable[[Any, Numbers], Pair]) -> Callable[[Any, Numbers], Pair]:
        assert name not in CLOSED_FORMS
        CLOSED_FORMS[name] = function
        return function

    return enter


def same(name: str) -> Callable:
    """Enter a function that gives d_w = d_l."""

    def enter(function: Callable[[Any, Numbers], Tensor]) -> Callable[[Any, Numbers], Tensor]:
        form(name)(lambda loss, n: (function(loss, n),) * 2)
        return function

    return enter


def per_length(name: str) -> Callable:
    """Enter a function of a margin of averages: d_w = f / n_w, d_l = f / n_l."""

    def enter(function: Callable[[Any, Numbers], Tensor]) -> Callable[[Any, Numbers], Tensor]:
        form(name)(lambda loss, n: (function(loss, n) / n.nw, function(loss, n) / n.nl))
        return function

    return enter


s = torch.sigmoid


def slope(x: Tensor) -> Tensor:
    """s'(x) = s(x) s(-x)."""
    return s(x) * s(-x)


def tangent_exp(x: Tensor) -> Tensor:
    """Derivative of the capped exponential: e^min(x, 60)."""
    return torch.exp(x.clamp(max=60.0))


# --- margin

same("dpo")(lambda h, n: h.beta * s(-h.beta * n.D))
same("cdpo")(lambda h, n: h.beta * ((1 - h.label_smoothing) - s(h.beta * n.D)))
same("hinge")(lambda h, n: h.beta * (h.beta * n.D < 1).double())
same("ipo")(lambda h, n: 1 / h.tau - 2 * n.D)
same("odpo")(lambda h, n: h.beta * s(h.alpha * n.gap.log() - h.beta * n.D))
same("rdpo")(lambda h, n: h.beta * s(-(h.beta * n.D + h.alpha * (n.nw - n.nl))))
same("gpo_exp")(lambda h, n: h.beta * tangent_exp(-h.beta * n.D))


@same("robust")
def _robust(h: Any, n: Numbers) -> Tensor:
    e, z = h.label_smoothing, h.beta * n.D
    return h.beta * ((1 - e) * s(-z) + e * s(z)) / (1 - 2 * e)


@same("exo_pair")
def _exo(h: Any, n: Numbers) -> Tensor:
    z, e = h.beta * n.D, h.label_smoothing
    return h.beta * slope(z) * (math.log((1 - e) / e) - z)


@same("discopop")
def _discopop(h: Any, n: Numbers) -> Tensor:
    z = h.beta * n.D
    modulation, other = s(z / h.tau), s(-z / h.tau)
    exponential = torch.exp(torch.nn.functional.logsigmoid(z / h.tau) - z)  # M e^-z
    logistic = torch.nn.functional.softplus(-z)
    blend = other * exponential - modulation * other * logistic
    return h.beta * (other * s(-z) + exponential - blend / h.tau)


# --- normalised

per_length("ipo_avg")(lambda h, n: 1 / h.tau - 2 * n.mean_D)
per_length("sigmoid_norm")(lambda h, n: h.beta * s(-h.beta * n.mean_D))
per_length("simpo")(lambda h, n: h.beta * s(-(h.beta * n.mean_m - h.gamma)))
per_length("simpo_hinge")(lambda h, n: h.beta * (h.beta * n.mean_m - h.gamma < 1).double())
per_length("repo")(lambda h, n: (n.mean_m < h.gamma).double())


@form("orpo")
def _orpo(h: Any, n: Numbers) -> Pair:
    w, l = n.w / n.nw, n.l / n.nl  # noqa: E741
    log_odds = (w - torch.log1p(-w.exp())) - (l - torch.log1p(-l.exp()))
    d = h.odds_weight * s(-log_odds)
    return 1 / n.nw + d / n.nw / (1 - w.exp()), d / n.nl / (1 - l.exp())


@form("alphapo")
def _alphapo(h: Any, n: Numbers) -> Pair:
    w, l = n.w / n.nw, n.l / n.nl  # noqa: E741
    rewards = [(1 - torch.exp(-h.alpha * x)) / h.alpha for x in (w, l)]
    d = h.beta * s(-(h.beta * (rewards[0] - rewards[1]) - h.gamma))
    return d * torch.exp(-h.alpha * w) / n.nw, d * torch.exp(-h.alpha * l) / n.nl


@form("rrhf")
def _rrhf(h: Any, n: Numbers) -> Pair:
    active = (n.mean_m < 0).double()
    return active / n.nw + h.nll_weight, active / n.nl


# --- anchored


@form("dpop")
def _dpop(h: Any, n: Numbers) -> Pair:
    falls = (n.rw < 0).double()
    d = h.beta * s(-h.beta * (n.D + h.penalty * falls * n.rw))
    return d * (1 + h.penalty * falls), d


@form("dpo_shift")
def _dpo_shift(h: Any, n: Numbers) -> Pair:
    d = h.beta * s(-h.beta * (n.rw - h.shift * n.rl))
    return d, h.shift * d


@form("mappo")
def _mappo(h: Any, n: Numbers) -> Pair:
    gap = n.gap
    d = h.beta * s(-h.beta * (n.rw - gap * n.rl))
    return d, gap * d


@form("minor_dpo")
def _minor(h: Any, n: Numbers) -> Pair:
    rises = (n.rl > 0).double()
    d = h.beta * s(-h.beta * (n.rw - rises * n.rl))
    return d, d * rises


@form("bpo")
def _bpo(h: Any, n: Numbers) -> Pair:
    other = -h.gap_adaptor * n.rl
    d = h.beta * s(-h.beta * torch.where(n.rw < other, n.rw, other))
    share = (n.rw < other).double() + (n.rw == other).double() / 2
    return d * share, d * h.gap_adaptor * (1 - share)


@form("cal_dpo")
def _cal(h: Any, n: Numbers) -> Pair:
    return s(-n.D) + 1 / (2 * h.beta) - n.rw, s(-n.D) + 1 / (2 * h.beta) + n.rl


@form("rpo")
def _rpo(h: Any, n: Numbers) -> Pair:
    d = h.beta * s(-h.beta * n.D)
    return d + h.alpha / n.nw, d


@form("mpo")
def _mpo(h: Any, n: Numbers) -> Pair:
    d = h.preference_weight * h.beta * s(-h.beta * n.D)
    chosen = h.quality_weight * h.beta * s(-h.beta * n.rw) + h.generation_weight / n.nw
    return d + chosen, d + h.quality_weight * h.beta * s(h.beta * n.rl)


@form("cpo")
def _cpo(h: Any, n: Numbers) -> Pair:
    d = h.beta * s(-h.beta * (n.w - n.l))
    return d + h.nll_weight, d


@form("cpo_hinge")
def _cpo_hinge(h: Any, n: Numbers) -> Pair:
    d = h.beta * (h.beta * (n.w - n.l) < 1).double()
    return d + h.nll_weight, d


@form("cpo_ipo")
def _cpo_ipo(h: Any, n: Numbers) -> Pair:
    d = 1 / h.tau - 2 * n.mean_m
    return d / n.nw + h.nll_weight, d / n.nl


@form("slic")
def _slic(h: Any, n: Numbers) -> Pair:
    active = (n.w - n.l < h.delta).double()
    return active + h.nll_weight, active


# --- pointwise

form("bco_pair")(lambda h, n: (h.beta * s(-h.beta * n.rw), h.beta * s(h.beta * n.rl)))
form("nca_pair")(lambda h, n: (h.beta * (1 - 1.5 * s(h.beta * n.rw)), h.beta / 2 * s(h.beta * n.rl)))
form("apo_zero")(lambda h, n: (h.beta * slope(h.beta * n.rw), h.beta * slope(h.beta * n.rl)))
form("apo_down")(
    lambda h, n: (h.beta * (slope(h.beta * n.D) - slope(h.beta * n.rw)), h.beta * slope(h.beta * n.D))
)
form("sppo_hard")(lambda h, n: (1 / h.beta - 2 * n.rw, 1 / h.beta + 2 * n.rl))
form("bce")(lambda h, n: (s(-n.rw), s(n.rl)))
form("lsif")(lambda h, n: (tangent_exp(n.rw), tangent_exp(2 * n.rl)))
form("ukl")(lambda h, n: (torch.ones_like(n.w), tangent_exp(n.rl)))
form("npo")(lambda h, n: (n.zero, 2 * s(h.beta * n.rl)))
form("sft")(lambda h, n: (1 / n.nw, n.zero))
form("sft_sum")(lambda h, n: (torch.ones_like(n.w), n.zero))


@form("ddro")
def _ddro(h: Any, n: Numbers) -> Pair:
    rate = tangent_exp(n.rl)
    return torch.ones_like(n.w), torch.where(rate < 2 - 1e-6, rate / (2 - rate), 1e6 * rate)


@form("unlikelihood")
def _unlikelihood(h: Any, n: Numbers) -> Pair:
    p = torch.exp(n.l / n.nl)
    return n.zero, p / (1 - p) / n.nl


# --- divergence


def _linked(h: Any, n: Numbers, link: Function, slope_of_link: Function) -> Pair:
    d = h.beta * s(-h.beta * (link(n.rw) - link(n.rl)))
    return d * slope_of_link(n.rw), d * slope_of_link(n.rl)


form("f_dpo_forward_kl")(lambda h, n: _linked(h, n, lambda t: 1 - capped(-t), lambda t: tangent_exp(-t)))
form("f_dpo_js")(lambda h, n: _linked(h, n, torch.nn.functional.logsigmoid, lambda t: s(-t)))
form("chipo")(lambda h, n: _linked(h, n, lambda t: t + capped(t), lambda t: 1 + tangent_exp(t)))


@form("f_dpo_alpha")
def _f_dpo_alpha(h: Any, n: Numbers) -> Pair:
    order = h.alpha - 1
    return _linked(h, n, lambda t: (capped(order * t) - 1) / order, lambda t: tangent_exp(order * t))


def capped(x: Tensor) -> Tensor:
    """The exponential, linear beyond 60."""
    return torch.where(x < 60, x.clamp(max=60.0).exp(), math.exp(60) * (1 + x - 60))


# --- batch


@form("kto")
def _kto(h: Any, n: Numbers) -> Pair:
    point = h.reference_point
    if point is None:
        point = max(0.0, float((n.rw.sum() + n.rl.sum()) / (2 * len(n.rw))))
    chosen = h.desirable_weight * h.beta * slope(h.beta * (n.rw - point))
    return chosen, h.undesirable_weight * h.beta * slope(h.beta * (point - n.rl))


@form("bco")
def _bco(h: Any, n: Numbers) -> Pair:
    shift = h.beta * float((n.rw.mean() + n.rl.mean()) / 2) if h.shift is None else h.shift
    return h.beta * s(shift - h.beta * n.rw), h.beta * s(h.beta * n.rl - shift)


@same("aot")
def _aot(h: Any, n: Numbers) -> Tensor:
    margin, reference = n.w - n.l, (n.w - n.rw) - (n.l - n.rl)
    order = sorted(range(len(margin)), key=lambda i: float(margin[i]))
    z = h.beta * (margin[order] - reference.sort().values)
    return torch.empty_like(z).index_put((torch.tensor(order),), h.beta * ((1 - h.label_smoothing) - s(z)))


@form("aot_unpaired")
def _aot_unpaired(h: Any, n: Numbers) -> Pair:
    z = h.beta * (n.rw.sort().values - n.rl.sort().values)
    d = h.beta * ((1 - h.label_smoothing) - s(z))
    orders = [sorted(range(len(z)), key=lambda i, r=ratio: float(r[i])) for ratio in (n.rw, n.rl)]
    chosen, rejected = (torch.empty_like(z).index_put((torch.tensor(order),), d) for order in orders)
    return chosen, rejected


@same("beta_dpo")
def _beta_dpo(h: Any, n: Numbers) -> Tensor:
    beta = max(1e-3, h.beta * (1 + h.alpha * (float(n.D.mean()) - h.running_margin)))
    return beta * s(-beta * n.D)


@per_length("alpha_dpo")
def _alpha_dpo(h: Any, n: Numbers) -> Tensor:
    spread = max(1e-6, float(n.mean_D.var(correction=0)) ** 0.5)
    target = h.gamma_beta_ratio + h.alpha * (n.mean_D - n.mean_D.mean()) / spread
    return h.beta * s(-h.beta * (n.mean_m - target))


form("sft_batch")(lambda h, n: (torch.full_like(n.w, len(n.w)) / n.nw.sum(), n.zero))


# --- tokens


def _masks(n: Numbers) -> Pair:
    return n.batch.by_token.mask_chosen.double(), n.batch.by_token.mask_rejected.double()


def _ratios(n: Numbers) -> Pair:
    tokens = n.batch.by_token
    return tokens.chosen - tokens.statistic("ref_chosen"), tokens.rejected - tokens.statistic("ref_rejected")


def _spread(d: Tensor, weights: Pair) -> Pair:
    return d[:, None] * weights[0], d[:, None] * weights[1]


@form("ld_dpo")
def _ld_dpo(h: Any, n: Numbers) -> Pair:
    public = torch.minimum(n.nw, n.nl)[:, None]
    masks, ratios = _masks(n), _ratios(n)
    chosen, rejected = (m * (1 - (1 - h.alpha) * (m.cumsum(1) > public).double()) for m in masks)
    margin = (chosen * ratios[0]).sum(1) - (rejected * ratios[1]).sum(1)
    return _spread(h.beta * s(-h.beta * margin), (chosen, rejected))


def _sequence_kl(n: Numbers) -> Pair:
    tokens = n.batch.by_token
    return tokens.statistic("kl_chosen").sum(1), tokens.statistic("kl_rejected").sum(1)


@form("tdpo1")
def _tdpo1(h: Any, n: Numbers) -> Pair:
    chosen, rejected = _sequence_kl(n)
    return _spread(h.beta * s(-h.beta * (n.D - rejected + chosen)), _masks(n))


@form("tdpo2")
def _tdpo2(h: Any, n: Numbers) -> Pair:
    chosen, rejected = _sequence_kl(n)
    return _spread(h.beta * s(-h.beta * (n.D - h.alpha * (rejected - chosen))), _masks(n))


@form("tidpo")
def _tidpo(h: Any, n: Numbers) -> Pair:
    tokens, ratios = n.batch.by_token, _ratios(n)
    doubts = [1 - logps.exp() for logps in (tokens.chosen, tokens.rejected)]
    chosen, rejected = (doubt / doubt.sum(1, keepdim=True) for doubt in doubts)
    margin = (chosen * ratios[0]).sum(1) - (rejected * ratios[1]).sum(1)
    return _spread(h.beta * s(-h.beta * margin), (chosen, rejected))


@form("wpo")
def _wpo(h: Any, n: Numbers) -> Pair:
    tokens = n.batch.by_token
    chosen = (tokens.chosen - tokens.statistic("log_collision_chosen")).sum(1) / n.nw
    rejected = (tokens.rejected - tokens.statistic("log_collision_rejected")).sum(1) / n.nl
    weight = (chosen.exp() * rejected.exp()).clamp(max=h.max_weight)
    return _spread(weight * h.beta * s(-h.beta * n.D), _masks(n))


# --- compose


@form("weighted_sum")
def _weighted_sum(h: Any, n: Numbers) -> Pair:
    parts = [_as_wide(part, h, n) for part in h.losses]
    weights = torch.tensor(h.weights, dtype=torch.float64)
    chosen, rejected = (torch.stack([part[side] for part in parts], dim=-1) @ weights for side in (0, 1))
    return chosen, rejected


@form("with_sft")
def _with_sft(h: Any, n: Numbers) -> Pair:
    inside, sft = _as_wide(h.loss, h, n), _as_wide(h.sft, h, n)
    return inside[0] + h.alpha * sft[0], inside[1]


def _as_wide(part: Any, whole: Any, n: Numbers) -> Pair:
    """A part's incentives, per token where the whole loss reads tokens."""
    chosen, rejected = CLOSED_FORMS[part.name](part, n)
    if part.needs_tokens or not whole.needs_tokens:
        return chosen, rejected
    masks = _masks(n)
    return chosen[:, None] * masks[0], rejected[:, None] * masks[1]

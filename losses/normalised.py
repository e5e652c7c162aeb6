"""Losses of per-token averages: incentives carry 1/n_w and 1/n_l, so rho depends on the two lengths.

`beta` here multiplies nats *per token*: it isn't comparable with DPO's, which multiplies summed nats.

SimPO divides by lengths, so rho = n_l / n_w = 15 / 10:

    >>> import torch
    >>> pair = PairLogps(*torch.tensor([[-20.0], [-30.0], [10.0], [15.0], [-21.0], [-28.0]]))  # r_w = 1, r_l = -2
    >>> found = SimPO().incentives(pair)
    >>> round(float(found.chosen / found.rejected), 4)
    1.5
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from losses.base import PairLogps, PreferenceLoss, register, require
from losses.numerics import capped_expm1, log1mexp

__all__ = ["IPOAverage", "SigmoidNorm", "SimPO", "SimPOHinge", "ORPO", "AlphaPO", "RePO", "RRHF"]


@register
class IPOAverage(PreferenceLoss):
    """IPO on per-token averages: (Db - 1/(2 tau))^2, Db = r_w/n_w - r_l/n_l.

    d_w = (1/tau - 2 Db)/n_w, d_l = (1/tau - 2 Db)/n_l: both negative once Db > 1/(2 tau).

    Args:
        tau: 1/(2 tau) is the target in nats *per token*; 0.1 (TRL's default, called beta there).

    Paper: arXiv 2310.12036; this averaged form is TRL's.
    """

    name: ClassVar = "ipo_avg"
    paper: ClassVar = "2310.12036"
    trl: ClassVar = "ipo"
    trl_options: ClassVar = {"beta": "tau"}
    ratio: ClassVar = "n_l/n_w"
    ideal: ClassVar = "c/A < n_l/n_w < B/c while Db < 1/(2 tau); beyond it both incentives are negative"
    needs_lengths: ClassVar = True

    tau: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.tau > 0, "tau > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Squared distance of the averaged margin from its target, `(B,)`."""
        return (_mean_logratio_margin(logps) - 1 / (2 * self.tau)) ** 2


@register
class SigmoidNorm(PreferenceLoss):
    """Length-normalised DPO: -ln s(beta (r_w/n_w - r_l/n_l)).

    d_w = (beta/n_w) s(-beta Db), d_l = (beta/n_l) s(-beta Db).

    Args:
        beta: per nat *per token*; 0.1 in TRL (values near 5 are what DPO's 0.1 means at 50 tokens).

    Paper: arXiv 2411.15124 (Tulu 3).
    """

    name: ClassVar = "sigmoid_norm"
    paper: ClassVar = "2411.15124"
    trl: ClassVar = "sigmoid_norm"
    ratio: ClassVar = "n_l/n_w"
    needs_lengths: ClassVar = True
    trap: ClassVar = (
        "TRL's default beta 0.1 is DPO's, though here it multiplies nats per token: weak incentives."
    )

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the averaged margin, `(B,)`."""
        return -F.logsigmoid(self.beta * _mean_logratio_margin(logps))


@register
class SimPO(PreferenceLoss):
    """Simple preference optimisation: -ln s(z), z = beta (w/n_w - l/n_l) - gamma.

    d_w = (beta/n_w) s(-z), d_l = (beta/n_l) s(-z).

    Args:
        beta: per nat *per token*; 2 (authors; they use 2 to 10).
        gamma: target margin in units of z; 0.5 (authors: gamma/beta = 0.25. Other code takes that ratio).

    Paper: arXiv 2405.14734, equation 6.
    """

    name: ClassVar = "simpo"
    paper: ClassVar = "2405.14734"
    trl: ClassVar = "CPO: simpo"
    trl_options: ClassVar = {"simpo_gamma": "gamma"}
    ratio: ClassVar = "n_l/n_w"
    needs_reference: ClassVar = False
    needs_lengths: ClassVar = True
    trap: ClassVar = "TRL's default beta is 0.1 (with gamma 0.5, cpo_alpha 1), far from the authors' 2."

    beta: float = 2.0
    gamma: float = 0.5

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the averaged margin over gamma, `(B,)`."""
        return -F.logsigmoid(self.beta * _mean_policy_margin(logps) - self.gamma)


@register
class SimPOHinge(PreferenceLoss):
    """SimPO with a hinge: max(0, 1 - z), z = beta (w/n_w - l/n_l) - gamma.

    d_w = (beta/n_w) 1[z < 1], d_l = (beta/n_l) 1[z < 1].

    Args:
        beta: per nat *per token*; 2.
        gamma: target margin in units of z; 0.5.

    Paper: arXiv 2405.14734; the hinge is an option of its authors' code.
    """

    name: ClassVar = "simpo_hinge"
    paper: ClassVar = "2405.14734"
    ratio: ClassVar = "n_l/n_w"
    ideal: ClassVar = "c/A < n_l/n_w < B/c while z < 1; beyond it the pair doesn't act"
    needs_reference: ClassVar = False
    needs_lengths: ClassVar = True

    beta: float = 2.0
    gamma: float = 0.5

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """max(0, 1 - z), `(B,)`; gradient 0 at the kink."""
        return F.relu(1 - (self.beta * _mean_policy_margin(logps) - self.gamma))


@register
class ORPO(PreferenceLoss):
    """Odds-ratio preference optimisation: -w/n_w - lambda ln s(o), o = logit(e^(w/n_w)) - logit(e^(l/n_l)).

    d_w = 1/n_w + (lambda/n_w) s(-o)/(1 - e^(w/n_w)), d_l = (lambda/n_l) s(-o)/(1 - e^(l/n_l)).
    A mean token probability above 1 - 1e-6 counts as that.

    Args:
        odds_weight: lambda, weight of the odds term beside the NLL per token; 0.1 in TRL (called beta there;
            the authors' code uses 1).

    Paper: arXiv 2403.07691, equations 6 and 7.
    """

    name: ClassVar = "orpo"
    paper: ClassVar = "2403.07691"
    trl: ClassVar = "ORPO"
    trl_options: ClassVar = {"beta": "odds_weight"}
    ratio: ClassVar = "(n_l/n_w) [1/(lambda s(-o)) + 1/(1-e^(w/n_w))] (1-e^(l/n_l))"
    needs_reference: ClassVar = False
    needs_lengths: ClassVar = True
    trap: ClassVar = "TRL's NLL averages over prompt and response tokens; this one over the response's."

    odds_weight: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.odds_weight >= 0, "odds_weight >= 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """NLL per token plus the weighted odds term, `(B,)`."""
        chosen, rejected = logps.mean_chosen, logps.mean_rejected
        log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
        return -chosen - self.odds_weight * F.logsigmoid(log_odds)


@register
class AlphaPO(PreferenceLoss):
    """SimPO with a reshaped reward: -ln s(beta (R_w - R_l) - gamma), R = (1 - e^(-alpha x/n))/alpha.

    d_w = (beta/n_w) e^(-alpha w/n_w) s(-z), d_l = (beta/n_l) e^(-alpha l/n_l) s(-z), z the argument of s.
    The exponent goes on along its tangent beyond 60. alpha = 0 is SimPO.

    Args:
        beta: per unit of reward, as SimPO's; 2 (SimPO authors').
        gamma: target margin in units of z; 0.5.
        alpha: shape, per (nat per token); 0.25 here, no default of the authors confirmed (TRL: 0 = SimPO).

    Paper: arXiv 2501.03884.
    """

    name: ClassVar = "alphapo"
    paper: ClassVar = "2501.03884"
    trl: ClassVar = "CPO: simpo with alpha"
    trl_options: ClassVar = {"simpo_gamma": "gamma"}
    ratio: ClassVar = "(n_l/n_w) e^(-alpha (w/n_w - l/n_l))"
    needs_reference: ClassVar = False
    needs_lengths: ClassVar = True

    beta: float = 2.0
    gamma: float = 0.5
    alpha: float = 0.25

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the reshaped margin over gamma, `(B,)`."""
        margin = self._reward(logps.mean_chosen) - self._reward(logps.mean_rejected)
        return -F.logsigmoid(self.beta * margin - self.gamma)

    def _reward(self, mean: Tensor) -> Tensor:
        return mean if self.alpha == 0 else -capped_expm1(-self.alpha * mean) / self.alpha


@register
class RePO(PreferenceLoss):
    """ReLU-based preference optimisation: max(0, gamma - (w/n_w - l/n_l)).

    d_w = 1[mb < gamma]/n_w, d_l = 1[mb < gamma]/n_l, mb the averaged margin.

    Args:
        gamma: target margin in nats *per token* (SimPO's gamma/beta); 0.5 (released configs: 0.4 to 0.6).

    Paper: arXiv 2503.07426.
    """

    name: ClassVar = "repo"
    paper: ClassVar = "2503.07426"
    ratio: ClassVar = "n_l/n_w"
    ideal: ClassVar = "c/A < n_l/n_w < B/c while mb < gamma; beyond it the pair doesn't act"
    needs_reference: ClassVar = False
    needs_lengths: ClassVar = True

    gamma: float = 0.5

    def per_pair(self, logps: PairLogps) -> Tensor:
        """max(0, gamma - mb), `(B,)`; gradient 0 at the kink."""
        return F.relu(self.gamma - _mean_policy_margin(logps))


@register
class RRHF(PreferenceLoss):
    """Rank responses to align: max(0, l/n_l - w/n_w) - lambda w.

    d_w = 1[w/n_w < l/n_l]/n_w + lambda, d_l = 1[w/n_w < l/n_l]/n_l.

    Args:
        nll_weight: lambda, per nat of the *summed* chosen log-prob; 1 (both terms unweighted). The authors'
            code weighs 100 to 1, with the NLL as a mean over tokens.

    Paper: arXiv 2304.05302. The released code of arXiv 2410.13828 has no NLL term (nll_weight = 0).
    """

    name: ClassVar = "rrhf"
    paper: ClassVar = "2304.05302"
    ratio: ClassVar = "n_l/n_w + lambda n_l where misordered"
    ideal: ClassVar = "misordered: c/A < rho < B/c; ordered: SFT, ideal iff c < 0 (inactive if lambda = 0)"
    needs_reference: ClassVar = False
    needs_lengths: ClassVar = True

    nll_weight: float = 1.0

    def __post_init__(self) -> None:
        require(self, self.nll_weight >= 0, "nll_weight >= 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Ranking hinge plus the weighted NLL, `(B,)`; the hinge's gradient is 0 at its kink."""
        return F.relu(-_mean_policy_margin(logps)) - self.nll_weight * logps.chosen


def _mean_logratio_margin(logps: PairLogps) -> Tensor:
    return logps.logratio_chosen / logps.length_chosen - logps.logratio_rejected / logps.length_rejected


def _mean_policy_margin(logps: PairLogps) -> Tensor:
    return logps.mean_chosen - logps.mean_rejected

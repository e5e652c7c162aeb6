"""DPO under other divergences: -ln s(beta (S(r_w) - S(r_l))) with a link S; S(t) = t is DPO itself.

d_w = beta s(-q) S'(r_w), d_l = beta s(-q) S'(r_l), q the argument of s: rho = S'(r_w)/S'(r_l).

Under Jensen-Shannon rho = s(-r_w) / s(-r_l) = s(-1) / s(2):

    >>> import torch
    >>> pair = PairLogps(*torch.tensor([[-20.0], [-30.0], [10.0], [15.0], [-21.0], [-28.0]]))  # r_w = 1, r_l = -2
    >>> found = FDPOJS(beta=0.1).incentives(pair)
    >>> round(float(found.chosen / found.rejected), 4)
    0.3053
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from losses.base import PairLogps, PreferenceLoss, register, require
from losses.numerics import capped_exp, capped_expm1

__all__ = ["ChiPO", "FDPOAlpha", "FDPOForwardKL", "FDPOJS"]


@register
class FDPOForwardKL(PreferenceLoss):
    """f-DPO with the forward KL: -ln s(beta (S(r_w) - S(r_l))), S(t) = 1 - e^-t.

    d_w = beta s(-q) e^(-r_w), d_l = beta s(-q) e^(-r_l); the exponent goes on along its tangent beyond 60.

    Args:
        beta: per unit of S; 0.1.

    Paper: arXiv 2309.16240.
    """

    name: ClassVar = "f_dpo_forward_kl"
    paper: ClassVar = "2309.16240"
    trl: ClassVar = "sigmoid, f_divergence_type forward_kl"
    ratio: ClassVar = "e^-D"
    ideal: ClassVar = "-ln(B/c) < D < -ln(c/A)"

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of S(r_w) - S(r_l) = e^(-r_l) - e^(-r_w), `(B,)`."""
        margin = capped_expm1(-logps.logratio_rejected) - capped_expm1(-logps.logratio_chosen)
        return -F.logsigmoid(self.beta * margin)


@register
class FDPOJS(PreferenceLoss):
    """f-DPO with Jensen-Shannon: -ln s(beta (S(r_w) - S(r_l))), S(t) = ln 2 + ln s(t).

    d_w = beta s(-q) s(-r_w), d_l = beta s(-q) s(-r_l).

    Args:
        beta: per unit of S; 0.1.

    Paper: arXiv 2309.16240.
    """

    name: ClassVar = "f_dpo_js"
    paper: ClassVar = "2309.16240"
    trl: ClassVar = "sigmoid, f_divergence_type js_divergence"
    ratio: ClassVar = "s(-r_w) / s(-r_l)"

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of S(r_w) - S(r_l), `(B,)`."""
        margin = F.logsigmoid(logps.logratio_chosen) - F.logsigmoid(logps.logratio_rejected)
        return -F.logsigmoid(self.beta * margin)


@register
class FDPOAlpha(PreferenceLoss):
    """f-DPO with an alpha divergence: -ln s(beta (S(r_w) - S(r_l))), S(t) = (e^((a-1) t) - 1)/(a-1).

    d_w = beta s(-q) e^((a-1) r_w), d_l = beta s(-q) e^((a-1) r_l). a = 1 is DPO. The exponent goes on along
    its tangent beyond 60 (TRL clamps it at 80, which zeroes the gradient there).

    Args:
        beta: per unit of S; 0.1.
        alpha: a, the divergence's order; 0.5 (TRL's f_alpha_divergence_coef).

    Paper: arXiv 2309.16240.
    """

    name: ClassVar = "f_dpo_alpha"
    paper: ClassVar = "2309.16240"
    trl: ClassVar = "sigmoid, f_divergence_type alpha_divergence"
    trl_options: ClassVar = {"f_alpha_divergence_coef": "alpha"}
    ratio: ClassVar = "e^((a-1) D)"

    beta: float = 0.1
    alpha: float = 0.5

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of S(r_w) - S(r_l), `(B,)`."""
        margin = self._link(logps.logratio_chosen) - self._link(logps.logratio_rejected)
        return -F.logsigmoid(self.beta * margin)

    def _link(self, logratio: Tensor) -> Tensor:
        order = self.alpha - 1
        return logratio if order == 0 else capped_expm1(order * logratio) / order


@register
class ChiPO(PreferenceLoss):
    """Chi-squared preference optimisation: -ln s(beta (S(r_w) - S(r_l))), S(t) = t + e^t.

    d_w = beta s(-q) (1 + e^(r_w)), d_l = beta s(-q) (1 + e^(r_l)); the exponent goes on along its tangent
    beyond 60. The paper clips the margin; this loss doesn't.

    Args:
        beta: per unit of S; 0.1 (no default of the authors confirmed).

    Paper: arXiv 2407.13399 (form from memory, unconfirmed).
    """

    name: ClassVar = "chipo"
    paper: ClassVar = "2407.13399"
    is_confirmed: ClassVar = False
    ratio: ClassVar = "(1 + e^(r_w)) / (1 + e^(r_l))"

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of S(r_w) - S(r_l), `(B,)`."""
        chosen, rejected = logps.logratio_chosen, logps.logratio_rejected
        margin = (chosen - rejected) + (capped_exp(chosen) - capped_exp(rejected))
        return -F.logsigmoid(self.beta * margin)

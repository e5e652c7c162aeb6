"""Losses that treat the two responses separately: d_w depends on the chosen side alone, d_l on the rejected.

So rho is a ratio of two unrelated numbers, and an incentive may be zero or negative on one side only.

BCE grades each response alone: d_w = s(-r_w) = s(-1), d_l = s(r_l) = s(-2).

    >>> pair = PairLogps(*torch.tensor([[-20.0], [-30.0], [10.0], [15.0], [-21.0], [-28.0]]))  # r_w = 1, r_l = -2
    >>> found = BCE().incentives(pair)
    >>> [round(float(d), 4) for d in (found.chosen, found.rejected)]
    [0.2689, 0.1192]
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import PairLogps, PreferenceLoss, register, require
from losses.numerics import capped_exp, log1mexp

__all__ = [
    "BCE",
    "DDRO",
    "LSIF",
    "NPO",
    "SFT",
    "SFTSum",
    "UKL",
    "APODown",
    "APOZero",
    "BCOPair",
    "NCAPair",
    "SPPOHard",
    "Unlikelihood",
]


@register
class BCOPair(PreferenceLoss):
    """Binary classifier optimisation without a shift: -ln s(beta r_w) - ln s(-beta r_l).

    d_w = beta s(-beta r_w), d_l = beta s(beta r_l).

    Args:
        beta: per nat of the summed log-ratio; 0.01 (TRL's general default is 0.1).

    Paper: arXiv 2404.04656. TRL's page prints DPO's formula, its code is this one. `bco` has the shift.
    """

    name: ClassVar = "bco_pair"
    paper: ClassVar = "2404.04656"
    trl: ClassVar = "bco_pair"
    ratio: ClassVar = "s(-beta r_w) / s(beta r_l)"

    beta: float = 0.01

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Sum of two binary cross-entropies, `(B,)`."""
        chosen, rejected = self.beta * logps.logratio_chosen, self.beta * logps.logratio_rejected
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@register
class NCAPair(PreferenceLoss):
    """Noise contrastive alignment on pairs: -ln s(beta r_w) - [ln s(-beta r_w) + ln s(-beta r_l)]/2.

    d_w = beta (1 - 1.5 s(beta r_w)), d_l = 0.5 beta s(beta r_l): d_w < 0 once beta r_w > ln 2.

    Args:
        beta: per nat of the summed log-ratio; 0.01.

    Paper: arXiv 2402.05369.
    """

    name: ClassVar = "nca_pair"
    paper: ClassVar = "2402.05369"
    trl: ClassVar = "nca_pair"
    ratio: ClassVar = "(2 - 3 s(beta r_w)) / s(beta r_l)"
    ideal: ClassVar = "beta r_w < ln 2: c/A < rho < B/c; beyond it both are lowered, both_down if c >= 0"

    beta: float = 0.01

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """The chosen response against noise, both responses as noise, `(B,)`."""
        chosen, rejected = self.beta * logps.logratio_chosen, self.beta * logps.logratio_rejected
        return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


@register
class APOZero(PreferenceLoss):
    """Anchored preference optimisation, zero: 1 - s(beta r_w) + s(beta r_l).

    d_w = beta s'(beta r_w), d_l = beta s'(beta r_l), s' = s (1 - s).

    Args:
        beta: per nat of the summed log-ratio; 0.1.

    Paper: arXiv 2408.06266. TRL's KTO trainer calls the same loss apo_zero_unpaired.
    """

    name: ClassVar = "apo_zero"
    paper: ClassVar = "2408.06266"
    trl: ClassVar = "apo_zero"
    ratio: ClassVar = "s'(beta r_w) / s'(beta r_l)"
    trap: ClassVar = "s' is even: a response that went the wrong way is given up as soon as a learned one."

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Chosen up and rejected down, `(B,)`; s(-x) for 1 - s(x) keeps the digits at large margins."""
        chosen, rejected = self.beta * logps.logratio_chosen, self.beta * logps.logratio_rejected
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@register
class APODown(PreferenceLoss):
    """Anchored preference optimisation, down: s(beta r_w) + 1 - s(beta D).

    d_w = beta [s'(beta D) - s'(beta r_w)], d_l = beta s'(beta D): d_w > 0 iff |D| < |r_w|.

    Args:
        beta: per nat of the summed log-ratio; 0.1.

    Paper: arXiv 2408.06266.
    """

    name: ClassVar = "apo_down"
    paper: ClassVar = "2408.06266"
    trl: ClassVar = "apo_down"
    ratio: ClassVar = "1 - s'(beta r_w)/s'(beta D)"
    ideal: ClassVar = "|D| < |r_w|: c/A < rho < B/c; otherwise both are lowered, both_down if c >= 0"
    trap: ClassVar = "It is meant to lower the chosen response; at the reference point d_w = 0."

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Both down, the rejected one more, `(B,)`."""
        chosen, margin = self.beta * logps.logratio_chosen, self.beta * logps.logratio_margin
        return torch.sigmoid(chosen) + torch.sigmoid(-margin)


@register
class SPPOHard(PreferenceLoss):
    """Self-play preference optimisation, hard labels: (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2.

    d_w = 1/beta - 2 r_w, d_l = 1/beta + 2 r_l: negative beyond the targets.

    Args:
        beta: 1/(2 beta) is the target log-ratio in summed nats; 0.001 (authors; they take half of this loss).

    Paper: arXiv 2405.00675.
    """

    name: ClassVar = "sppo_hard"
    paper: ClassVar = "2405.00675"
    trl: ClassVar = "sppo_hard"
    ratio: ClassVar = "(1/beta - 2 r_w) / (1/beta + 2 r_l)"
    ideal: ClassVar = "short of both targets: c/A < rho < B/c; past the rejected one both are raised"
    trap: ClassVar = "Incentives have the size of 1/beta, about 1000: compare rho, not the incentives."

    beta: float = 0.001

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Squared distances of both log-ratios from their targets, `(B,)`."""
        target = 1 / (2 * self.beta)
        return (logps.logratio_chosen - target) ** 2 + (logps.logratio_rejected + target) ** 2


@register
class BCE(PreferenceLoss):
    """Density-ratio estimation by binary cross-entropy: -ln s(r_w) - ln s(-r_l).

    d_w = s(-r_w), d_l = s(r_l): `bco_pair` at beta = 1.

    Paper: the released code of arXiv 2604.18239 (which feeds log-probs averaged over tokens).
    """

    name: ClassVar = "bce"
    paper: ClassVar = "2604.18239"
    ratio: ClassVar = "s(-r_w) / s(r_l)"

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Sum of two binary cross-entropies, `(B,)`."""
        return -F.logsigmoid(logps.logratio_chosen) - F.logsigmoid(-logps.logratio_rejected)


@register
class LSIF(PreferenceLoss):
    """Density-ratio estimation by least squares: -e^(r_w) + e^(2 r_l)/2.

    d_w = e^(r_w), d_l = e^(2 r_l); exponents go on along their tangents beyond 60.

    Paper: the released code of arXiv 2604.18239 (which feeds log-probs averaged over tokens).
    """

    name: ClassVar = "lsif"
    paper: ClassVar = "2604.18239"
    ratio: ClassVar = "e^(r_w - 2 r_l)"
    trap: ClassVar = "On summed log-ratios of long responses the exponentials over- or underflow at once."

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Chosen ratio up, squared rejected ratio down, `(B,)`."""
        return capped_exp(2 * logps.logratio_rejected) / 2 - capped_exp(logps.logratio_chosen)


@register
class UKL(PreferenceLoss):
    """Density-ratio estimation by unnormalised KL: -w + e^(r_l).

    d_w = 1, d_l = e^(r_l); the exponent goes on along its tangent beyond 60.

    Paper: the released code of arXiv 2604.18239 (which feeds log-probs averaged over tokens).
    """

    name: ClassVar = "ukl"
    paper: ClassVar = "2604.18239"
    ratio: ClassVar = "e^(-r_l)"
    ideal: ClassVar = "ln(c/A) < -r_l < ln(B/c)"

    def per_pair(self, logps: PairLogps) -> Tensor:
        """NLL of the chosen response plus the rejected one's ratio, `(B,)`."""
        return capped_exp(logps.logratio_rejected) - logps.chosen


@register
class DDRO(PreferenceLoss):
    """Direct density ratio optimisation: 2 ln 2 - r_w - ln(2 - e^(r_l)).

    d_w = 1, d_l = e^(r_l)/(2 - e^(r_l)). Beyond e^(r_l) = 2 - 1e-6 the last term goes on linearly in e^(r_l),
    d_l = 1e6 e^(r_l), and the exponent along its tangent beyond 60.

    Paper: the released code of arXiv 2604.18239 (which feeds log-probs averaged over tokens).
    """

    name: ClassVar = "ddro"
    paper: ClassVar = "2604.18239"
    ratio: ClassVar = "2 e^(-r_l) - 1 while e^(r_l) < 2"
    trap: ClassVar = "A rejected response twice as likely as under the reference gets an incentive of 1e6."

    def per_pair(self, logps: PairLogps) -> Tensor:
        """NLL ratio of the chosen response plus a barrier at r_l = ln 2, `(B,)`."""
        rate = capped_exp(logps.logratio_rejected)
        edge = 2 - 1e-6
        within = rate < edge
        barrier = -torch.log(2 - torch.where(within, rate, 0.0))
        beyond = (rate - edge) / 1e-6 - math.log(1e-6)
        return 2 * math.log(2) - logps.logratio_chosen + torch.where(within, barrier, beyond)


@register
class NPO(PreferenceLoss):
    """Negative preference optimisation: -(2/beta) ln s(-beta r_l).

    d_w = 0, d_l = 2 s(beta r_l).

    Args:
        beta: per nat of the summed log-ratio; 0.1.

    Paper: arXiv 2404.05868; as in the authors' code, where the rejected responses are a set to be forgotten.
    """

    name: ClassVar = "npo"
    paper: ClassVar = "2404.05868"
    ratio: ClassVar = "0"
    ideal: ClassVar = "c < 0; with c > 0 lowering the rejected response lowers the chosen one too (both_down)"

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Unlearning the rejected response, `(B,)`."""
        return -2 / self.beta * F.logsigmoid(-self.beta * logps.logratio_rejected)


@register
class Unlikelihood(PreferenceLoss):
    """Sequence unlikelihood of the rejected response: -ln(1 - e^(l/n_l)).

    d_w = 0, d_l = p/(1-p)/n_l, p = e^(l/n_l) the mean token probability; above 1 - 1e-6 it counts as that.

    Paper: after arXiv 1908.04319; this form, on the response's mean token probability, is unconfirmed there.
    """

    name: ClassVar = "unlikelihood"
    paper: ClassVar = "1908.04319"
    is_confirmed: ClassVar = False
    ratio: ClassVar = "0"
    ideal: ClassVar = "c < 0; with c > 0 lowering the rejected response lowers the chosen one too (both_down)"
    needs_reference: ClassVar = False
    needs_lengths: ClassVar = True

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Minus the log-probability of not saying the rejected response, per token, `(B,)`."""
        return -log1mexp(logps.mean_rejected)


@register
class SFT(PreferenceLoss):
    """Supervised fine-tuning on the chosen response, per token: -w/n_w.

    d_w = 1/n_w, d_l = 0.

    Paper: none. TRL's `sft` is the batch's token mean: `sft_batch`. In sums: `sft_sum`.
    """

    name: ClassVar = "sft"
    paper: ClassVar = "none"
    ratio: ClassVar = "infinite"
    ideal: ClassVar = "c < 0; with c > 0 raising the chosen response raises the rejected one too (both_up)"
    needs_reference: ClassVar = False
    needs_lengths: ClassVar = True

    def per_pair(self, logps: PairLogps) -> Tensor:
        """NLL per chosen token, `(B,)`."""
        return -logps.mean_chosen


@register
class SFTSum(PreferenceLoss):
    """Supervised fine-tuning on the chosen response, summed: -w.

    d_w = 1, d_l = 0.

    Paper: none. CPO's and SLiC-HF's second term.
    """

    name: ClassVar = "sft_sum"
    paper: ClassVar = "none"
    ratio: ClassVar = "infinite"
    ideal: ClassVar = "c < 0; with c > 0 raising the chosen response raises the rejected one too (both_up)"
    needs_reference: ClassVar = False

    def per_pair(self, logps: PairLogps) -> Tensor:
        """NLL of the chosen response, `(B,)`."""
        return -logps.chosen

"""Losses that act through DPO's margin D = r_w - r_l alone: d_w = d_l, so rho = 1 at every beta.

One probe gives them one verdict, apart from the sign of d: where d < 0 the regimes are reversed.

One pair with D = r_w - r_l = 3, so that both incentives are 0.1 s(-0.3):

    >>> pair = PairLogps(*torch.tensor([[-20.0], [-30.0], [10.0], [15.0], [-21.0], [-28.0]]))  # r_w = 1, r_l = -2
    >>> found = DPO(beta=0.1).incentives(pair)
    >>> [round(float(d), 4) for d in (found.chosen, found.rejected)]
    [0.0426, 0.0426]
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import PairLogps, PreferenceLoss, register, require
from losses.numerics import capped_exp

__all__ = ["CDPO", "DPO", "EXOPair", "DiscoPOP", "GPOExp", "Hinge", "IPO", "ODPO", "RDPO", "Robust"]


@register
class DPO(PreferenceLoss):
    """Direct preference optimisation: -ln s(beta D).

    d_w = d_l = beta s(-beta D).

    Args:
        beta: per nat of the *summed* log-ratio; 0.1 in TRL and the paper.

    Paper: arXiv 2305.18290, equation 7.
    """

    name: ClassVar = "dpo"
    paper: ClassVar = "2305.18290"
    trl: ClassVar = "sigmoid"
    ratio: ClassVar = "1"

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """-ln s(beta D), `(B,)`."""
        return -F.logsigmoid(self.beta * logps.logratio_margin)


@register
class CDPO(PreferenceLoss):
    """Conservative DPO: -(1-e) ln s(beta D) - e ln s(-beta D).

    d_w = d_l = beta [(1-e) - s(beta D)]: negative once beta D > ln((1-e)/e).

    Args:
        beta: per nat of the summed log-ratio; 0.1.
        label_smoothing: e, the assumed share of flipped labels; 0.2 (HALOs code).

    Paper: E. Mitchell's note on DPO with noisy preferences (2023).
    """

    name: ClassVar = "cdpo"
    paper: ClassVar = "E. Mitchell's note, 2023"
    ratio: ClassVar = "1"
    ideal: ClassVar = "c < min(A, B) while beta D < ln((1-e)/e); beyond it both incentives are negative"
    trap: ClassVar = "TRL 1.16's `sigmoid` ignores label_smoothing: this loss isn't reachable there."

    beta: float = 0.1
    label_smoothing: float = 0.2

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")
        require(self, 0 <= self.label_smoothing < 0.5, "0 <= label_smoothing < 0.5")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Cross-entropy with the smoothed label, `(B,)`."""
        z = self.beta * logps.logratio_margin
        return -(1 - self.label_smoothing) * F.logsigmoid(z) - self.label_smoothing * F.logsigmoid(-z)


@register
class Robust(PreferenceLoss):
    """Robust DPO: [-(1-e) ln s(beta D) + e ln s(-beta D)] / (1-2e).

    d_w = d_l = beta [(1-e) s(-beta D) + e s(beta D)] / (1-2e): never vanishes, it tends to beta e / (1-2e).

    Args:
        beta: per nat of the summed log-ratio; 0.1.
        label_smoothing: e, the share of flipped labels that the loss is made unbiased for; 0.1.

    Paper: arXiv 2403.00409.
    """

    name: ClassVar = "robust"
    paper: ClassVar = "2403.00409"
    trl: ClassVar = "robust"
    ratio: ClassVar = "1"
    trap: ClassVar = "Unbounded below: the incentives never stop, however large the margin."

    beta: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")
        require(self, 0 <= self.label_smoothing < 0.5, "0 <= label_smoothing < 0.5")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Noise-corrected logistic loss, `(B,)`."""
        z, noise = self.beta * logps.logratio_margin, self.label_smoothing
        return (noise * F.logsigmoid(-z) - (1 - noise) * F.logsigmoid(z)) / (1 - 2 * noise)


@register
class Hinge(PreferenceLoss):
    """Hinge on DPO's margin (RSO): max(0, 1 - beta D).

    d_w = d_l = beta 1[beta D < 1].

    Args:
        beta: per nat of the summed log-ratio; 0.1 in TRL (RSO's paper uses 0.05).

    Paper: arXiv 2309.06657.
    """

    name: ClassVar = "hinge"
    paper: ClassVar = "2309.06657"
    trl: ClassVar = "hinge"
    ratio: ClassVar = "1"
    ideal: ClassVar = "c < min(A, B) while beta D < 1; beyond it the pair doesn't act"

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """max(0, 1 - beta D), `(B,)`; gradient 0 at the kink."""
        return F.relu(1 - self.beta * logps.logratio_margin)


@register
class IPO(PreferenceLoss):
    """Identity preference optimisation on summed log-ratios: (D - 1/(2 tau))^2.

    d_w = d_l = 1/tau - 2 D: negative once D > 1/(2 tau).

    Args:
        tau: 1/(2 tau) is the target margin in nats of the *summed* log-ratio; 0.1 (the paper's tau is the
            strength of regularisation; code that calls it beta means the same number).

    Paper: arXiv 2310.12036, equation 17. DPO's authors' code has this form; TRL's `ipo` is `ipo_avg`.
    """

    name: ClassVar = "ipo"
    paper: ClassVar = "2310.12036"
    ratio: ClassVar = "1"
    ideal: ClassVar = "c < min(A, B) while D < 1/(2 tau); beyond it both incentives are negative"
    trap: ClassVar = "Not TRL's `ipo`, which averages over tokens (`ipo_avg`): one tau, two targets."

    tau: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.tau > 0, "tau > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Squared distance of the margin from its target, `(B,)`."""
        return (logps.logratio_margin - 1 / (2 * self.tau)) ** 2


@register
class EXOPair(PreferenceLoss):
    """Efficient exact optimisation on pairs: KL( (s(beta D), s(-beta D)) || (1-e, e) ).

    d_w = d_l = beta s(beta D) s(-beta D) [ln((1-e)/e) - beta D]: negative once beta D > ln((1-e)/e).

    Args:
        beta: per nat of the summed log-ratio; 0.1.
        label_smoothing: e; 1e-3 in TRL (the authors' code puts 10 in place of ln((1-e)/e) = 6.907).

    Paper: arXiv 2402.00856.
    """

    name: ClassVar = "exo_pair"
    paper: ClassVar = "2402.00856"
    trl: ClassVar = "exo_pair"
    ratio: ClassVar = "1"
    ideal: ClassVar = "c < min(A, B) while beta D < ln((1-e)/e); beyond it both incentives are negative"

    beta: float = 0.1
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")
        require(self, 0 < self.label_smoothing < 0.5, "0 < label_smoothing < 0.5")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Reverse KL between the policy's two-way choice and the smoothed label, `(B,)`."""
        z = self.beta * logps.logratio_margin
        chosen = F.logsigmoid(z) - math.log1p(-self.label_smoothing)
        rejected = F.logsigmoid(-z) - math.log(self.label_smoothing)
        return torch.sigmoid(z) * chosen + torch.sigmoid(-z) * rejected


@register
class DiscoPOP(PreferenceLoss):
    """Discovered preference optimisation: (1-M) ln(1+e^-z) + M e^-z, z = beta D, M = s(z/tau).

    d_w = d_l = beta [(1-M) s(-z) + M e^-z - M(1-M)/tau (e^-z - ln(1+e^-z))].

    Args:
        beta: per nat of the summed log-ratio; 0.05 (paper).
        tau: temperature of the blend, in units of z; 0.05 (paper and TRL's discopop_tau).

    Paper: arXiv 2406.08414.
    """

    name: ClassVar = "discopop"
    paper: ClassVar = "2406.08414"
    trl: ClassVar = "discopop"
    trl_options: ClassVar = {"discopop_tau": "tau"}
    ratio: ClassVar = "1"
    ideal: ClassVar = "c < min(A, B) where d > 0; d < 0 for beta D from -0.1186 to 0.0720 (at tau 0.05)"
    trap: ClassVar = "At its defaults d < 0 at the reference point: the first step takes both the wrong way."

    beta: float = 0.05
    tau: float = 0.05

    def __post_init__(self) -> None:
        require(self, self.beta > 0 and 0 < self.tau < 1, "beta > 0 and 0 < tau < 1")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Blend of the logistic and the exponential loss, `(B,)`."""
        z = self.beta * logps.logratio_margin
        exponential = capped_exp(F.logsigmoid(z / self.tau) - z)  # M e^-z as one exponent: no inf * 0
        return torch.sigmoid(-z / self.tau) * F.softplus(-z) + exponential


@register
class ODPO(PreferenceLoss):
    """DPO with an offset: -ln s(beta D - alpha ln(score gap)).

    d_w = d_l = beta s(alpha ln(gap) - beta D).

    Args:
        beta: per nat of the summed log-ratio; 0.1.
        alpha: offset in units of beta D per unit of ln(score gap); 1 (authors' code).
        score_gap: the gap of every pair where the batch has no `score_gap` column; 1 makes it DPO.

    Paper: arXiv 2402.10571; as in the authors' code.
    """

    name: ClassVar = "odpo"
    paper: ClassVar = "2402.10571"
    ratio: ClassVar = "1"
    trap: ClassVar = "A gap <= 0 (the judge disagrees with the label) counts as 1e-6, an offset of -13.8."

    beta: float = 0.1
    alpha: float = 1.0
    score_gap: float = 1.0

    def __post_init__(self) -> None:
        require(self, self.beta > 0 and self.score_gap > 0, "beta > 0 and score_gap > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the margin over its offset, `(B,)`."""
        gap = torch.full_like(logps.chosen, self.score_gap) if logps.score_gap is None else logps.score_gap
        return -F.logsigmoid(self.beta * logps.logratio_margin - self.alpha * gap.clamp(min=1e-6).log())


@register
class RDPO(PreferenceLoss):
    """Length-regularised DPO: -ln s(z), z = beta D + alpha (n_w - n_l).

    d_w = d_l = beta s(-z). The lengths shift the size of the incentives, not the ratio.

    Args:
        beta: per nat of the summed log-ratio; 0.1.
        alpha: per token of length difference, in units of beta D; 0.2 in the analysis of arXiv 2410.13828 on
            TL;DR (0.005 to 0.01 on HH).

    Paper: arXiv 2403.19159.
    """

    name: ClassVar = "rdpo"
    paper: ClassVar = "2403.19159"
    ratio: ClassVar = "1"
    needs_lengths: ClassVar = True

    beta: float = 0.1
    alpha: float = 0.2

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the length-shifted margin, `(B,)`."""
        excess = (logps.length_chosen - logps.length_rejected).to(logps.chosen.dtype)
        return -F.logsigmoid(self.beta * logps.logratio_margin + self.alpha * excess)


@register
class GPOExp(PreferenceLoss):
    """Generalised preference optimisation with the exponential loss: e^(-beta D).

    d_w = d_l = beta e^(-beta D); the exponent goes on along its tangent beyond 60.

    Args:
        beta: per nat of the summed log-ratio; 0.1.

    Paper: arXiv 2402.05749 (form from memory, unconfirmed).
    """

    name: ClassVar = "gpo_exp"
    paper: ClassVar = "2402.05749"
    is_confirmed: ClassVar = False
    ratio: ClassVar = "1"
    trap: ClassVar = "Incentives grow exponentially on misordered pairs: one can own the batch's gradient."

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """e^(-beta D), `(B,)`."""
        return capped_exp(-self.beta * logps.logratio_margin)

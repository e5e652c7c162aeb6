"""A pairwise margin with something that holds one side: an NLL term, a penalty, a damped rejected side.

They differ from DPO in rho = d_w / d_l, which is what decides the regime. For the additive ones, with
incentives (d + lambda, d), a pair is ideal iff d (c/A - 1) < lambda < d (B/c - 1): each pair has its own
critical lambda.

CPO adds its NLL's weight to one side: d_w = 0.1 s(-0.1 (w - l)) + 0.5, with w - l = 10.

    >>> pair = PairLogps(*torch.tensor([[-20.0], [-30.0], [10.0], [15.0], [-21.0], [-28.0]]))  # r_w = 1, r_l = -2
    >>> found = CPO(beta=0.1, nll_weight=0.5).incentives(pair)
    >>> [round(float(d), 4) for d in (found.chosen, found.rejected)]
    [0.5269, 0.0269]
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import PairLogps, PreferenceLoss, register, require
from losses.margin import DPO
from losses.pointwise import SFT, BCOPair

__all__ = [
    "BPO",
    "CPO",
    "DPOP",
    "MPO",
    "RPO",
    "CPOHinge",
    "CPOIPO",
    "CalDPO",
    "DPOShift",
    "MaPPO",
    "MinorDPO",
    "SLiC",
]


@register
class DPOP(PreferenceLoss):
    """DPO-Positive (Smaug): -ln s(z), z = beta (D - lambda max(0, -r_w)).

    d_w = beta s(-z) (1 + lambda 1[r_w < 0]), d_l = beta s(-z).

    Args:
        beta: per nat of the summed log-ratio; 0.1.
        penalty: lambda, weight of a fall of the chosen response below the reference; 50 (the paper tests 5,
            50, 500).

    Paper: arXiv 2402.13228.
    """

    name: ClassVar = "dpop"
    paper: ClassVar = "2402.13228"
    ratio: ClassVar = "1, or 1 + lambda while r_w < 0"
    ideal: ClassVar = "r_w >= 0: as DPO; r_w < 0: c/A - 1 < lambda < B/c - 1"
    trap: ClassVar = "The penalty is off at the reference point: the first step is DPO's. Later rho is 51."

    beta: float = 0.1
    penalty: float = 50.0

    def __post_init__(self) -> None:
        require(self, self.beta > 0 and self.penalty >= 0, "beta > 0 and penalty >= 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the penalised margin, `(B,)`; the penalty's gradient is 0 at its kink."""
        shortfall = F.relu(-logps.logratio_chosen)
        return -F.logsigmoid(self.beta * (logps.logratio_margin - self.penalty * shortfall))


@register
class DPOShift(PreferenceLoss):
    """DPO with a damped rejected side: -ln s(z), z = beta (r_w - lambda r_l).

    d_w = beta s(-z), d_l = lambda beta s(-z).

    Args:
        beta: per nat of the summed log-ratio; 0.1.
        shift: lambda, the constant f(lambda) on the rejected log-ratio; 0.75 (released values 0.5 to 0.95).

    Paper: arXiv 2502.07599.
    """

    name: ClassVar = "dpo_shift"
    paper: ClassVar = "2502.07599"
    ratio: ClassVar = "1/lambda"
    ideal: ClassVar = "c/B < lambda < A/c"

    beta: float = 0.1
    shift: float = 0.75

    def __post_init__(self) -> None:
        require(self, self.beta > 0 and self.shift > 0, "beta > 0 and shift > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the shifted margin, `(B,)`."""
        return -F.logsigmoid(self.beta * (logps.logratio_chosen - self.shift * logps.logratio_rejected))


@register
class MaPPO(PreferenceLoss):
    """Maximum a posteriori preference optimisation: -ln s(z), z = beta (r_w - gap r_l), gap in [0, 1].

    d_w = beta s(-z), d_l = gap beta s(-z): DPO-Shift with a shift per pair.

    Args:
        beta: per nat of the summed log-ratio; 0.1.
        score_gap: the gap of every pair where the batch has no `score_gap` column; 0.5 (the middle).

    Paper: arXiv 2507.21183 (form from memory, unconfirmed).
    """

    name: ClassVar = "mappo"
    paper: ClassVar = "2507.21183"
    is_confirmed: ClassVar = False
    ratio: ClassVar = "1/gap"
    ideal: ClassVar = "c/B < gap < A/c"
    trap: ClassVar = "Gaps outside [0, 1] are clamped to it; give calibrated scores."

    beta: float = 0.1
    score_gap: float = 0.5

    def __post_init__(self) -> None:
        require(self, self.beta > 0 and 0 <= self.score_gap <= 1, "beta > 0 and 0 <= score_gap <= 1")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the margin with a shift per pair, `(B,)`."""
        gap = self.score_gap if logps.score_gap is None else logps.score_gap.clamp(0, 1)
        return -F.logsigmoid(self.beta * (logps.logratio_chosen - gap * logps.logratio_rejected))


@register
class MinorDPO(PreferenceLoss):
    """DPO with a one-sided reject penalty: -ln s(z), z = beta (r_w - max(0, r_l)).

    d_w = beta s(-z), d_l = beta s(-z) 1[r_l > 0].

    Args:
        beta: per nat of the summed log-ratio; 0.1.

    Paper: arXiv 2408.09834 (form from memory, unconfirmed).
    """

    name: ClassVar = "minor_dpo"
    paper: ClassVar = "2408.09834"
    is_confirmed: ClassVar = False
    ratio: ClassVar = "1, or infinite while r_l <= 0"
    ideal: ClassVar = "r_l > 0: as DPO; r_l <= 0: SFT, ideal iff c < 0"
    trap: ClassVar = "At the reference point the rejected side is off (the kink counts as off)."

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss with the rejected side rectified, `(B,)`."""
        return -F.logsigmoid(self.beta * (logps.logratio_chosen - F.relu(logps.logratio_rejected)))


@register
class BPO(PreferenceLoss):
    """DPO with a balanced margin: -ln s(z), z = beta min(r_w, -alpha r_l).

    d_w = beta s(-z) while r_w < -alpha r_l, else 0; d_l = alpha beta s(-z) while r_w > -alpha r_l, else 0;
    half of each where they are equal, as at the reference point.

    Args:
        beta: per nat of the summed log-ratio; 0.1 (no default of the authors confirmed).
        gap_adaptor: alpha, weight of the rejected log-ratio; 0.3 (authors' comparison of losses).

    Paper: arXiv 2506.03557 (the margin as in its authors' description; the placing of alpha is unconfirmed).
    """

    name: ClassVar = "bpo"
    paper: ClassVar = "2506.03557"
    is_confirmed: ClassVar = False
    ratio: ClassVar = "infinite, or 0 once r_w > -alpha r_l"
    ideal: ClassVar = "c < 0 (only one side acts at a time); at the reference point also c/A < 1/alpha < B/c"
    trap: ClassVar = "With c > 0 a pair is never ideal after the first step: both_up or both_down, by turns."

    beta: float = 0.1
    gap_adaptor: float = 0.3

    def __post_init__(self) -> None:
        require(self, self.beta > 0 and self.gap_adaptor > 0, "beta > 0 and gap_adaptor > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the weaker of the two sides, `(B,)`."""
        weaker = torch.minimum(logps.logratio_chosen, -self.gap_adaptor * logps.logratio_rejected)
        return -F.logsigmoid(self.beta * weaker)


@register
class CalDPO(PreferenceLoss):
    """Calibrated DPO: -ln s(D) + (r_w - 1/(2 beta))^2 / 2 + (r_l + 1/(2 beta))^2 / 2.

    d_w = s(-D) + 1/(2 beta) - r_w, d_l = s(-D) + 1/(2 beta) + r_l: the rejected side is raised once
    r_l < -1/(2 beta) - s(-D).

    Args:
        beta: 1/(2 beta) is the target log-ratio in summed nats (beta doesn't scale D here); 0.001 (authors:
            0.001 to 0.002).

    Paper: arXiv 2412.14516; as in the authors' code (other ports drop the halves).
    """

    name: ClassVar = "cal_dpo"
    paper: ClassVar = "2412.14516"
    ratio: ClassVar = "[s(-D) + 1/(2 beta) - r_w] / [s(-D) + 1/(2 beta) + r_l]"
    trap: ClassVar = "Incentives have the size of 1/(2 beta), about 500: compare rho, not the incentives."

    beta: float = 0.001

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss plus the two calibration terms, `(B,)`."""
        target = 1 / (2 * self.beta)
        calibration = (logps.logratio_chosen - target) ** 2 + (logps.logratio_rejected + target) ** 2
        return -F.logsigmoid(logps.logratio_margin) + calibration / 2


@register
class RPO(PreferenceLoss):
    """Iterative reasoning / regularised PO: -ln s(beta D) - alpha w/n_w.

    d_w = beta s(-beta D) + alpha/n_w, d_l = beta s(-beta D).

    Args:
        beta: per nat of the summed log-ratio; 0.1.
        alpha: weight of the NLL *per chosen token*; 1 (arXiv 2404.19733). For other normalisers see
            `with_sft`: TRL's is `sft_batch`; arXiv 2405.16436 uses eta = 0.005.

    Paper: arXiv 2404.19733 (its NLL's normaliser is unconfirmed), 2405.16436.
    """

    name: ClassVar = "rpo"
    paper: ClassVar = "2404.19733"
    trl: ClassVar = "sigmoid + sft"
    ratio: ClassVar = "1 + alpha/(n_w beta s(-beta D))"
    ideal: ClassVar = "d (c/A - 1) < alpha/n_w < d (B/c - 1), d = beta s(-beta D)"
    trap: ClassVar = "rho grows without bound as the margin saturates: late in training it is SFT."
    needs_lengths: ClassVar = True

    beta: float = 0.1
    alpha: float = 1.0

    def __post_init__(self) -> None:
        require(self, self.beta > 0 and self.alpha >= 0, "beta > 0 and alpha >= 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """DPO's loss plus the weighted NLL, `(B,)`."""
        return DPO(self.beta).per_pair(logps) + self.alpha * SFT().per_pair(logps)


@register
class MPO(PreferenceLoss):
    """Mixed preference optimisation: 0.8 dpo + 0.2 bco_pair + 1 sft.

    The incentives are the same sums of the parts' incentives.

    Args:
        beta: per nat of the summed log-ratio, in dpo and bco_pair; 0.1.
        preference_weight: weight of dpo; 0.8 (paper, TRL's example).
        quality_weight: weight of bco_pair; 0.2.
        generation_weight: weight of sft (NLL per chosen token); 1.

    Paper: arXiv 2411.10442.
    """

    name: ClassVar = "mpo"
    paper: ClassVar = "2411.10442"
    trl: ClassVar = "sigmoid + bco_pair + sft"
    ratio: ClassVar = "sum of the parts' d_w / sum of the parts' d_l"
    trap: ClassVar = "TRL's sft term is the batch's token mean (`sft_batch`); this one is per pair."
    needs_lengths: ClassVar = True

    beta: float = 0.1
    preference_weight: float = 0.8
    quality_weight: float = 0.2
    generation_weight: float = 1.0

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """The weighted sum of the three losses, `(B,)`."""
        preference = self.preference_weight * DPO(self.beta).per_pair(logps)
        quality = self.quality_weight * BCOPair(self.beta).per_pair(logps)
        return preference + quality + self.generation_weight * SFT().per_pair(logps)


@register
class CPO(PreferenceLoss):
    """Contrastive preference optimisation: -ln s(beta (w - l)) - lambda w.

    d_w = beta s(-beta m) + lambda, d_l = beta s(-beta m), m = w - l.

    Args:
        beta: per nat of the summed log-prob; 0.1.
        nll_weight: lambda, per nat of the *summed* chosen log-prob; 1. TRL's cpo_alpha multiplies the batch's
            token mean instead: CPO(nll_weight=0) with `sft_batch`.

    Paper: arXiv 2401.08417.
    """

    name: ClassVar = "cpo"
    paper: ClassVar = "2401.08417"
    trl: ClassVar = "CPO: sigmoid"
    ratio: ClassVar = "1 + lambda/(beta s(-beta m))"
    ideal: ClassVar = "d (c/A - 1) < lambda < d (B/c - 1), d = beta s(-beta m)"
    needs_reference: ClassVar = False
    trap: ClassVar = "lambda = 1 per summed nat dwarfs d <= 0.1: nearly SFT. TRL's is per token: far smaller."

    beta: float = 0.1
    nll_weight: float = 1.0

    def __post_init__(self) -> None:
        require(self, self.beta > 0 and self.nll_weight >= 0, "beta > 0 and nll_weight >= 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the policy margin plus the weighted NLL, `(B,)`."""
        return -F.logsigmoid(self.beta * logps.policy_margin) - self.nll_weight * logps.chosen


@register
class CPOHinge(PreferenceLoss):
    """CPO with a hinge: max(0, 1 - beta (w - l)) - lambda w.

    d_w = beta 1[beta m < 1] + lambda, d_l = beta 1[beta m < 1].

    Args:
        beta: per nat of the summed log-prob; 0.1.
        nll_weight: lambda, per nat of the summed chosen log-prob; 1 (see `cpo`).

    Paper: arXiv 2401.08417; the variant is TRL's.
    """

    name: ClassVar = "cpo_hinge"
    paper: ClassVar = "2401.08417"
    trl: ClassVar = "CPO: hinge"
    ratio: ClassVar = "1 + lambda/beta, or infinite once beta m >= 1"
    ideal: ClassVar = "active: beta (c/A - 1) < lambda < beta (B/c - 1); inactive: SFT, ideal iff c < 0"
    needs_reference: ClassVar = False

    beta: float = 0.1
    nll_weight: float = 1.0

    def __post_init__(self) -> None:
        require(self, self.beta > 0 and self.nll_weight >= 0, "beta > 0 and nll_weight >= 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Hinge of the policy margin plus the weighted NLL, `(B,)`; the hinge's gradient is 0 at its kink."""
        return F.relu(1 - self.beta * logps.policy_margin) - self.nll_weight * logps.chosen


@register
class CPOIPO(PreferenceLoss):
    """CPO with IPO's square: (w/n_w - l/n_l - 1/(2 tau))^2 - lambda w.

    d_w = (1/tau - 2 mb)/n_w + lambda, d_l = (1/tau - 2 mb)/n_l, mb the averaged policy margin.

    Args:
        tau: 1/(2 tau) is the target in nats *per token*; 0.1 (called beta in TRL).
        nll_weight: lambda, per nat of the summed chosen log-prob; 1 (see `cpo`).

    Paper: arXiv 2401.08417; the variant is TRL's.
    """

    name: ClassVar = "cpo_ipo"
    paper: ClassVar = "2401.08417"
    trl: ClassVar = "CPO: ipo"
    trl_options: ClassVar = {"beta": "tau"}
    ratio: ClassVar = "n_l/n_w + lambda n_l/(1/tau - 2 mb)"
    needs_reference: ClassVar = False
    needs_lengths: ClassVar = True

    tau: float = 0.1
    nll_weight: float = 1.0

    def __post_init__(self) -> None:
        require(self, self.tau > 0 and self.nll_weight >= 0, "tau > 0 and nll_weight >= 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Squared distance of the averaged policy margin from its target plus the weighted NLL, `(B,)`."""
        margin = logps.mean_chosen - logps.mean_rejected
        return (margin - 1 / (2 * self.tau)) ** 2 - self.nll_weight * logps.chosen


@register
class SLiC(PreferenceLoss):
    """Sequence likelihood calibration (SLiC-HF): max(0, delta - (w - l)) - lambda w.

    d_w = 1[m < delta] + lambda, d_l = 1[m < delta], m = w - l.

    Args:
        delta: target margin in summed nats; 1 (HALOs code).
        nll_weight: lambda, per nat of the summed chosen log-prob; 0.1 (HALOs code).

    Paper: arXiv 2305.10425.
    """

    name: ClassVar = "slic"
    paper: ClassVar = "2305.10425"
    ratio: ClassVar = "1 + lambda, or infinite once m >= delta"
    ideal: ClassVar = "m < delta: c/A - 1 < lambda < B/c - 1; beyond it SFT, ideal iff c < 0"
    needs_reference: ClassVar = False

    delta: float = 1.0
    nll_weight: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.nll_weight >= 0, "nll_weight >= 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Hinge of the policy margin plus the weighted NLL, `(B,)`; the hinge's gradient is 0 at its kink."""
        return F.relu(self.delta - logps.policy_margin) - self.nll_weight * logps.chosen

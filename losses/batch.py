"""Batch-coupled losses: a pair's incentives depend on the other pairs of its batch.

The coupling goes through a detached statistic of the batch, or through ranks. Whoever evaluates them must
use the batch that training would use: other batch sizes give other incentives.

SFT over a batch's tokens: with 10 and 30 chosen tokens in the batch, d_w = 2 / 40 on both pairs.

    >>> batch = PairLogps(*torch.tensor([[-20.0, -50.0], [-30.0, -40.0], [10.0, 30.0], [15.0, 8.0]]))
    >>> [round(d, 4) for d in SFTBatch().incentives(batch).chosen.tolist()]
    [0.05, 0.05]
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import PairLogps, PreferenceLoss, register, require

__all__ = ["AOT", "BCO", "KTO", "AOTUnpaired", "AlphaDPO", "BetaDPO", "SFTBatch"]


@register
class KTO(PreferenceLoss):
    """Kahneman-Tversky optimisation on pairs: L_D (1 - s(beta (r_w - z0))) + L_U (1 - s(beta (z0 - r_l))).

    d_w = L_D beta s'(beta (r_w - z0)), d_l = L_U beta s'(beta (z0 - r_l)), s' = s (1 - s).

    The reference point z0 is detached. Without a fixed one it is max(0, mean of the 2B log-ratios of this
    batch's own responses). The paper and TRL estimate it on *mismatched* pairs of prompt and completion (a
    further forward pass, averaged over all processes), where log-ratios are near zero: the estimate here is
    usually larger in size. With `reference_point` set, pairs are independent.

    Args:
        beta: per nat of the summed log-ratio; 0.1.
        desirable_weight: L_D; 1.
        undesirable_weight: L_U; 1.
        reference_point: z0 in nats of the summed log-ratio; None takes it from the batch.

    Paper: arXiv 2402.01306, equation 7.
    """

    name: ClassVar = "kto"
    paper: ClassVar = "2402.01306"
    trl: ClassVar = "KTO: kto"
    ratio: ClassVar = "L_D s'(beta (r_w - z0)) / [L_U s'(beta (z0 - r_l))]"
    is_batch_coupled: ClassVar = True
    trap: ClassVar = "z0 from the batch's own responses isn't TRL's estimate; see its description."

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference_point: float | None = None

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Value lost on both responses against the reference point, `(B,)`."""
        point = _batch_logratio(logps).clamp(min=0) if self.reference_point is None else self.reference_point
        chosen = torch.sigmoid(self.beta * (point - logps.logratio_chosen))
        rejected = torch.sigmoid(self.beta * (logps.logratio_rejected - point))
        return self.desirable_weight * chosen + self.undesirable_weight * rejected


@register
class BCO(PreferenceLoss):
    """Binary classifier optimisation with a reward shift: -ln s(beta r_w - shift) - ln s(shift - beta r_l).

    d_w = beta s(shift - beta r_w), d_l = beta s(beta r_l - shift).

    The shift is detached. Without a fixed one it is the mean reward beta r of this batch's 2B responses; the
    paper's is a running mean over training. shift = 0 is `bco_pair`.

    Args:
        beta: per nat of the summed log-ratio; 0.01.
        shift: in units of beta r; None takes it from the batch.

    Paper: arXiv 2404.04656.
    """

    name: ClassVar = "bco"
    paper: ClassVar = "2404.04656"
    ratio: ClassVar = "s(shift - beta r_w) / s(beta r_l - shift)"
    is_batch_coupled: ClassVar = True
    trap: ClassVar = "Not in TRL 1.16: its `bco_pair` has no shift."

    beta: float = 0.01
    shift: float | None = None

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Sum of two shifted binary cross-entropies, `(B,)`."""
        shift = self.beta * _batch_logratio(logps) if self.shift is None else self.shift
        chosen = self.beta * logps.logratio_chosen - shift
        rejected = shift - self.beta * logps.logratio_rejected
        return -F.logsigmoid(chosen) - F.logsigmoid(rejected)


@register
class AOT(PreferenceLoss):
    """Alignment via optimal transport, paired: -ln s(beta d_k), d_k = sort(m)_k - sort(m0)_k.

    d_w = d_l = beta [(1-e) - s(beta d_k)] (label smoothing e as in `cdpo`), k the rank of the pair's policy
    margin m = w - l in the batch; m0 is the reference's margin. A pair meets the reference margin of its
    rank, not its own.

    Args:
        beta: per nat of the summed margin; 0.01.
        label_smoothing: e; 0.

    Paper: arXiv 2406.05882.
    """

    name: ClassVar = "aot"
    paper: ClassVar = "2406.05882"
    trl: ClassVar = "aot"
    ratio: ClassVar = "1"
    is_batch_coupled: ClassVar = True

    beta: float = 0.01
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")
        require(self, 0 <= self.label_smoothing < 0.5, "0 <= label_smoothing < 0.5")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of each pair's margin over the reference margin of its rank, `(B,)`."""
        margin = logps.policy_margin
        reference = (margin - logps.logratio_margin).detach()
        return _smoothed_logistic(self.beta * (margin - _same_rank(margin, reference)), self.label_smoothing)


@register
class AOTUnpaired(PreferenceLoss):
    """Alignment via optimal transport, unpaired: -ln s(beta d_k), d_k = sort(r_w)_k - sort(r_l)_k.

    With z_k = beta d_k (and label smoothing e), d_w = beta [(1-e) - s(z_k)] at the chosen response's rank k,
    d_l = the same at the rejected response's rank. The k-th loss stands in the row of the chosen response.

    Args:
        beta: per nat of the summed log-ratio; 0.01.
        label_smoothing: e; 0.

    Paper: arXiv 2406.05882.
    """

    name: ClassVar = "aot_unpaired"
    paper: ClassVar = "2406.05882"
    trl: ClassVar = "aot_unpaired"
    ratio: ClassVar = "s(-z_j) / s(-z_k): ranks j of the chosen, k of the rejected response"
    is_batch_coupled: ClassVar = True

    beta: float = 0.01
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")
        require(self, 0 <= self.label_smoothing < 0.5, "0 <= label_smoothing < 0.5")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of each chosen log-ratio over the rejected one of its rank, `(B,)`."""
        chosen, rejected = logps.logratio_chosen, logps.logratio_rejected
        return _smoothed_logistic(self.beta * (chosen - _same_rank(chosen, rejected)), self.label_smoothing)


@register
class BetaDPO(PreferenceLoss):
    """DPO with a beta from the batch: -ln s(beta' D), beta' = beta (1 + alpha (mean D - running margin)).

    d_w = d_l = beta' s(-beta' D); beta' is detached and at least 0.001. The paper also drops pairs far from
    the running margin; this loss keeps all of them.

    Args:
        beta: per nat of the summed log-ratio, before adaptation; 0.1.
        alpha: per nat of the batch's mean margin; 0.6.
        running_margin: the running mean of D that training has reached, nats; 0, as at the reference point.

    Paper: arXiv 2407.08639 (formula read in the authors' code, not run against it).
    """

    name: ClassVar = "beta_dpo"
    paper: ClassVar = "2407.08639"
    ratio: ClassVar = "1"
    is_batch_coupled: ClassVar = True
    trap: ClassVar = "Without the running margin that training has reached, beta' is that of a first step."

    beta: float = 0.1
    alpha: float = 0.6
    running_margin: float = 0.0

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """DPO's loss at the batch's beta, `(B,)`."""
        margin = logps.logratio_margin
        excess = margin.detach().mean() - self.running_margin
        return -F.logsigmoid((self.beta * (1 + self.alpha * excess)).clamp(min=1e-3) * margin)


@register
class AlphaDPO(PreferenceLoss):
    """SimPO with the reference in its target: -ln s(beta (mb - gamma/beta - alpha zscore(Db))).

    d_w = (beta/n_w) s(-z), d_l = (beta/n_l) s(-z), z the argument of s; the z-score is detached. mb is the
    averaged policy margin, Db the averaged log-ratio margin; its moments are this batch's (the authors keep
    running ones with decay 0.9).

    Args:
        beta: per nat *per token*; 2.5 (authors' configs).
        gamma_beta_ratio: target margin in nats *per token*; 0.3 (their configs: 0.15 to 0.6).
        alpha: nats per token for one standard deviation of Db; 0.1 (their configs: 0.05 to 0.2).

    Paper: arXiv 2410.10148.
    """

    name: ClassVar = "alpha_dpo"
    paper: ClassVar = "2410.10148"
    ratio: ClassVar = "n_l/n_w"
    needs_lengths: ClassVar = True
    is_batch_coupled: ClassVar = True
    trap: ClassVar = "In a batch of one pair the z-score is 0: SimPO."

    beta: float = 2.5
    gamma_beta_ratio: float = 0.3
    alpha: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the averaged margin over its own target, `(B,)`."""
        chosen, rejected = logps.logratio_chosen.detach(), logps.logratio_rejected.detach()
        gap = chosen / logps.length_chosen - rejected / logps.length_rejected
        spread = gap.std(unbiased=False).clamp(min=1e-6)
        target = self.gamma_beta_ratio + self.alpha * (gap - gap.mean()) / spread
        return -F.logsigmoid(self.beta * (logps.mean_chosen - logps.mean_rejected - target))


@register
class SFTBatch(PreferenceLoss):
    """SFT on the chosen responses, per token of the batch: -w B / (sum of the batch's n_w).

    d_w = B / (sum of n_w), d_l = 0: its batch mean is the mean over all chosen tokens of the batch.

    Paper: none. TRL's `sft` and the NLL term of its CPO trainer.
    """

    name: ClassVar = "sft_batch"
    paper: ClassVar = "none"
    trl: ClassVar = "sft"
    ratio: ClassVar = "infinite"
    ideal: ClassVar = "c < 0; with c > 0 raising the chosen response raises the rejected one too (both_up)"
    needs_reference: ClassVar = False
    needs_lengths: ClassVar = True
    is_batch_coupled: ClassVar = True

    def per_pair(self, logps: PairLogps) -> Tensor:
        """NLL over the batch's mean chosen length, `(B,)`."""
        return -logps.chosen * len(logps.chosen) / logps.length_chosen.sum()


def _batch_logratio(logps: PairLogps) -> Tensor:
    return torch.cat([logps.logratio_chosen, logps.logratio_rejected]).detach().mean()


def _same_rank(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` the one of `others` that has its rank, `(B,)`; ties in order of position."""
    ranks = values.detach().argsort(stable=True).argsort(stable=True)
    return others[others.detach().argsort(stable=True)][ranks]


def _smoothed_logistic(z: Tensor, noise: float) -> Tensor:
    return -(1 - noise) * F.logsigmoid(z) - noise * F.logsigmoid(-z)

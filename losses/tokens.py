"""Losses that weigh tokens one by one: they read `PairLogps.tokens`, and their incentives are `(B, T)`.

Their step isn't along the two summed scores g_w, g_l, so the pair's three scalars don't decide the regime:
probe token groups, or take the incentives per token.

LD-DPO: the longer response's third token weighs alpha = 0.5, so its incentive is half that of the others.

    >>> ones, short = torch.ones(1, 3), torch.tensor([[1.0, 1.0, 0.0]])
    >>> tokens = TokenLogps(-ones, -2 * short, ones.bool(), short.bool(), ref_chosen=-ones, ref_rejected=-2 * short)
    >>> [round(d, 4) for d in LDDPO(beta=0.1, alpha=0.5).incentives(tokens.pairs()).chosen[0].tolist()]
    [0.05, 0.05, 0.025]
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import PairLogps, PreferenceLoss, TokenLogps, register, require

__all__ = ["TDPO1", "TDPO2", "LDDPO", "TIDPO", "WPO"]


@register
class LDDPO(PreferenceLoss):
    """Length-desensitised DPO: -ln s(beta D'), where tokens beyond the shorter response's length weigh alpha.

    With p = min(n_w, n_l), D' = sum of the first p tokens' log-ratios + alpha times the rest, chosen minus
    rejected. Incentive beta s(-beta D') on the first p tokens, alpha times that on the rest.
    DPO at alpha = 1.

    Args:
        beta: per nat of the reweighted sum; 0.1.
        alpha: weight of a token beyond p; 0.5 (TRL's ld_alpha has no default).

    Paper: arXiv 2409.06411.
    """

    name: ClassVar = "ld_dpo"
    paper: ClassVar = "2409.06411"
    trl: ClassVar = "sigmoid, ld_alpha"
    trl_options: ClassVar = {"ld_alpha": "alpha"}
    ratio: ClassVar = "1 on the first p tokens, alpha on the rest of the longer response"
    needs_tokens: ClassVar = True

    beta: float = 0.1
    alpha: float = 0.5

    def __post_init__(self) -> None:
        require(self, self.beta > 0 and 0 <= self.alpha <= 1, "beta > 0 and 0 <= alpha <= 1")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the reweighted margin, `(B,)`."""
        tokens = logps.by_token
        ratio_chosen, ratio_rejected = _token_logratios(tokens)
        public = torch.minimum(tokens.mask_chosen.sum(1), tokens.mask_rejected.sum(1))
        chosen = self._weigh(ratio_chosen, tokens.mask_chosen, public).sum(1)
        rejected = self._weigh(ratio_rejected, tokens.mask_rejected, public).sum(1)
        return -F.logsigmoid(self.beta * (chosen - rejected))

    def _weigh(self, values: Tensor, mask: Tensor, public: Tensor) -> Tensor:
        return torch.where(mask.long().cumsum(1) <= public[:, None], values, self.alpha * values)


@register
class TDPO1(PreferenceLoss):
    """Token-level DPO, first form: -ln s(beta (D - (K_l - K_w))), K = sum of KL(ref || pi).

    Incentive beta s(-z) on every token, z the argument of s, with K held fixed.

    Args:
        beta: per nat of the summed log-ratio; 0.1.

    Paper: arXiv 2404.11999.
    """

    name: ClassVar = "tdpo1"
    paper: ClassVar = "2404.11999"
    ratio: ClassVar = "1 (with K held fixed)"
    needs_tokens: ClassVar = True
    trap: ClassVar = "K depends on the policy: its gradients are two more vectors, not in the incentives."

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the KL-shifted margin, `(B,)`."""
        margin = _token_margin(logps.by_token)
        kl_chosen, kl_rejected = _sequence_kl(logps.by_token)
        return -F.logsigmoid(self.beta * (margin - (kl_rejected - kl_chosen)))


@register
class TDPO2(PreferenceLoss):
    """Token-level DPO, second form: -ln s(beta (D - alpha (K_l - sg K_w))), K = sum of KL(ref || pi).

    Incentive beta s(-z) on every token, z the argument of s, with K held fixed; sg stops the gradient.

    Args:
        beta: per nat of the summed log-ratio; 0.1.
        alpha: weight of the KL difference; 0.5.

    Paper: arXiv 2404.11999.
    """

    name: ClassVar = "tdpo2"
    paper: ClassVar = "2404.11999"
    ratio: ClassVar = "1 (with K held fixed)"
    needs_tokens: ClassVar = True
    trap: ClassVar = "K_l depends on the policy: its gradient is a third vector, not in the incentives."

    beta: float = 0.1
    alpha: float = 0.5

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the KL-shifted margin, `(B,)`."""
        margin = _token_margin(logps.by_token)
        kl_chosen, kl_rejected = _sequence_kl(logps.by_token)
        return -F.logsigmoid(self.beta * (margin - self.alpha * (kl_rejected - kl_chosen.detach())))


@register
class TIDPO(PreferenceLoss):
    """Token-importance DPO: -ln s(beta (R_w - R_l)), R = mean log-ratio weighted by sg[1 - pi(token)].

    Incentive beta s(-z) (1 - pi_t) / (sum of 1 - pi) on token t: sure tokens have no incentive.

    Args:
        beta: per nat of the *weighted mean* log-ratio (per token, not per sequence); 0.1.

    Paper: arXiv 2505.19653, in the form coded by arXiv 2604.18239 (read there, not run against it).
    """

    name: ClassVar = "tidpo"
    paper: ClassVar = "2505.19653"
    is_confirmed: ClassVar = False
    ratio: ClassVar = "(1 - pi_t)/sum of the chosen side over the same of the rejected side"
    needs_tokens: ClassVar = True

    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, self.beta > 0, "beta > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """Logistic loss of the weighted-mean margin, `(B,)`."""
        tokens = logps.by_token
        ratio_chosen, ratio_rejected = _token_logratios(tokens)
        doubt = -torch.expm1(tokens.chosen.detach())
        chosen = (doubt * ratio_chosen).sum(1) / doubt.sum(1).clamp(min=1e-8)
        doubt = -torch.expm1(tokens.rejected.detach())
        rejected = (doubt * ratio_rejected).sum(1) / doubt.sum(1).clamp(min=1e-8)
        return -F.logsigmoid(self.beta * (chosen - rejected))


@register
class WPO(PreferenceLoss):
    """Weighted preference optimisation: -omega ln s(beta D), omega = sg[exp(mean(ln p_t - ln sum_v p_v^2))].

    Incentive omega beta s(-beta D) on every token; omega is the product over the two responses of what the
    formula says for one.

    Args:
        beta: per nat of the summed log-ratio; 0.01.
        max_weight: upper limit of omega; 1 (authors). Infinity is TRL's use_weighting (3.6 was seen).

    Paper: arXiv 2406.11827.
    """

    name: ClassVar = "wpo"
    paper: ClassVar = "2406.11827"
    trl: ClassVar = "sigmoid, use_weighting"
    ratio: ClassVar = "1"
    needs_tokens: ClassVar = True
    trap: ClassVar = "omega reads the policy's whole next-token distributions (`*_log_collision`)."

    beta: float = 0.01
    max_weight: float = 1.0

    def __post_init__(self) -> None:
        require(self, self.beta > 0 and self.max_weight > 0, "beta > 0 and max_weight > 0")

    def per_pair(self, logps: PairLogps) -> Tensor:
        """DPO's loss times the pair's detached weight, `(B,)`."""
        tokens = logps.by_token
        chosen = (tokens.chosen - tokens.statistic("log_collision_chosen")).sum(1)
        rejected = (tokens.rejected - tokens.statistic("log_collision_rejected")).sum(1)
        log_weight = chosen / tokens.mask_chosen.sum(1) + rejected / tokens.mask_rejected.sum(1)
        weight = log_weight.detach().clamp(max=min(60.0, math.log(self.max_weight))).exp()
        return -weight * F.logsigmoid(self.beta * _token_margin(tokens))


def _token_logratios(tokens: TokenLogps) -> tuple[Tensor, Tensor]:
    return tokens.chosen - tokens.statistic("ref_chosen"), tokens.rejected - tokens.statistic("ref_rejected")


def _token_margin(tokens: TokenLogps) -> Tensor:
    chosen, rejected = _token_logratios(tokens)
    return chosen.sum(1) - rejected.sum(1)


def _sequence_kl(tokens: TokenLogps) -> tuple[Tensor, Tensor]:
    return tokens.statistic("kl_chosen").sum(1), tokens.statistic("kl_rejected").sum(1)

"""Losses made of losses: `WithSFT(DPO(), alpha=1.0)`, `WeightedSum((DPO(), SFT()), (0.8, 0.2))`.

Incentives add up like the losses. What a sum reads, and whether it couples its batch, follows from its parts.

DPO has 0.1 s(-0.3) on both sides; the NLL adds 2 / n_w = 0.2 to the chosen one.

    >>> pair = PairLogps(*torch.tensor([[-20.0], [-30.0], [10.0], [15.0], [-21.0], [-28.0]]))  # r_w = 1, r_l = -2
    >>> found = WithSFT(DPO(beta=0.1), alpha=2.0).incentives(pair)
    >>> [round(float(d), 4) for d in (found.chosen, found.rejected)]
    [0.2426, 0.0426]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from losses.base import PairLogps, PreferenceLoss, build, register, require
from losses.batch import SFTBatch
from losses.margin import DPO
from losses.pointwise import SFT, BCOPair

__all__ = ["WeightedSum", "WithSFT"]


@register
class WeightedSum(PreferenceLoss):
    """Weighted sum of losses: sum of weight_k loss_k.

    d_w and d_l are the same weighted sums of the parts' incentives. At its defaults it is TRL's MPO.

    Args:
        losses: the parts, as losses or as what `build` takes (names, mappings).
        weights: one number per part.

    Paper: none; the defaults are the weights of arXiv 2411.10442.
    """

    name: ClassVar = "weighted_sum"
    paper: ClassVar = "none"
    trl: ClassVar = "loss_type and loss_weights as lists"
    ratio: ClassVar = "sum of the parts' d_w / sum of the parts' d_l"

    losses: Sequence[PreferenceLoss] = (DPO(), BCOPair(beta=0.1), SFTBatch())
    weights: Sequence[float] = (0.8, 0.2, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", tuple(build(loss) for loss in self.losses))
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        require(self, 0 < len(self.losses) == len(self.weights), "at least one loss and one weight per loss")

    @property
    def needs_reference(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any part does."""
        return any(loss.needs_reference for loss in self.losses)

    @property
    def needs_lengths(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any part does."""
        return any(loss.needs_lengths for loss in self.losses)

    @property
    def is_batch_coupled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any part is."""
        return any(loss.is_batch_coupled for loss in self.losses)

    @property
    def needs_tokens(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any part does."""
        return any(loss.needs_tokens for loss in self.losses)

    def per_pair(self, logps: PairLogps) -> Tensor:
        """The weighted sum, `(B,)`."""
        parts = [
            weight * loss.per_pair(logps) for weight, loss in zip(self.weights, self.losses, strict=True)
        ]
        return torch.stack(parts).sum(0)


@register
class WithSFT(PreferenceLoss):
    """A loss with an NLL term on the chosen response: loss + alpha sft.

    d_w grows by alpha times sft's d_w (1/n_w at the default), d_l stays. Law: with d = the loss's incentives
    and x the addition, a pair with d_w = d_l = d is ideal iff d (c/A - 1) < x < d (B/c - 1).

    Args:
        loss: the loss, or what `build` takes.
        alpha: weight of the NLL term; 1.
        sft: the NLL's normaliser: `sft` per chosen token of the pair (default), `sft_sum` none, `sft_batch`
            per chosen token of the batch (TRL).

    Paper: none; with dpo it is arXiv 2404.19733's form (`rpo`).
    """

    name: ClassVar = "with_sft"
    paper: ClassVar = "none"
    trl: ClassVar = "loss_type [..., sft]"
    ratio: ClassVar = "(d_w + alpha/n_w) / d_l of the loss inside"

    loss: PreferenceLoss = DPO()
    alpha: float = 1.0
    sft: PreferenceLoss = SFT()

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", build(self.loss))
        object.__setattr__(self, "sft", build(self.sft))
        require(self, self.alpha >= 0, "alpha >= 0")
        require(self, self.sft.name in ("sft", "sft_sum", "sft_batch"), "sft: sft, sft_sum or sft_batch")

    @property
    def _sum(self) -> WeightedSum:
        return WeightedSum((self.loss, self.sft), (1.0, self.alpha))

    @property
    def needs_reference(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the loss inside does."""
        return self._sum.needs_reference

    @property
    def needs_lengths(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a part does."""
        return self._sum.needs_lengths

    @property
    def is_batch_coupled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a part is."""
        return self._sum.is_batch_coupled

    @property
    def needs_tokens(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the loss inside does."""
        return self._sum.needs_tokens

    def per_pair(self, logps: PairLogps) -> Tensor:
        """The loss inside plus the weighted NLL, `(B,)`."""
        return self._sum.per_pair(logps)

"""A loss as the plain function that trainers and notebooks expect."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from losses.base import PairLogps, PreferenceLoss

__all__ = ["PlainLoss", "as_function"]


class PlainLoss(Protocol):
    """Log-probs in, `(losses, chosen_rewards, rejected_rewards)` out; every tensor `(B,)`."""

    def __call__(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        lengths_chosen: Tensor | None = None,
        lengths_rejected: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One batch."""
        ...


def as_function(loss: PreferenceLoss) -> PlainLoss:
    """The loss under the signature of a `dpo_loss`: summed log-probs in, per-pair losses and rewards out.

    Rewards are detached and for logging: beta times the summed log-ratio (the summed log-prob where no
    reference is given), with beta = 1 for a loss that has none. They aren't a loss's own reward: SimPO's, for
    instance, is per token.

    Raises:
        ValueError: the loss weighs tokens, which this signature can't carry. On a call: the loss reads
            lengths and got none.
        MissingReference: on a call, the loss needs a reference and got none.

    Examples:
        >>> import torch
        >>> from losses import DPO
        >>> dpo_loss = as_function(DPO(beta=0.1))
        >>> reference = torch.tensor([-20.0])
        >>> losses, chosen_rewards, _ = dpo_loss(reference, reference, reference, reference)
        >>> losses, chosen_rewards
        (tensor([0.6931]), tensor([0.]))
    """
    if loss.needs_tokens:
        raise ValueError(f"{loss.label} weighs tokens; call its per_pair with TokenLogps(...).pairs().")
    beta = loss.config.get("beta", 1.0)

    def function(
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        lengths_chosen: Tensor | None = None,
        lengths_rejected: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if loss.needs_lengths and (lengths_chosen is None or lengths_rejected is None):
            raise ValueError(f"{loss.label} reads lengths_chosen and lengths_rejected; expected both.")
        ones = torch.ones_like(policy_chosen_logps)
        logps = PairLogps(
            chosen=policy_chosen_logps,
            rejected=policy_rejected_logps,
            length_chosen=ones if lengths_chosen is None else lengths_chosen,
            length_rejected=ones if lengths_rejected is None else lengths_rejected,
            ref_chosen=reference_chosen_logps,
            ref_rejected=reference_rejected_logps,
        )
        chosen = logps.logratio_chosen if logps.has_reference else logps.chosen
        rejected = logps.logratio_rejected if logps.has_reference else logps.rejected
        return loss.per_pair(logps), beta * chosen.detach(), beta * rejected.detach()

    return function

"""What a training step logs about its micro-batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from losses import Incentives, PairLogps, PreferenceLoss

STILL_TRAINING = 0.01
"""A pair still trains if its incentive is more than this share of what it was at the starting point."""


def incentives(loss: PreferenceLoss, logps: PairLogps) -> Incentives:
    """d_w and d_l of each pair, `(B,)`, loss units per nat; a mean over tokens if the loss weighs tokens.

    Args:
        loss: the trained loss.
        logps: its pairs, `(B,)` each, nats.
    """
    found = loss.incentives(logps)
    if found.chosen.ndim == 1:
        return found
    chosen = found.chosen.sum(1) / logps.length_chosen.clamp(min=1)
    return Incentives(chosen, found.rejected.sum(1) / logps.length_rejected.clamp(min=1))


def is_still_training(loss: PreferenceLoss, logps: PairLogps) -> Tensor:
    """Whether max(|d_w|, |d_l|) exceeds `STILL_TRAINING` times its value at the starting point, `(B,)`.

    The starting point is policy = reference. Without reference log-probs it is indifference: the rejected
    response as likely as the chosen one (per token, for a loss that reads lengths). For a loss with a hinge
    this says "not yet beyond the hinge"; an incentive that starts at 0 counts as soon as it isn't 0.

    Args:
        loss: the trained loss.
        logps: its pairs, `(B,)` each, nats.
    """
    now, start = incentives(loss, logps), incentives(loss, _starting_point(loss, logps))
    size = torch.maximum(now.chosen.abs(), now.rejected.abs())
    return size > STILL_TRAINING * torch.maximum(start.chosen.abs(), start.rejected.abs())


def _starting_point(loss: PreferenceLoss, logps: PairLogps) -> PairLogps:
    if logps.tokens is not None:
        tokens = logps.tokens
        start = replace(
            tokens, chosen=tokens.statistic("ref_chosen"), rejected=tokens.statistic("ref_rejected")
        )
        return start.pairs()
    if logps.ref_chosen is not None and logps.ref_rejected is not None:
        return replace(logps, chosen=logps.ref_chosen, rejected=logps.ref_rejected)
    is_per_token = loss.needs_lengths
    return replace(
        logps, rejected=logps.mean_chosen * logps.length_rejected if is_per_token else logps.chosen
    )


Metrics = dict[str, tuple[Tensor, Tensor]]
"""Values and their weights, of one shape, by metric."""


def token_metrics(output: Any, mask: Tensor) -> Metrics:
    """TRL's metrics over scored tokens, `(2B, T-1)` or `(B, T-1)` each.

    Args:
        output: what TRL's fused head gives.
        mask: `(2B, T-1)`, 1 where the next token is scored.
    """
    width = mask.shape[1]
    mask_chosen, mask_rejected = mask.chunk(2)
    chosen_logits, rejected_logits = output.mean_logits[:, -width:].chunk(2)
    metrics = {
        "entropy": (output.entropy[:, -width:], mask),
        "logits/chosen": (chosen_logits, mask_chosen),
        "logits/rejected": (rejected_logits, mask_rejected),
        "mean_token_accuracy": (output.is_top1[:, -width:].chunk(2)[0], mask_chosen),
    }
    if output.aux_loss is not None:
        metrics["aux_loss"] = (output.aux_loss, torch.ones_like(output.aux_loss))
    return metrics


def pair_metrics(loss: PreferenceLoss, logps: PairLogps, beta: float) -> Metrics:
    """Metrics over pairs, `(B,)` each; rewards only where the batch has a reference.

    Args:
        loss: the trained loss.
        logps: its pairs, `(B,)` each, nats.
        beta: by which a log-ratio is a reward.
    """
    found = incentives(loss, logps)
    values = {
        "logps/chosen": logps.chosen,
        "logps/rejected": logps.rejected,
        "entangle/logps_per_token/chosen": logps.mean_chosen,
        "entangle/logps_per_token/rejected": logps.mean_rejected,
        "entangle/incentive_chosen": found.chosen,
        "entangle/incentive_rejected": found.rejected,
        "entangle/still_training": is_still_training(loss, logps),
    }
    if logps.has_reference:
        chosen, rejected = beta * logps.logratio_chosen, beta * logps.logratio_rejected
        values |= {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": chosen > rejected,
            "rewards/margins": chosen - rejected,
        }
    return {name: (value, torch.ones_like(logps.chosen)) for name, value in values.items()}

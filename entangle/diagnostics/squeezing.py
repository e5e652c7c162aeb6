"""Squeezing: what a step on a pair does to the tokens that are the likeliest already."""

from __future__ import annotations

import torch
from torch import Tensor

from entangle.diagnostics.base import diagnostic
from entangle.diagnostics.reading import Reading, response_logits
from entangle.scores.base import studying
from entangle.scores.logps import target_logps


@diagnostic(
    "squeezing",
    "squeezing_chosen",
    "squeezing_rejected",
    description="What a step on the pair does to the tokens that are the likeliest already: nats per unit of eta d.",
    formula="sum_t <grad ln max_v pi(v|x, y_<t), g_w - g_l>",
    cost="backward",
    source="arXiv 2407.10490",
)
def squeezing(reading: Reading) -> dict[str, Tensor]:
    """Sum over a response's positions of d ln p(arg-max token), along g_w - g_l: nats per unit of eta d.

    g_w - g_l is the step of every loss with equal incentives d on both responses (DPO, IPO, RRHF, ...), taken on
    this pair alone, in plain SGD over the probed parameters. Positive on the rejected response: the probability
    that leaves its tokens gathers on what was the likeliest there anyway. Exact to first order.

    Cost: per pair one forward and three backward passes through both rows, and three gradients in memory.

    Paper: arXiv 2407.10490 (the effect; the measure is <grad q, g_w - g_l> for q = sum_t ln max_v p(v)).
    """
    count = len(reading.batch.prompt_length)
    changes = torch.stack([_changes(reading, pair) for pair in range(count)])
    return {"squeezing_chosen": changes[:, 0], "squeezing_rejected": changes[:, 1]}


def _changes(reading: Reading, pair: int) -> Tensor:
    """First-order changes `(2,)` of both responses' arg-max log-probs along the pair's own g_w - g_l."""
    policy, count = reading.policy, len(reading.batch.prompt_length)
    rows = reading.rows[torch.tensor([pair, count + pair], device=reading.rows.valid.device)]
    parameters = list(policy.parameters.values())

    def gradient(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    with studying(policy.model, policy.parameters):
        logits = response_logits(policy.model, rows)
        chosen, rejected = target_logps(logits, rows.targets, rows.valid).sum(1)
        likeliest = target_logps(logits, logits.argmax(-1), rows.valid).sum(1)
        step = gradient(chosen - rejected)
        return torch.stack([_dot(gradient(side), step) for side in likeliest])


def _dot(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> Tensor:
    parts = [(a.double() * b.double()).sum().cpu() for a, b in zip(first, second, strict=True)]
    return torch.stack(parts).sum()

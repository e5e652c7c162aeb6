"""Models small enough to work out by hand: softmax over logits, in float64.

A response is a function from a parameter vector to its log-prob; its score is the gradient by autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from entangle.analysis.geometry import PairGeometry

LogProb = Callable[[Tensor], Tensor]


def one_token(token: int) -> LogProb:
    """T1: one softmax token, the parameters are the logits."""
    return lambda theta: torch.log_softmax(theta, -1)[token]


def shared_prefix(last: int, prefix: int) -> LogProb:
    """T2: `prefix` tokens in contexts of their own (two logits each), then one of two tokens."""

    def logp(theta: Tensor) -> Tensor:
        logits = torch.log_softmax(theta.view(prefix + 1, 2), -1)
        return logits[:prefix, 0].sum() + logits[prefix, last]

    return logp


def shared_suffix(first: int, suffix: int, probability: float) -> LogProb:
    """T3: a first token, then `suffix` identical tokens whose logits both contexts share.

    At theta = 0 the first token has probability 1/2 and each suffix token has `probability`.
    """

    def logp(theta: Tensor) -> Tensor:
        bias = torch.tensor([probability / (1 - probability), 1.0], dtype=theta.dtype).log()
        return torch.log_softmax(theta[:2], -1)[first] + suffix * torch.log_softmax(theta[2:] + bias, -1)[0]

    return logp


def score(logp: LogProb, theta: Tensor) -> Tensor:
    """Gradient of a log-prob at theta."""
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(logp(theta), theta)[0]


def geometry(chosen: LogProb, rejected: LogProb, theta: Tensor) -> PairGeometry:
    """The Gram block of one pair."""
    return PairGeometry.from_scores(score(chosen, theta)[None], score(rejected, theta)[None])

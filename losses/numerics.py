"""Exponentials and logarithms that stay finite, value and gradient, in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXPONENT_CAP = 60.0
"""Beyond this exponent `capped_exp` goes on along its tangent: e^60 times a log-ratio fits in float32."""

SURE = -1e-6
"""Largest log-prob of `log1mexp`: a response with mean token probability above 1 - 1e-6 counts as that."""


def capped_exp(x: Tensor) -> Tensor:
    """e^x up to `EXPONENT_CAP`, its tangent beyond (so the gradient stays there, unlike with a clamp).

    Examples:
        >>> capped_exp(torch.tensor([0.0, 1e4])).isfinite().all().item()
        True
    """
    return 1 + capped_expm1(x)


def capped_expm1(x: Tensor) -> Tensor:
    """e^x - 1 up to `EXPONENT_CAP`, its tangent beyond; keeps its digits near 0."""
    below = x.clamp(max=EXPONENT_CAP)
    tangent = (x - EXPONENT_CAP).clamp(min=0) * math.exp(EXPONENT_CAP)
    return torch.expm1(below) + tangent


def log1mexp(x: Tensor) -> Tensor:
    """ln(1 - e^x) for x < 0, both for x near 0 and far from it; x above `SURE` counts as `SURE`."""
    x = x.clamp(max=SURE)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))

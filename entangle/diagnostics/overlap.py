"""Tokens that both responses begin or end with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entangle.diagnostics.base import diagnostic
from entangle.diagnostics.reading import Reading


@diagnostic(
    "overlap",
    "shared_prefix",
    "shared_suffix",
    description="Tokens that both responses begin with, and end with after that.",
    formula="longest common prefix; longest common suffix of the rests",
    cost="tokens",
    source="arXiv 2410.13828",
)
def overlap(reading: Reading) -> dict[str, Tensor]:
    """Length of the longest common prefix, and of the longest common suffix of what is left, in tokens.

    Tokens of the prefix have one and the same score on both sides; it cancels under a loss with rho = 1.
    """
    counts = torch.tensor([_overlap(*pair) for pair in reading.responses], dtype=torch.float64)
    return {"shared_prefix": counts[:, 0], "shared_suffix": counts[:, 1]}


def _overlap(chosen: Sequence[int], rejected: Sequence[int]) -> tuple[int, int]:
    prefix = _common(chosen, rejected)
    return prefix, _common(chosen[prefix:][::-1], rejected[prefix:][::-1])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    shortest = min(len(first), len(second))
    return next((i for i in range(shortest) if first[i] != second[i]), shortest)

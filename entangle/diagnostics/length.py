"""Lengths of the responses."""

from __future__ import annotations

from torch import Tensor

from entangle.diagnostics.base import diagnostic
from entangle.diagnostics.reading import Reading


@diagnostic(
    "length_ratio",
    description="Tokens of the rejected response per token of the chosen one.",
    formula="n_l / n_w",
    cost="tokens",
)
def length_ratio(reading: Reading) -> dict[str, Tensor]:
    """Scored tokens of the rejected response over those of the chosen one: rho of SimPO and of averaged IPO."""
    chosen, rejected = reading.lengths
    return {"length_ratio": rejected / chosen}

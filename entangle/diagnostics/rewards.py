"""Implicit rewards of the responses."""

from __future__ import annotations

import torch
from torch import Tensor

from entangle.diagnostics.base import diagnostic
from entangle.diagnostics.reading import Reading


@diagnostic(
    "reward_gap",
    description="Implicit-reward gap over beta: how far the policy has already moved the pair apart.",
    formula="ln pi/pi_ref (y_w|x) - ln pi/pi_ref (y_l|x), nats",
    cost="reference",
    source="arXiv 2305.18290; as a selector 2508.04149",
)
def reward_gap(reading: Reading) -> dict[str, Tensor]:
    """D = ln pi/pi_ref (y_w|x) - ln pi/pi_ref (y_l|x), nats: the gap of DPO's implicit rewards over beta.

    NaN where the run has no reference; 0 where policy and reference are one.
    """
    logps, reference = reading.positions.logps.sum(1, dtype=torch.float64).cpu(), reading.ref_logps
    ratios = torch.full_like(logps, torch.nan) if reference is None else logps - reference
    chosen, rejected = ratios.chunk(2)
    return {"reward_gap": chosen - rejected}

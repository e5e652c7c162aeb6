"""Inner product of last hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from entangle.diagnostics.base import diagnostic
from entangle.diagnostics.reading import Reading


@diagnostic(
    "hidden_inner",
    description="Inner product of the last hidden states of both responses; a baseline of CHES.",
    formula="<h_w, h_l> at the position that predicts a response's last token",
    cost="forward",
    source="arXiv 2410.08847",
)
def hidden_inner(reading: Reading) -> dict[str, Tensor]:
    """<h_w, h_l>, h being the last layer's state at the position that predicts the response's last token.

    Where that token ends the sequence, h has read the whole text. In float64. A baseline of arXiv 2410.08847.
    """
    hidden, last = reading.hidden(), (reading.rows.valid.sum(1) - 1).clamp(min=0)
    states = hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]
    chosen, rejected = states.double().cpu().chunk(2)
    return {"hidden_inner": (chosen * rejected).sum(1)}

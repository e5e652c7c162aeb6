"""CHES, the centered hidden embedding similarity."""

from __future__ import annotations

import torch
from torch import Tensor

from entangle.diagnostics.base import diagnostic
from entangle.diagnostics.reading import Reading


@diagnostic(
    "ches",
    "ches",
    "ches_norm",
    description="Alignment of the two responses' hidden states; the higher, the likelier the chosen log-prob falls.",
    formula="<H_w, H_l> - |H_w|^2; normalised <H_w, H_l>/(n_w n_l) - |H_w|^2/n_w^2",
    cost="forward",
    source="arXiv 2410.08847",
)
def ches(reading: Reading) -> dict[str, Tensor]:
    """CHES = <H_w, H_l> - |H_w|^2 and its length-normalised form <H_w, H_l>/(n_w n_l) - |H_w|^2/n_w^2.

    H is the sum of the last layer's hidden states (what the LM head reads) over the positions that predict the
    response's tokens: from the last prompt position to one before the last token. Sums and products are taken in
    float64, and as <H_w, H_l - H_w>, so nothing overflows or cancels.

    Laws: the last-layer quantity c - A with every token factor set to 1; 0 if both responses are one token.

    Paper: arXiv 2410.08847.
    """
    chosen, rejected = reading.hidden().sum(1, dtype=torch.float64).cpu().chunk(2)
    length_chosen, length_rejected = (length[:, None] for length in reading.lengths)
    return {
        "ches": _alignment(chosen, rejected),
        "ches_norm": _alignment(chosen / length_chosen, rejected / length_rejected),
    }


def _alignment(chosen: Tensor, rejected: Tensor) -> Tensor:
    return (chosen * (rejected - chosen)).sum(1)

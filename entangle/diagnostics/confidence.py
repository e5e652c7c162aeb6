"""How sure the policy is of the responses."""

from __future__ import annotations

import torch
from torch import Tensor

from entangle.diagnostics.base import diagnostic
from entangle.diagnostics.reading import Reading


@diagnostic(
    "confidence",
    "confidence_chosen",
    "confidence_rejected",
    "entropy_chosen",
    "entropy_rejected",
    description="How sure the policy is: mean probability per token (geometric), and mean next-token entropy in nats.",
    formula="exp(ln pi(y|x) / n); (1/n) sum_t H(pi(.|x, y_<t))",
    cost="forward",
)
def confidence(reading: Reading) -> dict[str, Tensor]:
    """Per response: the geometric mean of its tokens' probabilities, and the mean next-token entropy in nats.

    The first is exp(ln pi(y|x) / n), in [0, 1]; the second lies in [0, ln V].
    """
    found = {}
    at = reading.positions
    for name, values in (("confidence", at.logps), ("entropy", at.entropy)):
        sides = values.sum(1, dtype=torch.float64).cpu().chunk(2)
        for side, total, length in zip(("chosen", "rejected"), sides, reading.lengths, strict=True):
            mean = total / length
            found[f"{name}_{side}"] = mean.exp() if name == "confidence" else mean
    return found

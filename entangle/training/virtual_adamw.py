"""AdamW with a momentum of its own: the optimiser of virtual splitting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class VirtualAdamW(torch.optim.AdamW):
    """AdamW of which the momentum may get another gradient than the second moment.

        m <- b1 m + (1 - b1) q_stage,   v <- b2 v + (1 - b2) q^2

    with q the parameter's `.grad`, and everything else as in AdamW. Law: with q_stage = q it is AdamW, bit for bit
    (PyTorch's plain implementation). The state has AdamW's names, so checkpoints are interchangeable.

    An entry that has had no gradient yet (v = 0) takes q for q_stage: q_stage over eps would be a step without bound.
    So it is with the factor A of a fresh LoRA at the first step, where B = 0 leaves A without gradient.

    Attributes:
        stage: q_stage by parameter for the next step; a parameter that isn't there uses q. Emptied by the step.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.stage: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; takes no closure."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                count = state["step"].item()
                stage = self.stage[parameter] if parameter in self.stage else grad
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                state["exp_avg"].lerp_(torch.where(state["exp_avg_sq"] > 0, stage, grad), 1 - beta1)
                denominator = state["exp_avg_sq"].sqrt() / (1 - beta2**count) ** 0.5
                size = group["lr"] / (1 - beta1**count)
                parameter.addcdiv_(state["exp_avg"], denominator.add_(group["eps"]), value=-size)
        self.stage = {}

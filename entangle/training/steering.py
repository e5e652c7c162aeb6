"""Corrections of an optimiser's step from products across batches: what `set_band` and `drift_free` do in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from entangle.analysis.cross_batch import FEWEST
from entangle.analysis.mitigations import DriftFree, SetBand, Steering
from entangle.analysis.sets import SetGeometry
from entangle.training.live import BatchRecorder
from entangle.training.memory import batch_memory
from entangle.training.optimizer_steps import groups_of, preconditioner
from entangle.training.trainer import TrainingError

HALF, MEMORY = "exp_avg_chosen", "batch_memory"
"""What is kept in the optimiser's state, so that checkpoints have it."""

Mean = Callable[[Tensor], Tensor]
"""The mean of a tensor over the processes that share a step; each of them calls."""


class Steered:
    """An optimiser whose steps are corrected, once `prepare` has been called after the step's backward passes.

    What it needs from step to step is in the optimiser's state (tensors) and in `state` (numbers): with both restored
    a resumed run goes on to the bit, for parameters in float32.

    Args:
        rule: what is corrected.
        optimizer: torch's AdamW, Adam or SGD.
        model: in training.
        state: numbers that are carried from step to step; changed in place.

    Raises:
        TrainingError: so many parameters are trained that the memory of batches would be too large.
    """

    def __init__(self, rule: Steering, optimizer: Optimizer, model: nn.Module, state: dict[str, Any]) -> None:
        memory = batch_memory(model, optimizer, means=rule.means)
        if memory is None:
            raise TrainingError(
                f"{rule.name} keeps several copies of the trained parameters, and there are too many of them. Train a "
                "LoRA."
            )
        self.rule, self.memory, self._optimizer, self._state = rule, memory, optimizer, state
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._recorder = BatchRecorder(model, geometry=False, memory=memory, asked=rule.name)
        self._handle = optimizer.register_step_post_hook(self._correct)
        self._strength = 0.0
        self._chosen: dict[str, Tensor] = {}
        if state.get("weight"):
            memory.weight = state["weight"]
            memory.averages = {
                name: optimizer.state[p][MEMORY]
                for name, p in self._parameters.items()
                if MEMORY in optimizer.state[p]
            }

    def remove(self) -> None:
        """Take the hooks off."""
        self._recorder.remove()
        self._handle.remove()

    def enter(self, epoch: int) -> None:
        """A micro-batch of this epoch comes: in a new one its pairs come anew, and the memory of them goes."""
        if self._state.setdefault("epoch", epoch) != epoch:
            self._state["epoch"] = epoch
            self.memory.forget()

    def prepare(self, clip: float, mean: Mean) -> dict[str, float]:
        """Work out the correction of the coming step; what is logged of it.

        Args:
            clip: the factor by which the step's gradient is clipped.
            mean: over processes.

        Raises:
            TrainingError: the model returned no log-probs, or the loss weighs tokens.
        """
        if not self._recorder.take():
            raise TrainingError(
                f"{self.rule.name} reads the log-probs that the model returns; it returned none."
            )
        coming = self.memory.coming
        for name in sorted(coming):
            coming[name] = mean(coming[name])
            coming[name][:2] *= clip
        self._chosen = {name: -part[0] for name, part in coming.items()}  # as part of the loss's gradient
        count, products = self.memory.close() or (0, [[0.0] * self.memory.directions] * 2)
        block = torch.tensor(products, dtype=torch.float64) * count
        total = mean(torch.cat([torch.tensor([count], dtype=torch.float64), block.flatten()]))
        if total[0] > 0:
            window = [*self._state.get("window", []), [float(total[0]), *(total[1:] / total[0]).tolist()]]
            self._state["window"] = window[-self.rule.window :]
        self._state["weight"] = self.memory.weight
        return self._decide()

    def _decide(self) -> dict[str, float]:
        """Strength of the correction: k - 1, or the share of the common direction."""
        window = torch.tensor(self._state.get("window", []), dtype=torch.float64)
        self._strength, geometry = 0.0, None
        if len(window) >= FEWEST:
            blocks = window[:, 1:].view(len(window), 2, -1)
            pairs = (window[:, 0] * 2**10).round().long()  # means over processes needn't be whole
            geometry = SetGeometry.from_batches(blocks, pairs)
        if isinstance(self.rule, SetBand):
            factor = 1.0 if geometry is None else self.rule.factor(geometry)
            self._strength, found = factor - 1.0, {"set/k": factor}
        else:
            assert isinstance(self.rule, DriftFree)
            self._strength = 0.0 if geometry is None else self.rule.share(geometry)
            found = {"set/common_share": self._strength}
        return found if geometry is None else found | self._foretold(geometry.products)

    def _foretold(self, effects: Tensor) -> dict[str, float]:
        """The drift of the corrected step, where it gains a margin."""
        step = effects[:, 0] - effects[:, 1]
        if isinstance(self.rule, SetBand):
            step = step + self._strength * effects[:, 0]
        else:
            step = step - self._strength * (effects[:, 2] + effects[:, 3])
        up, down = step.tolist()
        return {"set/step_drift": (up + down) / (2 * (up - down))} if up > down else {}

    @torch.no_grad()
    def _correct(self, optimizer: Optimizer, *_: Any) -> None:
        """The optimiser has taken its step: add the correction, and keep what later steps need."""
        groups = groups_of(optimizer)
        reach = self._reach(optimizer.param_groups[0])
        for name, chosen in self._chosen.items():
            parameter = self._parameters[name]
            group, state = groups[parameter], optimizer.state[parameter]
            if isinstance(self.rule, SetBand):
                move = _half_step(state, group, chosen.view_as(parameter))
            else:
                common = self.memory.averages[name][2:].sum(0).view_as(parameter) / self.memory.weight
                metric = preconditioner(optimizer, parameter, group)
                move = group["lr"] * reach * (common if metric is None else metric * common)
            if self._strength:
                parameter.sub_((self._strength * move).to(parameter))
            state[MEMORY] = self.memory.averages[name]
        self._chosen = {}

    def _reach(self, group: Mapping[str, Any]) -> float:
        """How far the step goes along a gradient that is always the same: 1 for Adam, whose averages have weight 1."""
        if "betas" in group or not group["momentum"]:
            return 1.0
        mu, before = group["momentum"], self._state.get("reach")
        self._state["reach"] = now = 1.0 if before is None else mu * before + 1 - group["dampening"]
        return 1 + mu * now if group["nesterov"] else now


def _half_step(state: dict[str, Any], group: Mapping[str, Any], chosen: Tensor) -> Tensor:
    """The part of the optimiser's step, without its sign, that comes from the chosen half's momentum.

    Args:
        state: of the parameter, after the step; the half's momentum in it is brought up to date.
        group: of the parameter.
        chosen: the chosen half of the clipped gradient.
    """
    half = state.get(HALF)
    if "betas" not in group:
        mu = group["momentum"]
        state[HALF] = half = (
            chosen.clone() if half is None else half.mul_(mu).add_(chosen, alpha=1 - group["dampening"])
        )
        along = chosen if not mu else chosen + mu * half if group["nesterov"] else half
        return group["lr"] * along
    half = torch.zeros_like(chosen) if half is None else half
    state[HALF] = half.lerp_(chosen, 1 - group["betas"][0])
    first, second = (1 - beta ** torch.as_tensor(state["step"]).double() for beta in group["betas"])
    root = state["exp_avg_sq"].sqrt() / second.sqrt()
    return group["lr"] / first * (half / root.add_(group["eps"]))

"""What torch's optimisers are about to do, read off their state just before they do it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, as_tensor, nn
from torch.optim import SGD, Adam, Optimizer

from entangle.analysis.ledger import ParameterStep, adamw_step, sgd_step
from entangle.training.trainer import TrainingError


def innermost(optimizer: Any) -> Optimizer:
    """The torch optimiser inside accelerate's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def momentum_of(optimizer: Optimizer) -> float | None:
    """The decay of the optimiser's average of gradients: beta1 of Adam's kin, momentum of SGD; None without one."""
    first = optimizer.param_groups[0]
    return float(first["betas"][0] if "betas" in first else first.get("momentum", 0.0)) or None


def preconditioner(optimizer: Optimizer, parameter: Tensor, group: Mapping[str, Any]) -> Tensor | None:
    """P = 1 / (sqrt(v / (1 - beta2^t)) + eps) of Adam and AdamW after t steps; None of others, or before a step.

    Args:
        optimizer: torch's own.
        parameter: one that it holds.
        group: the parameter's, for beta2 and eps.
    """
    state = optimizer.state.get(parameter, {})
    if not isinstance(optimizer, Adam) or "exp_avg_sq" not in state:
        return None
    square = state["exp_avg_sq"].float() / (1 - group["betas"][1] ** as_tensor(state["step"]).double())
    return 1 / (square.sqrt() + group["eps"])


def groups_of(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """The group of every parameter."""
    return {p: group for group in optimizer.param_groups for p in group["params"]}


def metric_of(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor] | None:
    """P of all parameters by name (see `preconditioner`); None where one has none.

    Args:
        optimizer: torch's own.
        parameters: by name.
    """
    groups = groups_of(optimizer)
    found = {name: preconditioner(optimizer, p, groups[p]) for name, p in parameters.items() if p in groups}
    known = {name: value for name, value in found.items() if value is not None}
    return known if len(known) == len(parameters) else None


def check_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimiser inside accelerate's, if the ledger knows its steps.

    Raises:
        TrainingError: it doesn't; the message names those it knows.
    """
    inner = innermost(optimizer)
    groups = inner.param_groups
    odd = [flag for flag in ("amsgrad", "maximize") if any(group.get(flag) for group in groups)]
    if not isinstance(inner, Adam | SGD) or odd:
        what = f"{type(inner).__name__}{' with ' + ', '.join(odd) if odd else ''}"
        raise TrainingError(
            f"ledger=True takes steps of torch's AdamW, Adam and SGD apart; this run has {what}. Train with "
            "optim='adamw_torch', 'adamw_torch_fused' or 'sgd', or leave the ledger out."
        )
    return inner


def read_step(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, ParameterStep]:
    """The coming step of every parameter that has a gradient, by name; the gradient is the clipped one.

    Law: `optimizer.step()` then changes a parameter by its `delta`, up to rounding.

    Args:
        optimizer: as `check_optimizer` gave it.
        parameters: the trained parameters.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {
        name: _step_of(p, optimizer.state.get(p, {}), groups[id(p)])
        for name, p in parameters.items()
        if p.grad is not None and id(p) in groups
    }


def _step_of(p: nn.Parameter, state: Mapping[str, Any], group: Mapping[str, Any]) -> ParameterStep:
    assert p.grad is not None
    rate, decay = float(group["lr"]), float(group["weight_decay"])
    if "betas" not in group:
        return sgd_step(
            p,
            p.grad,
            state.get("momentum_buffer"),
            lr=rate,
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            weight_decay=decay,
        )
    nothing = torch.zeros_like(p)
    return adamw_step(
        p,
        p.grad,
        state.get("exp_avg", nothing),
        state.get("exp_avg_sq", nothing),
        step=int(state.get("step", 0)) + 1,
        lr=rate,
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=decay,
        decoupled=group["decoupled_weight_decay"],
    )

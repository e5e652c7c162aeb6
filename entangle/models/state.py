"""A model that belongs to somebody else: measured, and given back exactly as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from entangle.scores.fused import plain_lora
from entangle.scores.logps import evaluating


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within: the model may be run and differentiated, but not into `.grad`; afterwards all is as before.

    Random state is restored. The forward is the model's own, without the autocast that accelerate wraps around it
    for training: what is measured is the function that the stored weights define, in their own precision. Fused LoRA
    kernels make way for the layers. Modes, `requires_grad` and weights are the engines' to restore.

    Raises:
        FusedLora: a fused LoRA kernel has no plain path that is known here.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    own: dict[str, Any] = model.__dict__
    wrapped = own.get("forward")
    with torch.random.fork_rng(devices=list(devices)), plain_lora(model):
        try:
            if "_original_forward" in own:
                own["forward"] = own["_original_forward"]
            yield
        finally:
            if "_original_forward" in own:
                own["forward"] = wrapped


@contextmanager
def wanting_as_before(model: nn.Module) -> Iterator[None]:
    """Within: `requires_grad` may be set anyhow; afterwards it is as before on every parameter."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    try:
        yield
    finally:
        for parameter, needed in wanted.items():
            parameter.requires_grad_(needed)


@contextmanager
def lent(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within: the model is in eval mode and exactly `parameters` want a gradient; afterwards all is as before.

    Law: the training that the model is in goes on bit for bit as if nothing had been measured.

    Args:
        model: a model that its owner may be training.
        parameters: some of its parameters.
    """
    with undisturbed(model), evaluating(model), wanting_as_before(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield

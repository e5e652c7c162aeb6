"""Float64 all the way through a model: its norms, rotary factors and softmax too.

Models of transformers ask for float32 in the middle of a pass, whatever their weights are: `hidden.to(torch.float32)`
in RMSNorm, `position_ids.float()` in rotary embeddings, `softmax(..., dtype=torch.float32)` in eager attention. Their
rounding is 1e-7 of what passes through, and reaches scores as some 1e-5 of a predicted change. Constants that a model
keeps in float32 (rotary frequencies) are its own, and are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_SOFTMAX = frozenset(
    {
        torch.softmax,
        torch.log_softmax,
        torch.Tensor.softmax,
        torch.Tensor.log_softmax,
        nn.functional.softmax,
        nn.functional.log_softmax,
    }
)


class KeepFloat64(TorchFunctionMode):
    """Within, whoever asks for float32 gets float64; for models whose weights are float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to or func in _SOFTMAX:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            if options.get("dtype") is torch.float32:
                options["dtype"] = torch.float64
        return func(*args, **options)


@contextmanager
def keeping_float64(model: nn.Module) -> Iterator[bool]:
    """Within: `KeepFloat64`, if all weights of the model are float64; yields whether they are.

    Args:
        model: the model that is run.
    """
    if not all(p.dtype == torch.float64 for p in model.parameters() if p.is_floating_point()):
        yield False
        return
    with KeepFloat64():
        yield True


@contextmanager
def in_float64(model: nn.Module) -> Iterator[bool]:
    """Within: float32 weights as float64, the same function without its rounding. Exact both ways.

    Weights of another precision stay as they are: rounding them up would make another function of a 16-bit model. So do
    weights on a device that has no float64, or on none.
    Yields whether the model is in float64 all the way.

    Args:
        model: the model; twice its memory is taken.
    """
    dtypes, devices = ({getattr(p, what) for p in model.parameters()} for what in ("dtype", "device"))
    if dtypes != {torch.float32} or any(device.type in ("meta", "mps") for device in devices):
        with keeping_float64(model) as is_exact:
            yield is_exact
        return
    try:
        model.double()
        with KeepFloat64():
            yield True
    finally:
        model.float()

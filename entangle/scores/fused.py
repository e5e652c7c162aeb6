"""Fused LoRA kernels, which compute adapted projections past the layers that hold them.

axolotl and unsloth replace functions of single modules: `self_attn.apply_qkv` and `apply_o` by `apply_lora_qkv` and
`apply_lora_o`, the `forward` of an MLP by `apply_lora_mlp_...`. These read A and B as matrices, so no hook on a layer
sees a call, and some overwrite their input in the backward pass, so no graph can be walked twice. For a measurement the
plain path, through the layers, is put back; it is the same function of the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from entangle.errors import UserError

PREFIX = "apply_lora_"
"""What the names of fused functions begin with."""

FLAGS = {
    "apply_qkv": "lora_qkv_kernel",
    "apply_o": "lora_o_kernel",
    "apply_in_proj_fused": "lora_qkv_kernel",
    "apply_out_proj": "lora_o_kernel",
    "apply_lora_embedding": "lora_embedding_kernel",
}
"""axolotl's flag by attribute or function; that of everything else is `lora_mlp_kernel`."""

ALWAYS_FUSED = ("apply_in_proj_fused", "apply_out_proj")
"""Attributes that only fused functions stand in, under names of their own."""


class FusedLora(UserError):
    """A model's fused LoRA kernels stand in the way of what was asked for."""


@dataclass(frozen=True)
class FusedCall:
    """A function of a module that goes past its layers.

    Args:
        name: the module's.
        module: the module.
        slot: the attribute that the function stands in.
        kernel: the function's name.
    """

    name: str
    module: nn.Module
    slot: str
    kernel: str

    def __str__(self) -> str:
        return f"{self.name}.{self.slot} is {self.kernel}"


def fused_calls(model: nn.Module) -> list[FusedCall]:
    """Every fused LoRA function of a model, found by its name."""
    return [
        FusedCall(name, module, slot, kernel)
        for name, module in model.named_modules()
        for slot, value in vars(module).items()
        if callable(value)
        and ((kernel := _name(value)).startswith(PREFIX) or (slot in ALWAYS_FUSED and kernel))
    ]


def describe_fused(calls: list[FusedCall]) -> str:
    """What is fused, and the flags that turn it off."""
    flags = dict.fromkeys(FLAGS.get(c.slot, FLAGS.get(c.kernel, "lora_mlp_kernel")) for c in calls)
    return (
        f"{len(calls)} fused LoRA kernels of axolotl or unsloth go past the layers ({calls[0]}). In axolotl they are "
        f"turned off by {', '.join(f'{flag}: false' for flag in flags)}"
    )


def check_unfused(model: nn.Module) -> None:
    """Refuse a model whose adapted layers aren't called.

    Raises:
        FusedLora: there are fused functions; the message says how to do without.
    """
    if calls := fused_calls(model):
        raise FusedLora(
            f"{describe_fused(calls)}. A policy made by Policy.of(model, tokenizer), and the probe set of "
            "EntanglementCallback, put the plain path back while they measure; elsewhere use plain_lora(model)."
        )


@contextmanager
def plain_lora(model: nn.Module) -> Iterator[None]:
    """Within: adapted projections go through their layers; afterwards the very functions are back.

    Args:
        model: any model; without fused functions nothing is done.

    Raises:
        FusedLora: a fused function has no plain path that is known here.
    """
    calls = fused_calls(model)
    unknown = [c for c in calls if c.slot not in _PLAIN or _name(type(c.module).forward).startswith(PREFIX)]
    if unknown:
        raise FusedLora(f"{describe_fused(unknown)}; no plain path is known here that could be put back.")
    kept = [(vars(call.module), call.slot, vars(call.module)[call.slot]) for call in calls]
    try:
        for call in calls:
            vars(call.module)[call.slot] = _PLAIN[call.slot](call.module)
        yield
    finally:
        for own, slot, function in kept:
            own[slot] = function


def _name(function: Any) -> str:
    """The name of a function, bound or with arguments given in advance; empty of what has none."""
    while isinstance(function, MethodType | partial):
        function = function.__func__ if isinstance(function, MethodType) else function.func
    name = getattr(function, "__name__", "")
    return name if isinstance(name, str) else ""


def _qkv(module: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Called as `apply_qkv(x)` (axolotl) or `apply_qkv(module, x)` (unsloth); without v_proj values are the keys."""

    def apply_qkv(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        x = args[-1]
        query, key = module.q_proj(x), module.k_proj(x)
        return query, key, key if module.v_proj is None else module.v_proj(x)

    return apply_qkv


def _out(module: Any) -> Callable[..., Tensor]:
    """Called as `apply_o(x)` or `apply_o(module, x)`."""
    return lambda *args: module.o_proj(args[-1])


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    return MethodType(type(module).forward, module)


_PLAIN: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "apply_qkv": _qkv,
    "apply_o": _out,
    "forward": _own_forward,
    "_unsloth_forward": _own_forward,
}
"""By slot, from a module to the function that goes through its layers."""

"""LoRA policies whose projections are computed past their layers, patched as axolotl and unsloth patch them."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaAttention

from tests.training import runs

LORA = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)


def product(layer: Any, x: Tensor) -> Tensor:
    """A LoRA layer's output from its matrices, as a fused kernel has it."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return x @ layer.base_layer.weight.T + layer.scaling["default"] * (x @ a.T @ b.T)


def apply_lora_qkv(self: Any, x: Tensor, inplace: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    return product(self.q_proj, x), product(self.k_proj, x), product(self.v_proj, x)


def apply_lora_o(self: Any, x: Tensor) -> Tensor:
    return product(self.o_proj, x)


def apply_lora_mlp_swiglu(self: Any, x: Tensor, inplace: bool = True) -> Tensor:
    return product(self.down_proj, F.silu(product(self.gate_proj, x)) * product(self.up_proj, x))


class _Given(nn.Module):
    """In the place of a projection: what was computed already, or is by a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class PatchedAttention(LlamaAttention):
    """An attention that asks `apply_qkv` and `apply_o` for its projections, called as axolotl does."""

    own: tuple[Any, ...] = ()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        query, key, value = self.apply_qkv(*self.own, hidden_states)  # type: ignore[operator]
        layers = dict(self._modules)
        try:
            self._modules["q_proj"] = _Given(lambda _: query)
            self._modules["k_proj"] = _Given(lambda _: key)
            self._modules["v_proj"] = _Given(lambda _: value)
            self._modules["o_proj"] = _Given(partial(self._out, layers))
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self._modules.update(layers)

    def _out(self, layers: dict[str, Any], x: Tensor) -> Tensor:
        self._modules.update(layers)
        return self.apply_o(*self.own, x)  # type: ignore[operator]


class UnslothAttention(PatchedAttention):
    """The same, called as unsloth does: with the module itself."""

    @property
    def own(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self,)


def policy() -> Any:
    """A random Llama with a LoRA on every projection, B random too."""
    model = get_peft_model(runs.policy(), LORA)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def fuse_as_axolotl(model: Any) -> Any:
    """Bound methods on every attention and MLP."""
    for layer in model.get_base_model().model.layers:
        layer.self_attn.__class__ = PatchedAttention
        layer.self_attn.apply_qkv = MethodType(apply_lora_qkv, layer.self_attn)
        layer.self_attn.apply_o = MethodType(apply_lora_o, layer.self_attn)
        layer.mlp.forward = MethodType(apply_lora_mlp_swiglu, layer.mlp)
    return model


def fuse_as_unsloth(model: Any) -> Any:
    """Plain functions on every attention, a bound one with an argument given in advance on every MLP."""
    for layer in model.get_base_model().model.layers:
        layer.self_attn.__class__ = UnslothAttention
        layer.self_attn.apply_qkv = apply_lora_qkv
        layer.self_attn.apply_o = apply_lora_o
        layer.mlp.forward = MethodType(partial(apply_lora_mlp_swiglu, inplace=False), layer.mlp)
    return model


class OverwritingSwiglu(torch.autograd.Function):
    """silu(a) b; its backward pass writes gradients over a and b, past autograd's notice, as Liger's kernel does."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        sigmoid = torch.sigmoid(a)
        of_a, of_b = grads[0] * b * sigmoid * (1 + a * (1 - sigmoid)), grads[0] * a * sigmoid
        a.data.copy_(of_a)
        b.data.copy_(of_b)
        return a, b


def overwrite_in_mlps(model: Any) -> Any:
    """Every MLP with `OverwritingSwiglu` between its layers, which are called."""
    for layer in model.get_base_model().model.layers:
        layer.mlp.forward = MethodType(_overwriting_forward, layer.mlp)
    return model


def _overwriting_forward(self: Any, x: Tensor) -> Any:
    return self.down_proj(OverwritingSwiglu.apply(self.gate_proj(x), self.up_proj(x)))

"""LoRA with the adapter folded into the weight: one matrix product per layer instead of three.

With W' = W + c B A the base layer alone computes the adapted output; its input x and output gradient g give

    dB = c sum_s g_s (A x_s)^T        dA = c sum_s (B^T g_s) x_s^T

Folding rounds the weight: harmless in float32 and float64, but in half precision it changes the function, so
there the layers stay unfolded and `lora_A`, `lora_B` are tapped as the linear layers they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from entangle.errors import UserError
from entangle.scores.rules import Call, Rule, vector
from entangle.scores.sites import Site
from entangle.scores.terms import OneHot, Outer, Term


def foldable(model: nn.Module) -> list[LoraLinear]:
    """LoRA layers that can be folded without changing the function."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [
        module
        for module in model.modules()
        if type(module) is LoraLinear and _is_plain(module) and owners[id(_base(module).weight)] == 1
    ]


def lora_sites(
    model: nn.Module, folded_layers: list[LoraLinear], parameters: Mapping[str, nn.Parameter]
) -> tuple[list[Site], dict[str, nn.Parameter]]:
    """Sites on folded layers and on adapted embeddings, and the parameters that they leave to other sites.

    Args:
        model: the model.
        folded_layers: layers whose adapter is folded into the weight.
        parameters: the probed ones, by name.
    """
    tapped: list[tuple[nn.Module, nn.Module, Rule]] = [
        (layer, _base(layer), _folded_rule(layer)) for layer in folded_layers
    ]
    for layer in model.modules():
        if type(layer) is LoraEmbedding and not layer.lora_variant:
            tapped.append((layer, layer, _embedding_rule(layer)))
    names = {id(p): name for name, p in parameters.items()}
    sites, left = [], dict(parameters)
    for layer, module, rule in tapped:
        own = {
            local: names[id(p)]
            for local, p in layer.named_parameters()
            if local.startswith("lora_") and id(p) in names
        }
        if own:
            sites.append(Site(module, rule, own))
            left = {name: p for name, p in left.items() if name not in own.values()}
    return sites, left


def check_adapters(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], layers: list[LoraLinear]
) -> None:
    """Refuse probed adapters that the forward pass doesn't use as they were when the sites were found.

    Args:
        model: the model.
        parameters: the probed ones, by name.
        layers: those found as foldable.

    Raises:
        UserError: a probed adapter is switched off or merged, or one of `layers` can't be folded any more.
    """
    probed = {id(p) for p in parameters.values()}
    for module in model.modules():
        if isinstance(module, LoraLayer) and (module.merged or module.disable_adapters):
            if any(id(p) in probed for p in module.parameters()):
                state = "merged into its layer" if module.merged else "switched off"
                raise UserError(f"The probed adapter is {state}, so it has no scores; undo that first.")
    if not all(_is_plain(layer) for layer in layers):
        raise UserError("The model's adapters have changed since the engine was made; make a new one.")


@contextmanager
def folded(layers: list[LoraLinear]) -> Iterator[None]:
    """Within: the layers' active adapters are folded into their weights. The very weights come back after."""
    before = [(layer, dict(_base(layer).named_parameters())) for layer in layers]
    data = [{name: p.data for name, p in own.items()} for _, own in before]
    try:
        for layer in layers:
            _fold(layer)
        yield
    finally:
        for (layer, own), kept in zip(before, data, strict=True):
            for name, parameter in own.items():
                parameter.data = kept[name]
            layer.merged_adapters.clear()


def _fold(layer: Any) -> None:
    """Put the active adapters into the base layer, in new storage."""
    base = layer.get_base_layer()
    for name in _active(layer):
        a, b = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
        factors = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
        base.weight.data = torch.addmm(base.weight.data, *factors, alpha=layer.scaling[name])
        if layer.lora_bias[name]:
            base.bias.data = base.bias.data + layer.lora_B[name].bias.data * layer.scaling[name]
    layer.merged_adapters.extend(_active(layer))


def _folded_rule(layer: Any) -> Rule:
    def rule(_: nn.Module, call: Call) -> dict[str, Term]:
        x, g = call.x, call.g
        terms: dict[str, Term] = {}
        for name in _active(layer):
            scale = layer.scaling[name]
            a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
            terms[f"lora_A.{name}.weight"] = Outer(g @ b * scale, x)
            terms[f"lora_B.{name}.weight"] = Outer(g, call.once(name, partial(torch.matmul, x, scale * a.T)))
            if layer.lora_bias[name]:
                terms[f"lora_B.{name}.bias"] = vector(g.sum(1) * scale)
        return terms

    return rule


def _embedding_rule(layer: Any) -> Rule:
    """An adapted embedding, y = W[id] + c (A^T)[id] B^T.

    dA = sum_s (c B^T g_s) e_id(s)^T, dB = sum_s c g_s (A_id(s))^T.
    """

    def rule(_: nn.Module, call: Call) -> dict[str, Term]:
        base = layer.get_base_layer()
        index, g = call.input.reshape(call.rows, -1), call.g * getattr(base, "embed_scale", 1.0)
        used = index != (-1 if base.padding_idx is None else base.padding_idx)
        terms: dict[str, Term] = {}
        for name in layer.active_adapters:
            if name in layer.lora_embedding_A:
                a, b = (w[name].detach() for w in (layer.lora_embedding_A, layer.lora_embedding_B))
                scaled = g * layer.scaling[name]
                terms[f"lora_embedding_A.{name}"] = Outer(
                    scaled @ b * used[..., None], OneHot(index, a.shape[1])
                )
                terms[f"lora_embedding_B.{name}"] = Outer(scaled, a.T[index])
        return terms

    return rule


def _base(layer: LoraLinear | LoraEmbedding) -> nn.Module:
    """The layer that the adapter wraps."""
    return cast(nn.Module, layer.get_base_layer())


def _active(layer: LoraLinear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_plain(layer: Any) -> bool:
    """An ordinary LoRA on an ordinary layer, switched on, all in one precision that survives folding."""
    base, active = layer.get_base_layer(), _active(layer)
    dtypes = {base.weight.dtype} | {layer.lora_A[name].weight.dtype for name in active}
    return (
        bool(active)
        and type(base) in (nn.Linear, Conv1D)
        and not (layer.merged or layer.disable_adapters)
        and not any(name in layer.lora_variant for name in active)
        and not any(layer.lora_bias[name] and base.bias is None for name in active)
        and dtypes in ({torch.float32}, {torch.float64})
    )

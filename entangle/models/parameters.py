"""Which parameters of a model are probed."""

from __future__ import annotations

import re

from peft import PeftModel
from torch import nn

from entangle.errors import ModelError


def choose_parameters(model: nn.Module, spec: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters to be probed, by name; marks exactly these as wanting a gradient.

    Args:
        model: the policy.
        spec: None, "lora", "full" or a regular expression (see `entangle.config.ModelOptions`).

    Raises:
        ModelError: nothing is selected, a selected one is quantised, or the expression is broken.
    """
    has_adapter = isinstance(model, PeftModel)
    # of several adapters, only the active one's parameters want a gradient
    named = {n: p for n, p in model.named_parameters() if not is_adapter_parameter(n) or p.requires_grad}
    if spec is None:
        chosen = {n: p for n, p in named.items() if p.requires_grad or not has_adapter}
    elif spec == "lora":
        chosen = {n: p for n, p in named.items() if is_adapter_parameter(n)}
    elif spec == "full":
        # PEFT keeps the original of a module that it saves with the adapter; only the copy is used
        chosen = {
            n: p for n, p in named.items() if not is_adapter_parameter(n) and ".original_module." not in n
        }
    else:
        try:
            chosen = {n: p for n, p in named.items() if re.search(spec, n)}
        except re.error as error:
            raise ModelError(f"parameters={spec!r} isn't a regular expression: {error}.") from None
    if not chosen:
        some = ", ".join(list(named)[:: max(1, len(named) // 4)][:5])
        hint = " The model has no adapter." if spec == "lora" and not has_adapter else ""
        raise ModelError(
            f"parameters={spec!r} selects none of {len(named)} parameters, such as {some}.{hint}"
        )
    quantised = [n for n, p in chosen.items() if not p.is_floating_point()]
    if quantised:
        raise ModelError(
            f"{len(quantised)} of the probed parameters are quantised ({quantised[0]}, ...) and have no "
            "gradient. Probe an adapter (adapter_name_or_path or use_peft), or select others by a regular "
            "expression."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of this name belongs to a LoRA adapter."""
    return ".lora_" in name

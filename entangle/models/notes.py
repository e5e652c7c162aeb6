"""What the reader of a policy's numbers should know of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from entangle.analysis.geometry import RESOLUTION
from entangle.config.places import is_local
from entangle.models.loading import Loading
from entangle.models.origin import Origin, adapter_config
from entangle.models.parameters import is_adapter_parameter
from entangle.scores.logps import causal_lm


def notes_on(model: nn.Module, loading: Loading, origin: Origin) -> tuple[str, ...]:
    """Notes on a loaded policy: its weights, its precision, its adapter, what is switched off."""
    notes = []
    if isinstance(model, PeftModel) and is_zero_lora(model):
        notes.append("Every B of the LoRA is 0: the gradient in A is exactly 0, so scores lie in B alone.")
    notes += [*_broken(model), *_other_base(origin), *_experts(model), *_precision(model, loading)]
    config = causal_lm(model).config.get_text_config()  # pyright: ignore
    rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    rates.add(getattr(config, "attention_dropout", 0.0))
    if any(rates):
        notes.append(
            f"Dropout (up to {max(rates):g} in the configuration) is switched off for the measurement."
        )
    return tuple(notes)


def is_zero_lora(model: nn.Module) -> bool:
    """Whether the adapter is plain LoRA whose every B is 0, so that it adds nothing."""
    named = dict(model.named_parameters())
    adapter = {n: p for n, p in named.items() if is_adapter_parameter(n)}
    factors = (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B")
    plain = all(any(factor in n for factor in factors) for n in adapter)
    late = (p for n, p in adapter.items() if any(factor in n for factor in _ZERO))
    return bool(adapter) and plain and not any(bool(p.any()) for p in late) and not _brings_copies(named)


_ZERO = (".lora_B", ".lora_embedding_A")
"""The factor of a LoRA that starts at 0: B, and in an embedding A."""


def _brings_copies(named: Mapping[str, nn.Parameter]) -> bool:
    """Whether the adapter holds trained weights of the base itself, unlike the base's own."""
    for name, copy in named.items():
        if ".trainable_tokens_delta" in name:
            return True
        head, found, tail = name.partition(".modules_to_save.")
        original = named.get(f"{head}.original_module.{tail.partition('.')[2]}")
        if found and (original is None or not torch.equal(original, copy)):
            return True
    return False


def _broken(model: nn.Module) -> Iterator[str]:
    broken = {
        name: int((~p.isfinite()).sum()) for name, p in model.named_parameters() if p.is_floating_point()
    }
    broken = {name: count for name, count in broken.items() if count}
    if broken:
        shown = ", ".join(f"{name} ({count} values)" for name, count in list(broken.items())[:5])
        yield (
            f"{len(broken)} weight tensors hold values that aren't finite (NaN or infinite), so numbers that pass "
            f"through them can't be either: {shown}{', ...' * (len(broken) > 5)}. The checkpoint was saved broken."
        )


def _other_base(origin: Origin) -> Iterator[str]:
    if origin.adapter is None:
        return
    recorded = adapter_config(origin.adapter, origin.adapter_revision).base_model_name_or_path
    if not recorded or recorded == origin.base:
        return
    if (
        is_local(recorded)
        and is_local(origin.base)
        and Path(recorded).resolve() == Path(origin.base).resolve()
    ):
        return
    yield (
        f"The adapter {origin.adapter} names another base, {recorded!r}, than the one that it is put on, "
        f"{origin.base!r}. Unless these are one model under two names, scores and reference are those of a mixture "
        "that nobody trained."
    )


def _experts(model: nn.Module) -> Iterator[str]:
    config = causal_lm(model).config.get_text_config()  # pyright: ignore
    if getattr(config, "output_router_logits", False):
        yield (
            "output_router_logits is on: a training adds the router's own loss to the preference loss; scores and "
            "predictions are of the preference loss alone."
        )
    if not isinstance(model, PeftModel):
        return
    fused = {n for n, p in model.named_parameters() if p.dim() == 3 and not is_adapter_parameter(n)}
    adapted = {n.split(".lora_")[0] for n, _ in model.named_parameters() if is_adapter_parameter(n)}
    bare = sorted(n for n in fused if not any(n.startswith(f"{module}.") for module in adapted))
    if bare:
        yield (
            f"The LoRA isn't on {len(bare)} fused tensors of experts ({bare[0]}, ...): what they learn in a training "
            "of all weights isn't measured. PEFT puts one on them by target_parameters."
        )


def _precision(model: nn.Module, loading: Loading) -> Iterator[str]:
    name = str(loading.computing).removeprefix("torch.")
    gigabytes = sum(p.nbytes for p in model.parameters()) / 1e9
    if loading.is_rounded:
        yield (
            f"Weights are rounded to {loading.dtype} and computed with in {name}, which takes {gigabytes:.3g} GB; "
            f"--score_dtype {loading.dtype} takes less, and makes scores approximate."
        )
    if RESOLUTION[loading.computing] > RESOLUTION[torch.float32]:
        yield (
            f"Scores are computed in {name}, so they are approximate: what is within "
            f"{100 * RESOLUTION[loading.computing]:g} % of zero has no sign. --score_dtype float32 makes them exact."
        )
    if not loading.is_quantised and getattr(causal_lm(model).config, "quantization_config", None):
        yield "The checkpoint's own weights are quantised: scores are those of the rounded model."
    if loading.is_quantised:
        yield (
            "The base is in 4 bits: scores are those of the rounded model."
            if loading.load_in_4bit
            else "The base is in 8 bits, and so are its activations: scores are approximate, to about 2 %."
        )

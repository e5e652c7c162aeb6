"""Hashes of what decides a policy's numbers, and a description of it for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from entangle.config.hashing import hash_file, sha256_of
from entangle.config.places import is_local
from entangle.models.loading import Loading, coarsest_dtype
from entangle.models.parameters import is_adapter_parameter
from entangle.scores.logps import input_device


def identity_of(
    base_name: str, base: PreTrainedModel, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Hashes of model, adapter, tokenizer and chat template: a resumed run must find the same."""
    return {
        "model": _hash_weights(base_name) if is_local(base_name) else commit_of(base),
        "adapter": _hash_adapter(model) if isinstance(model, PeftModel) else None,
        "tokenizer": _hash_tokenizer(tokenizer),
        "chat_template": _sha256(json.dumps(tokenizer.chat_template)) if tokenizer.chat_template else None,
    }


def _hash_weights(folder: str) -> str:
    """sha256 over the names and contents of a folder's configuration and safetensors files."""
    files = sorted([Path(folder) / "config.json", *Path(folder).glob("*.safetensors")])
    return sha256_of(f"{file.name}:{hash_file(file)}\n".encode() for file in files)


def _hash_adapter(model: PeftModel) -> str:
    """sha256 over the names and values of the adapter's weights."""
    weights = sorted(get_peft_model_state_dict(model, save_embedding_layers=False).items())
    return sha256_of(
        f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode() + _bytes_of(weight)
        for name, weight in weights
    )


def _bytes_of(weight: torch.Tensor) -> bytes:
    return weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    content = tokenizer.backend_tokenizer.to_str() if fast else tokenizer.get_vocab()
    return _sha256(json.dumps([content, special], sort_keys=True))


def _sha256(text: str) -> str:
    return sha256_of([text.encode()])


def describe(
    base: PreTrainedModel,
    model: PreTrainedModel | PeftModel,
    chosen: Mapping[str, nn.Parameter],
    names: Mapping[str, str | None],
    loading: Loading,
) -> dict[str, Any]:
    """Names, sizes and precision of a policy, for people."""
    in_adapter = [is_adapter_parameter(name) for name in chosen]
    kind = "lora" if all(in_adapter) else "mixed" if any(in_adapter) else "full"
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return dict(names) | {
        "adapter_base": config.base_model_name_or_path if config else None,
        "lora_r": config.r if isinstance(config, LoraConfig) else None,
        "lora_alpha": config.lora_alpha if isinstance(config, LoraConfig) else None,
        "architecture": type(base).__name__,
        "attn_implementation": base.config._attn_implementation,
        "dtype": loading.dtype,
        "bits": 4 if loading.load_in_4bit else 8 if loading.load_in_8bit else None,
        "device": str(input_device(model)),
        "score_dtype": str(coarsest_dtype(model)).removeprefix("torch."),
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "probed_parameters": sum(p.numel() for p in chosen.values()),
        "probed_tensors": len(chosen),
        "probed_kind": kind,
    }


def commit_of(model: PreTrainedModel) -> str | None:
    """The hub commit that a model was loaded from; transformers keeps it only where there is one."""
    return getattr(model.config, "_commit_hash", None)

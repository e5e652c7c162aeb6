"""Tiny random causal language models of many architectures, built from config, and batches to run them on."""

from __future__ import annotations

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from entangle.scores.rows import RowBatch

VOCAB = 48

_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2_LIKE = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "llama_biased": ("LlamaConfig", _LLAMA_LIKE | {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("LlamaConfig", _LLAMA_LIKE | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", _LLAMA_LIKE | {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", _LLAMA_LIKE | {"head_dim": 8}),
    "gemma": ("GemmaConfig", _LLAMA_LIKE | {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        _LLAMA_LIKE | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    ),
    "gemma3": ("Gemma3TextConfig", _LLAMA_LIKE | {"head_dim": 8, "sliding_window": 5}),
    "phi": ("PhiConfig", _LLAMA_LIKE),
    "phi3": ("Phi3Config", _LLAMA_LIKE),
    "gpt2": ("GPT2Config", _GPT2_LIKE),
    "gptj": ("GPTJConfig", _GPT2_LIKE | {"rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "window_size": 5,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _LLAMA_LIKE),
    "opt": (
        "OPTConfig",
        _LLAMA_LIKE | {"ffn_dim": 24, "word_embed_proj_dim": 16, "activation_function": "relu"},
    ),
    "falcon": ("FalconConfig", _LLAMA_LIKE | {"new_decoder_architecture": False, "multi_query": True}),
    "bloom": (
        "BloomConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "n_layer": 2,
            "n_head": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "olmo": ("OlmoConfig", _LLAMA_LIKE),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE),
    "cohere": ("CohereConfig", _LLAMA_LIKE | {"logit_scale": 0.3}),
    "granite": ("GraniteConfig", _LLAMA_LIKE | {"logits_scaling": 3.0}),
    "stablelm": ("StableLmConfig", _LLAMA_LIKE),
    "smollm3": ("SmolLM3Config", _LLAMA_LIKE),
    "mixtral": (
        "MixtralConfig",
        _LLAMA_LIKE | {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        _LLAMA_LIKE
        | {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "decoder_sparse_step": 1,
            "experts_implementation": "eager",
        },
    ),
}
"""Config class and options by the name that the tests use."""


def tiny_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options: object) -> nn.Module:
    """A random model; weights are drawn wider than at initialisation, so that every part has a say."""
    kind, settings = ARCHITECTURES[name]
    config: PretrainedConfig = getattr(transformers, kind)(**(settings | options))
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise * 1.5)
    return model.to(dtype).eval()


def with_lora(model: nn.Module, seed: int = 0, **options: object) -> nn.Module:
    """The model with a LoRA adapter whose B isn't zero."""
    settings = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "target_modules": "all-linear"} | options
    dtype = next(model.parameters()).dtype
    settings["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in model.modules())
    adapted = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)  # pyright: ignore
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapted.to(dtype).eval()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_batch(
    prompts: int = 3, group_size: int = 2, seed: int = 0, side: str = "right", padding: int = 2
) -> RowBatch:
    """Responses of random length to prompts of random length; the padding doesn't change the tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> torch.Tensor:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, VOCAB, (length,), generator=generator)

    heads = [tokens(3, 9) for _ in range(prompts)]
    rows = [(head, tokens(1, 7)) for _ in range(group_size) for head in heads]
    width = max(len(head) + len(tail) for head, tail in rows) + padding
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (head, tail) in enumerate(rows):
        length = len(head) + len(tail)
        start = width - length if side == "left" else 0
        ids[i, start : start + length] = torch.cat([head, tail])
        attention[i, start : start + length] = 1
        completion[i, start + len(head) : start + length] = 1
    return RowBatch(ids, attention, completion, torch.tensor([len(h) for h in heads]), group_size=group_size)


def select(batch: RowBatch, rows: list[int], group_size: int) -> RowBatch:
    """Some rows of a batch, grouped anew; `rows` in the order k * n + i."""
    prompts = [row % len(batch.prompt_length) for row in rows[: len(rows) // group_size]]
    return RowBatch(
        batch.input_ids[rows],
        batch.attention_mask[rows],
        batch.completion_mask[rows],
        batch.prompt_length[prompts],
        group_size=group_size,
    )

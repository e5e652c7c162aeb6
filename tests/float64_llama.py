"""A Llama with a LoRA written out in float64 from its formulas: an oracle without transformers and hooks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import LlamaConfig


def row_logp(
    weights: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    config: LlamaConfig,
    ids: list[int],
    prompt: int,
) -> Tensor:
    """Sum of log pi of the tokens after the prompt, nats.

    Args:
        weights: of the base, by the names of its checkpoint, float64.
        adapter: `<module>.lora_A.weight` and `.lora_B.weight`, float64; scale 2.
        config: the model's.
        ids: the row.
        prompt: tokens that aren't scored.
    """
    heads, groups = config.num_attention_heads, int(config.num_key_value_heads or 0)
    length, size = len(ids), config.hidden_size // heads

    def linear(name: str, x: Tensor) -> Tensor:
        y = x @ weights[f"{name}.weight"].T
        if f"{name}.lora_A.weight" in adapter:
            y = y + 2 * (x @ adapter[f"{name}.lora_A.weight"].T @ adapter[f"{name}.lora_B.weight"].T)
        return y

    def norm(name: str, x: Tensor) -> Tensor:
        return (
            weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        )

    # the model's own constants, float32 as it keeps them
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies.double()

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    x = weights["model.embed_tokens.weight"][torch.tensor(ids)]
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    for layer in range(config.num_hidden_layers):
        own = f"model.layers.{layer}"
        h = norm(f"{own}.input_layernorm", x)
        q, k, v = (
            linear(f"{own}.self_attn.{part}_proj", h).view(length, -1, size).transpose(0, 1) for part in "qkv"
        )
        q, k = turned(q), turned(k).repeat_interleave(heads // groups, 0)
        attention = (q @ k.transpose(1, 2) / math.sqrt(size) + mask).softmax(-1)
        mixed = attention @ v.repeat_interleave(heads // groups, 0)
        x = x + linear(f"{own}.self_attn.o_proj", mixed.transpose(0, 1).flatten(1))
        h = norm(f"{own}.post_attention_layernorm", x)
        gate, up = linear(f"{own}.mlp.gate_proj", h), linear(f"{own}.mlp.up_proj", h)
        x = x + linear(f"{own}.mlp.down_proj", gate * torch.sigmoid(gate) * up)
    logits = norm("model.norm", x) @ weights["lm_head.weight"].T
    logps = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return logps[prompt - 1 :].sum()

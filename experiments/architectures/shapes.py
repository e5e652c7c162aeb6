"""The smallest shape of every causal architecture that transformers registers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 48
LAYERS = 2
LARGEST = 400_000
"""Parameters of a model that still counts as tiny."""

ARCHITECTURES = dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))
"""Class by model type, as `AutoModelForCausalLM` knows them."""

_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        (
            "vocab_size",
            "decoder_vocab_size",
            "vocab_size_per_layer_input",
            "pronunciation_vocab_size",
            "shape_vocab_size",
            "unpadded_vocab_size",
        ),
        VOCABULARY,
    ),
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "emb_dim",
            "embedding_dim",
            "embedding_size",
            "word_embed_proj_dim",
            "attention_hidden_size",
            "lru_width",
            "backbone_hidden_size",
            "input_embedding_size",
            "output_embedding_size",
        ),
        16,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_dim",
            "ffn_hidden_size",
            "d_inner",
            "dff",
            "dim_ff",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "intermediate_size_mlp",
            "expert_ffn_hidden_size",
            "dense_intermediate_size",
            "feed_forward_size",
            "moe_shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
        ),
        24,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "decoder_layers",
            "encoder_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "num_blocks",
            "num_encoder_layers",
            "num_decoder_layers",
            "num_layers_per_stack",
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "attention_heads",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
            "swa_num_attention_heads",
            "index_n_heads",
            "num_key_value_heads",
            "swa_num_key_value_heads",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "head_dim",
            "kv_channels",
            "dim_head",
            "swa_head_dim",
            "index_head_dim",
            "qk_rope_head_dim",
            "qk_nope_head_dim",
            "v_head_dim",
            "kv_lora_rank",
            "q_lora_rank",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_head_dim",
            "mamba_d_head",
            "attention_head_size",
            "d_head",
            "mamba_d_state",
            "ssm_state_size",
            "state_size",
            "mamba_head_dim",
            "query_pre_attn_scalar",
            "router_hidden_size",
            "hidden_size_per_layer_input",
            "laurel_rank",
            "o_lora_rank",
            "d_rel",
            "gated_norm_rank",
            "adapter_rank",
            "hc_lowrank",
        ),
        8,
    ),
    "qk_head_dim": 16,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "zero_expert_num"), 1),
    **dict.fromkeys(
        (
            "sliding_window",
            "window_size",
            "attention_chunk_size",
            "local_attention",
            "attention_window_size",
            "sliding_window_size",
            "keep_window_size",
        ),
        5,
    ),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "context_length",
            "rel_extent",
            "model_max_length",
            "max_target_positions",
            "max_source_positions",
            "index_topk",
        ),
        64,
    ),
    **dict.fromkeys(
        (
            "chunk_size",
            "mamba_chunk_size",
            "block_multiple_of",
            "block_size",
            "time_step_rank",
            "mamba_dt_rank",
            "local_attn_chunk_length",
            "lsh_attn_chunk_length",
            "ffn_round_up_to_multiple_of",
            "pronunciation_embed_dim",
            "shape_embed_dim",
        ),
        8,
    ),
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "linear_num_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "prompt_length": 4,
    "prompt_types": 2,
    "segment_types": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "num_kv_shared_layers": 0,
}
"""Options by name, for every config that has them."""

_SHAPES: dict[str, dict[str, Any]] = {
    "codegen": {"num_attention_heads": 4, "rotary_dim": 4},
    "cpmant": {"prompt_types": 32, "segment_types": 32},
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2, "num_experts": 4},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    "mimo_v2_flash": {"head_dim": 16, "v_head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 4, "expand": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "num_attention_heads": 2,
        "attn_layers": ["local", "local"],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 5,
        "attention_hidden_size": 32,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "attention_hidden_size": 32,
        "attention_head_dim": 16,
        "mamba_headdim": 8,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1],
        "layers_block_type": ["mamba", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str, **options: Any) -> PretrainedConfig:
    """A config of this model type, everything in it as small as it goes; `options` come last."""
    cls = CONFIG_MAPPING[kind]
    own = _SHAPES.get(kind, {})
    try:
        default = cls()
    except Exception:  # some have no default
        default = None
    kept = vars(default) if default is not None else {}
    known = {*kept, *inspect.signature(cls.__init__).parameters, *getattr(cls, "__dataclass_fields__", ())}
    settings = {
        name: value
        for name, value in _SIZES.items()
        if (name in known or name in cls.attribute_map)
        and kept.get(cls.attribute_map.get(name, name), 0) is not None
    }
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if isinstance(kinds := kept.get(name), list):
            settings[name] = spread(kinds)
            settings |= {"num_hidden_layers": len(settings[name])} if "num_hidden_layers" in settings else {}
    return cls(**(settings | own | options))


def spread(kinds: list[Any]) -> list[Any]:
    """One layer of every kind, at least two, in the order in which the kinds first appear."""
    first = list(dict.fromkeys(kinds))
    return first if len(first) > 1 else first * LAYERS


def tiny_model(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    """A random float64 model of this type; weights are drawn wide, so that every part has a say."""
    config = tiny_config(kind, **options)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters at the smallest shape tried")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise * 1.5)
    return model.double().eval()

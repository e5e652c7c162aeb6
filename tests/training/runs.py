"""Tiny training runs: a random two-layer Llama, a word-level tokenizer, synthetic pairs of unequal length."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from entangle.analysis.mitigations import RewardCalibration
from entangle.training import PreferenceTrainer
from entangle.training.mitigated import MitigatedTrainer
from losses import DPO

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
WORDS = [f"w{i}" for i in range(40)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; texts of other words become the unknown token."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def policy(seed: int = 0, vocab_size: int = len(WORDS) + 3) -> LlamaForCausalLM:
    """The random Llama; equal seeds give equal weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.3,
        )
    )


def pairs(count: int = 16) -> Dataset:
    """Pairs whose responses have 2 to 9 words."""
    generator = torch.Generator().manual_seed(7)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))

    rows = [(text(3, 8), " " + text(2, 9), " " + text(2, 9)) for _ in range(count)]
    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])


def arguments(folder: Path, **options: Any) -> DPOConfig:
    """A quiet CPU run of 20 steps of 4 pairs in float32."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return DPOConfig(**(defaults | options))


def trainer(folder: Path, cls: type[DPOTrainer] = PreferenceTrainer, **options: Any) -> DPOTrainer:
    """A trainer of the tiny policy with a fresh LoRA; `args` (a dict) go to DPOConfig."""
    args = arguments(folder, **options.pop("args", {}))
    defaults: dict[str, Any] = {
        "model": policy(),
        "args": args,
        "train_dataset": pairs(),
        "processing_class": tokenizer(),
        "peft_config": LORA,
    }
    return cls(**(defaults | options))


def calibrated(folder: Path, **args: Any) -> float:
    """The moving average after 3 steps of reward calibration."""
    rule = RewardCalibration(norms="ema")
    done = trainer(folder, MitigatedTrainer, mitigation=rule, loss=DPO(), args={"max_steps": 3} | args)
    done.train()
    state: Any = done.state.stateful_callbacks["reward_calibration"]
    return state["log_ratio"]


def digest(model: nn.Module) -> str:
    """Md5 of the trained parameters, in order of their names."""
    md5 = hashlib.md5(usedforsecurity=False)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            md5.update(name.encode() + parameter.detach().numpy().tobytes())
    return md5.hexdigest()


def logged(done: DPOTrainer, key: str) -> list[float]:
    """A metric's values over the log rows that have it."""
    return [row[key] for row in done.state.log_history if key in row]


def plain_logps(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed and per-token log-probs from plain logits, `(2B,)` and `(2B, T-1)`: no code of TRL or ours."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    chosen = torch.log_softmax(logits.float(), -1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    tokens = chosen * batch["completion_mask"][:, 1:]
    return tokens.sum(1), tokens


def collated(done: DPOTrainer, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """These rows of the training set as one of TRL's batches."""
    return done.data_collator([done.train_dataset[i] for i in rows])

"""A training under which both log-probs fall: every rejected response is its chosen one, said twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from tests.training import runs


def falling_pairs(count: int = 24, seed: int = 3) -> Dataset:
    """Pairs whose rejected score is along the chosen one and longer, so that pushing it down drags that along."""
    generator = torch.Generator().manual_seed(seed)

    def words(length: int) -> str:
        picked = torch.randint(8, (length,), generator=generator)
        return " ".join(runs.WORDS[i] for i in picked)

    rows = []
    for number in range(count):
        chosen = words(int(torch.randint(3, 6, (1,), generator=generator)))
        twice = f" {chosen} {chosen} {words(2)}"
        rows.append(
            {
                "prompt": words(4),
                "chosen": f" {chosen}",
                "rejected": twice,
                "kind": "even" if number % 2 == 0 else "odd",
            }
        )
    return Dataset.from_list(rows)


def saved_base(folder: Path) -> Path:
    """The tiny random policy with its tokenizer, as a user's model on disk."""
    runs.policy().save_pretrained(folder)
    runs.tokenizer().save_pretrained(folder)
    return folder


def trained(folder: Path, base: Path, **options: Any) -> Path:
    """Plain TRL: twelve DPO steps with three checkpoints, on the falling pairs."""
    args = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, "learning_rate": 3e-3}
    model = AutoModelForCausalLM.from_pretrained(base)
    args |= options.pop("args", {})
    data = {"train_dataset": falling_pairs().remove_columns("kind")} | options
    runs.trainer(folder, DPOTrainer, model=model, args=args, **data).train()
    return folder

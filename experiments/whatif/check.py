"""Does training do what `entangle whatif` predicts from one probe?

    entangle probe --config experiments/whatif/start.yaml
    python experiments/whatif/check.py

On these pairs `whatif` says that DPO needs no change: a step on any pair alone raises its chosen response and lowers
its rejected one. Training takes many AdamW steps on batches. This trains the embedded adapter with the recommended
setting (DPO as it is) and with an NLL weight at which half of the pairs are predicted to be both up, on the same pairs,
and counts the pairs whose log-probs went down and up in the end. The gap to the prediction is the finding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.dpo_config import DPOConfig

from entangle.analysis.statistics import share
from entangle.commands.whatif import what_if
from entangle.data import PreferencePair, collate, load_pairs, tokenize_pair
from entangle.embedded import ADAPTER, POLICY
from entangle.scores import row_logps
from entangle.training import PreferenceTrainer
from losses import PreferenceLoss, build

START = Path("experiments/results/whatif/start")
OUTPUT = Path("experiments/results/whatif/check.json")


def policy() -> PeftModel:
    """The embedded policy with its adapter, trainable."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POLICY), ADAPTER, is_trainable=True)


def logps(model: torch.nn.Module, pairs: Sequence[PreferencePair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probs of the chosen and of the rejected responses, `(pairs,)` each, nats."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenized = [tokenize_pair(tokenizer, pair) for pair in pairs]
    parts = [row_logps(model, collate(tokenized[i : i + 4], 0)).chunk(2) for i in range(0, len(tokenized), 4)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def train(
    loss: PreferenceLoss, rows: Sequence[dict[str, str]], seed: int, steps: int, rate: float
) -> PeftModel:
    """The adapter after `steps` AdamW steps of 8 pairs with this loss, from the embedded state."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DPOConfig(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=rate,
            seed=seed,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_steps=steps,
            disable_tqdm=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(POLICY)
        trainer = PreferenceTrainer(
            policy(),
            args=arguments,
            loss=loss,
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=tokenizer,
        )
        trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model).eval()


def settings() -> list[tuple[PreferenceLoss, dict[str, Any]]]:
    """The losses to train with, each with the regime shares that `what_if` predicts of it."""
    whatif = what_if(str(START), losses=("dpo",), knobs=("nll",), target=0.9)
    print(whatif.summary["recommendation"])
    half = float(whatif.critical["nll_upper"].median())
    losses = (build("dpo"), build({"name": "with_sft", "loss": "dpo", "alpha": round(half, 1)}))
    judged = what_if(str(START), losses=losses, knobs=("nll",)).regimes
    return [
        (loss, {str(k): float(v) for k, v in judged[loss.label].value_counts(normalize=True).items()})
        for loss in losses
    ]


def main() -> None:
    """Run the comparison and write its figures."""
    parser = argparse.ArgumentParser(description="Does training do what whatif predicts?")
    parser.add_argument("--data", default="../shared/data/tldr/tldr_pairs.jsonl")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    options = parser.parse_args()
    pairs = load_pairs(options.data)
    rows = [{"prompt": str(p.prompt), "chosen": str(p.chosen), "rejected": str(p.rejected)} for p in pairs]
    before = logps(policy().eval(), pairs)
    runs = []
    for loss, predicted in settings():
        for seed in (0, 1, 2):
            after = logps(train(loss, rows, seed, options.steps, options.learning_rate), pairs)
            chosen, rejected = (new - old for new, old in zip(after, before, strict=True))
            runs.append(
                {
                    "loss": loss.label,
                    "seed": seed,
                    "predicted_of_one_step": predicted,
                    "chosen_fell": share(int((chosen < 0).sum()), len(pairs)),
                    "rejected_rose": share(int((rejected > 0).sum()), len(pairs)),
                    "change_chosen": float(chosen.mean()),
                    "change_rejected": float(rejected.mean()),
                }
            )
            print(json.dumps(runs[-1]), flush=True)
    recipe = {
        "steps": options.steps,
        "batch": 8,
        "learning_rate": options.learning_rate,
        "optimizer": "adamw",
    }
    OUTPUT.write_text(json.dumps({"recipe": recipe, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()

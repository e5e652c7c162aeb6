"""Does the recommended setting do in training what `entangle whatif` predicts from one probe?

    entangle probe --config experiments/whatif/start.yaml
    python experiments/whatif/check.py

Trains the embedded adapter with DPO and with the smallest helpful change that `what_if` finds, on the same pairs in
the same order, and counts the pairs whose chosen log-prob is lower at the end than at the start. The prediction is of
one SGD step on each pair alone; training takes many AdamW steps on batches. The gap between the two is the finding.
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

from entangle.data import PreferencePair, collate, load_pairs, tokenize_pair
from entangle.embedded import ADAPTER, POLICY
from entangle.scores import row_logps
from entangle.summary import share
from entangle.training import PreferenceTrainer
from entangle.whatif import what_if
from losses import PreferenceLoss, build

START = Path("experiments/results/whatif/start")
OUTPUT = Path("experiments/results/whatif/check.json")


def policy() -> PeftModel:
    """The embedded policy with its adapter, trainable."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POLICY), ADAPTER, is_trainable=True)


def chosen_logps(model: torch.nn.Module, pairs: Sequence[PreferencePair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probs of the chosen and of the rejected responses, `(pairs,)` each, nats."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenized = [tokenize_pair(tokenizer, pair) for pair in pairs]
    parts = [row_logps(model, collate(tokenized[i : i + 4], 0)).chunk(2) for i in range(0, len(tokenized), 4)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def train(loss: PreferenceLoss, rows: Sequence[dict[str, str]], seed: int, steps: int, rate: float) -> PeftModel:
    """The adapter after `steps` AdamW steps of 8 pairs with this loss, from the embedded state."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DPOConfig(
            output_dir=scratch, max_steps=steps, per_device_train_batch_size=8, learning_rate=rate, seed=seed,
            lr_scheduler_type="constant", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_steps=steps, disable_tqdm=True,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(POLICY)
        trainer = PreferenceTrainer(
            policy(), args=arguments, loss=loss, train_dataset=Dataset.from_list(list(rows)), processing_class=tokenizer
        )
        trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model).eval()


def smallest_change(target: float) -> tuple[PreferenceLoss, dict[str, Any]]:
    """The loss that the NLL knob recommends at this target, with what is predicted of it and of DPO."""
    result = what_if(str(START), losses=("dpo",), knobs=("nll",), target=target)
    change = result.summary["changes"][0]
    weight = change["setting"]
    loss = build({"name": "with_sft", "loss": "dpo", "alpha": weight})
    return loss, {"target": target, "alpha": weight, "at_start": change["at_start"], "at_setting": change["at_setting"]}


def main() -> None:
    """Run the comparison and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/tldr/tldr_pairs.jsonl")
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    options = parser.parse_args()
    pairs = load_pairs(options.data)
    rows = [{"prompt": str(p.prompt), "chosen": str(p.chosen), "rejected": str(p.rejected)} for p in pairs]
    recommended, prediction = smallest_change(options.target)
    before = chosen_logps(policy().eval(), pairs)
    runs = []
    for loss in (build("dpo"), recommended):
        for seed in (0, 1, 2):
            after = chosen_logps(train(loss, rows, seed, options.steps, options.learning_rate), pairs)
            change = [new - old for new, old in zip(after, before, strict=True)]
            runs.append({
                "loss": loss.label, "seed": seed, "chosen_fell": share(int((change[0] < 0).sum()), len(pairs)),
                "chosen_change": float(change[0].mean()), "rejected_change": float(change[1].mean()),
                "margin_change": float((change[0] - change[1]).mean()),
            })  # fmt: skip
            print(json.dumps(runs[-1]), flush=True)
    settings = {"steps": options.steps, "batch": 8, "learning_rate": options.learning_rate, "optimizer": "adamw"}
    OUTPUT.write_text(json.dumps({"settings": settings, "prediction": prediction, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A short GRPO run: the change of each prompt's reward against its initial std, and dead groups over training.

From the project's root: python -m experiments.rft.grpo

TRL's GRPOTrainer trains the embedded policy's adapter on 24 real TL;DR prompts. The reward is 1 for an answer with
ROUGE-L of at least 0.15 against the chosen summary, else 0: with ROUGE-L itself hardly any group of answers ties.
Counterpart of Finding II of arXiv 2310.20703. Writes experiments/results/rft/grpo; the adapter goes to runs/.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from entangle.commands.rft import run_change, run_rft
from entangle.config import RftConfig
from entangle.figures.style import new_axes, save
from entangle.measure.inputs import load_policy_of
from entangle.rewards.functions import AnswerSet, RougeL
from entangle.rewards.rollouts import load_prompts

RESULTS, ADAPTER = Path("experiments/results/rft/grpo"), Path("runs/grpo/adapter")
LEAST, GROUP, STEPS, WINDOW = 0.15, 8, 48, 8
"""ROUGE-L that is rewarded; answers per group; optimiser steps; steps per point of the figure."""

MEASURING = RftConfig(
    dataset_name="../shared/data/tldr/tldr_pairs.jsonl",
    limit=24,
    seed=0,
    num_generations=16,
    group_size=GROUP,
    max_completion_length=32,
    reward="experiments.rft.grpo:is_close",
    reward_range=(0.0, 1.0),
    save_text=False,
    plots=False,
)
TRAINING = GRPOConfig(
    output_dir="runs/grpo",
    max_steps=STEPS,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    beta=0.0,
    num_generations=GROUP,
    per_device_train_batch_size=2 * GROUP,
    max_completion_length=32,
    temperature=1.0,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    disable_tqdm=True,
    seed=0,
)


@cache
def reward_function() -> RougeL:
    """ROUGE-L against the column chosen."""
    return RougeL()


def is_close(
    prompts: list[Any], completions: list[Any], chosen: list[str], **columns: Any
) -> list[float | None]:
    """1 for every answer whose ROUGE-L against its prompt's chosen summary is at least `LEAST`, else 0."""
    return [
        float(reward_function()(AnswerSet(prompt, (text,), {"chosen": reference}))[0] >= LEAST)
        for prompt, text, reference in zip(prompts, completions, chosen, strict=True)
    ]


def train() -> pd.DataFrame:
    """Train and save the adapter; one row per step: TRL's own share of dead groups, and that of the rewards."""
    prompts = load_prompts(MEASURING.dataset_name, limit=MEASURING.limit, seed=MEASURING.seed)
    seen: list[np.ndarray] = []

    def reward(
        prompts: list[Any], completions: list[Any], chosen: list[str], **columns: Any
    ) -> list[float | None]:
        rewards = is_close(prompts, completions, chosen)
        seen.append(np.array(rewards, dtype=float).reshape(-1, GROUP))
        return rewards

    policy = load_policy_of(MEASURING)
    trainer = GRPOTrainer(
        model=policy.model,
        reward_funcs=reward,
        args=TRAINING,
        processing_class=policy.tokenizer,
        train_dataset=Dataset.from_list([{"prompt": p.text, "chosen": p.columns["chosen"]} for p in prompts]),
    )
    trainer.train()
    policy.model.save_pretrained(str(ADAPTER), save_embedding_layers=False)
    log = [entry for entry in trainer.state.log_history if "frac_reward_zero_std" in entry]
    kept = ["step", "reward", "reward_std", "frac_reward_zero_std", "grad_norm"]
    dead = [float((groups == groups[:, :1]).all(1).mean()) for groups in seen]
    return pd.DataFrame(log)[kept].astype(float).assign(dead_groups=dead)


def draw(log: pd.DataFrame) -> None:
    """Mean reward and share of dead groups, in windows of steps with twice their standard error."""
    axes = new_axes()
    windows = log.groupby((log["step"] - 1) // WINDOW)
    for column, label, colour in (
        ("reward", "mean reward", "#2b6cb0"),
        ("frac_reward_zero_std", "dead groups", "#c8382e"),
    ):
        errors = 2 * windows[column].sem()
        axes.errorbar(
            windows["step"].mean(),
            windows[column].mean(),
            errors,
            fmt="o-",
            ms=4,
            capsize=3,
            color=colour,
            label=label,
        )
    axes.set_ylim(0, 1)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(f"share, in windows of {WINDOW} steps")
    axes.legend(frameon=False)
    save(axes, RESULTS / "training.png")


def main() -> None:
    """Measure, train, measure again, compare, draw."""
    before = replace(MEASURING, output_dir=str(RESULTS / "before"))
    after = replace(MEASURING, adapter_name_or_path=str(ADAPTER), output_dir=str(RESULTS / "after"))
    run_rft(before)
    log = train()
    log.to_csv(RESULTS / "training.csv", index=False, float_format="%.5g")
    run_rft(after)
    run_change(
        RftConfig(before=before.output_dir, after=after.output_dir, output_dir=str(RESULTS / "change"))
    )
    draw(log)


if __name__ == "__main__":
    main()

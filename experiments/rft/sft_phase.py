"""Reward spread before and after supervised fine-tuning on 1, 5, 20 and 100 % of the samples.

From the project's root: python -m experiments.rft.sft_phase

The policy is the embedded one without its adapter. It is fine-tuned (all weights) on the chosen summaries of real
TL;DR pairs, and the std of ROUGE-L within a prompt is measured on the same 48 prompts each time.
Counterpart of section 5 of arXiv 2310.20703. Writes experiments/results/rft/sft_phase; models go to runs/.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from entangle import embedded
from entangle.analysis.statistics import bootstrap_mean, share
from entangle.commands.rft import RftResult, run_change, run_rft
from entangle.commands.train import run_train
from entangle.config import RftConfig, TrainConfig
from entangle.figures.style import new_axes, save

SHARES = (0.01, 0.05, 0.2, 1.0)
DATA = "../shared/data/tldr/tldr_pairs.jsonl"
RESULTS = Path("experiments/results/rft/sft_phase")

TRAINING = TrainConfig(
    model_name_or_path=str(embedded.POLICY.relative_to(Path.cwd())),
    dataset_name=DATA,
    stage="sft",
    use_peft=False,
    learning_rate=2e-4,
    num_train_epochs=2,
    eval_share=0,
    eval_limit=0,
    save_steps=0,
    seed=0,
)
MEASURING = RftConfig(
    model_name_or_path=TRAINING.model_name_or_path,
    use_peft=True,
    lora_r=4,
    dataset_name=DATA,
    limit=48,
    seed=0,
    num_generations=10,
    group_size=5,
    max_completion_length=32,
    shard_size=16,
    save_text=False,
    plots=False,
)
"""A fresh LoRA only keeps the Gram matrices small; rewards don't see it."""


def measure(name: str, model: str) -> RftResult:
    """The prompts' rewards under a model."""
    return run_rft(replace(MEASURING, model_name_or_path=model, output_dir=str(RESULTS / name)))


def row(name: str, samples: int, result: RftResult, change: dict | None) -> dict[str, float | str]:
    """A line of the table; intervals at 95 %, by bootstrap over prompts."""
    table, limit = result.prompts, result.summary["thresholds"]["std"]
    small = share(int((table["reward_std"] < limit).sum()), len(table))
    std, mean = (bootstrap_mean(table[column].to_numpy()) for column in ("reward_std", "reward_mean"))
    numbers = {
        "phase": name,
        "samples": samples,
        "mean_reward": table["reward_mean"].mean(),
        "mean_low": mean[0],
        "mean_high": mean[1],
        "mean_std": table["reward_std"].mean(),
        "std_low": std[0],
        "std_high": std[1],
        "small_std": small["share"],
        "small_low": small["low"],
        "small_high": small["high"],
        "cut_answers": result.summary["cut"]["share"],
    }
    if change is not None:
        rho = change["std_and_change"]
        numbers |= {
            "change": change["change"],
            "rho": rho["rho"],
            "rho_low": rho["low"],
            "rho_high": rho["high"],
        }
    return numbers


def draw(results: dict[str, RftResult], limit: float) -> None:
    """Cumulative distribution of the std within a prompt, one line per phase."""
    axes = new_axes()
    for number, (name, result) in enumerate(results.items()):
        values = np.sort(result.prompts["reward_std"].to_numpy())
        steps = np.arange(1, len(values) + 1) / len(values)
        colour = "#333333" if number == 0 else (0.16, 0.42, 0.69, 0.25 + 0.75 * number / len(SHARES))
        axes.step(
            values, steps, where="post", color=colour, lw=1.6, ls="--" if number == 0 else "-", label=name
        )
    axes.axvline(limit, color="#c8382e", lw=0.8, ls=":", label="small")
    axes.set_xlabel("std of ROUGE-L within a prompt (10 answers)")
    axes.set_ylabel("share of the prompts")
    axes.legend(frameon=False, fontsize=8)
    save(axes, RESULTS / "sft_phase.png")


def main() -> None:
    """Train, measure, compare; table and figure after every phase, so that a broken run leaves what it has."""
    before = measure("before", str(TRAINING.model_name_or_path))
    results, rows = {"before": before}, [row("before", 0, before, None)]
    for part in SHARES:
        name = f"{100 * part:g}_percent"
        trained = run_train(replace(TRAINING, train_share=part, output_dir=f"runs/sft_phase/{name}"))
        results[name] = measure(name, str(trained.model_path))
        change = run_change(
            RftConfig(
                before=str(RESULTS / "before"),
                after=str(RESULTS / name),
                output_dir=str(RESULTS / f"change_{name}"),
            )
        )
        rows.append(row(name, int(np.ceil(450 * part)), results[name], change.summary))
        pd.DataFrame(rows).to_csv(RESULTS / "sft_phase.csv", index=False, float_format="%.5g")
        draw(results, before.summary["thresholds"]["std"])


if __name__ == "__main__":
    main()

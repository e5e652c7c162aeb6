"""Makes the logs that `entangle doctor` is tested on: short real training runs, healthy ones and sick ones.

Each run trains a fresh LoRA on the embedded policy and leaves in `tests/doctor/logs/<run>/`

    trainer_state.json   as the trainer writes it, on one line
    truth.json           what was measured without the log: how far both log-probs of every training pair moved from
                         before to after the run, or the rewards of every group that was sampled

    python experiments/doctor/make_logs.py            # every run that isn't there yet, about 15 minutes on a core
    python experiments/doctor/make_logs.py dpo-hot-0  # one of them
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from entangle.data import collate, load_pairs, tokenize_pair
from entangle.embedded import PAIRS, POLICY
from entangle.scores import row_logps
from entangle.training import PreferenceTrainer

LOGS = Path(__file__).resolve().parents[2] / "tests" / "doctor" / "logs"
SIMILAR = ("near_duplicate", "one_fact_changed", "last_word", "long_shared_suffix")
DISTINCT = ("off_topic", "length_gap", "verbose_vs_terse", "single_word")


@dataclass(frozen=True)
class Run:
    """A training run.

    Args:
        trainer: `preference`, `cpo`, `orpo`, `grpo` or `rloo`.
        options: what differs from the usual arguments of its trainer.
        loss: of the preference trainer.
        kinds: which of the embedded pairs it trains on; none: all.
        reward: of the group trainers, by name in `REWARDS`.
    """

    trainer: str
    options: dict[str, Any] = field(default_factory=dict)
    loss: Any = None
    kinds: Sequence[str] = ()
    reward: str = ""


SETTINGS: dict[str, Run] = {
    "dpo": Run("preference", {"learning_rate": 2e-4}, "dpo"),
    "dpo-hot": Run("preference", {"learning_rate": 1e-2}, "dpo"),
    "dpo-cold": Run("preference", {"learning_rate": 1e-8}, "dpo"),
    "dpo-similar": Run("preference", {"learning_rate": 5e-3}, "dpo", SIMILAR),
    "dpo-distinct": Run("preference", {"learning_rate": 5e-4}, "dpo", DISTINCT),
    "dpo-saturated": Run("preference", {"learning_rate": 5e-3}, "dpo", ("off_topic", "length_gap")),
    "dpo-eval": Run("preference", {"learning_rate": 5e-3, "eval_strategy": "steps", "eval_steps": 5}, "dpo"),
    "rpo": Run("preference", {"learning_rate": 5e-4}, "rpo"),
    "dpop": Run("preference", {"learning_rate": 1e-3}, {"name": "dpop", "penalty": 5.0}),
    "ipo": Run("preference", {"learning_rate": 5e-4}, "ipo_avg"),
    "simpo": Run("cpo", {"learning_rate": 5e-4, "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}),
    "orpo": Run("orpo", {"learning_rate": 5e-4}),
    "grpo": Run("grpo", {"learning_rate": 5e-4}, reward="brevity"),
    "grpo-dead": Run("grpo", {"learning_rate": 5e-4}, reward="rare_word"),
    "grpo-solved": Run("grpo", {"learning_rate": 3e-3}, reward="is_short"),
    "rloo": Run("rloo", {"learning_rate": 5e-4}, reward="brevity"),
    "rloo-ties": Run("rloo", {"learning_rate": 2e-3, "beta": 0.05}, reward="rare_word"),
    "rpo-rise": Run("preference", {"learning_rate": 2e-3}, {"name": "rpo", "alpha": 5.0}, SIMILAR),
    "kto": Run("preference", {"learning_rate": 5e-4}, "kto"),
    "hinge-distinct": Run("preference", {"learning_rate": 1e-3}, "hinge", DISTINCT),
    "dpo-strong": Run("preference", {"learning_rate": 3e-3}, {"name": "dpo", "beta": 0.5}),
    "cpo-sft": Run("cpo", {"learning_rate": 2e-3, "loss_type": "sigmoid", "cpo_alpha": 1.0}),
    "grpo-short": Run("grpo", {"learning_rate": 5e-3}, reward="brevity"),
}
SEEDS = (0, 1)
LATER = ("rpo-rise", "kto", "hinge-distinct", "dpo-strong", "cpo-sft", "grpo-short")
"""Settings that were added once the thresholds had been settled: made with seed 1 alone, the held-out one."""


def brevity(completions: Sequence[str], **_: Any) -> list[float]:
    """Shorter is better: a reward with many values."""
    return [-len(text) / 100 for text in completions]


def rare_word(completions: Sequence[str], **_: Any) -> list[float]:
    """1 for a text that says "because": hardly ever, so most groups tie."""
    return [float("because" in text) for text in completions]


def is_short(completions: Sequence[str], **_: Any) -> list[float]:
    """1 for fewer than 60 characters: soon learned, after which every group ties."""
    return [float(len(text) < 60) for text in completions]


REWARDS: dict[str, Callable[..., list[float]]] = {
    "brevity": brevity,
    "rare_word": rare_word,
    "is_short": is_short,
}


def make(name: str, run: Run, seed: int, folder: Path) -> None:
    """Train one run, and write its log and what was measured beside it."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    pairs = [pair for pair in load_pairs(PAIRS) if not run.kinds or pair.extra["kind"] in run.kinds]
    with tempfile.TemporaryDirectory() as scratch:
        if run.trainer in ("grpo", "rloo"):
            trainer, groups = group_trainer(run, model, tokenizer, pairs, scratch, seed)
            trainer.train()
            truth: dict[str, Any] = {"groups": groups}
        else:
            trainer = preference_trainer(run, model, tokenizer, pairs, scratch, seed)
            before = logps(trainer.model, tokenizer, pairs)
            trainer.train()
            truth = moved(before, logps(trainer.model, tokenizer, pairs))
        target = folder / f"{name}-{seed}"
        target.mkdir(parents=True, exist_ok=True)
        trainer.state.save_to_json(f"{scratch}/state.json")
        state = json.loads(Path(f"{scratch}/state.json").read_text())
    (target / "trainer_state.json").write_text(json.dumps(state))
    settings = {"trainer": run.trainer, "loss": run.loss, "kinds": list(run.kinds), "reward": run.reward}
    truth = settings | {"options": run.options, "seed": seed} | truth
    (target / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")


def usual(scratch: str, seed: int, **options: Any) -> dict[str, Any]:
    """Arguments that every trainer gets."""
    return {
        "output_dir": scratch,
        "max_steps": 40,
        "per_device_train_batch_size": 6,
        "logging_steps": 2,
        "seed": seed,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "warmup_steps": 3,
    } | options


def lora() -> LoraConfig:
    """A fresh adapter on every linear layer."""
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def preference_trainer(run: Run, model: Any, tokenizer: Any, pairs: Any, scratch: str, seed: int) -> Any:
    """A trainer of preference pairs."""
    rows = Dataset.from_list([{k: getattr(p, k) for k in ("prompt", "chosen", "rejected")} for p in pairs])
    given = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": lora()}
    options = usual(scratch, seed, **run.options)
    if run.trainer == "cpo":
        return CPOTrainer(model, CPOConfig(**options), **given)
    if run.trainer == "orpo":
        return ORPOTrainer(model, ORPOConfig(**options), **given)
    if "eval_steps" in run.options:
        split = rows.train_test_split(test_size=24, seed=seed)
        given |= {"train_dataset": split["train"], "eval_dataset": split["test"]}
    return PreferenceTrainer(model, args=DPOConfig(**options), loss=run.loss, **given)


def group_trainer(run: Run, model: Any, tokenizer: Any, pairs: Any, scratch: str, seed: int) -> Any:
    """A trainer of sampled answers, and the list that the rewards of its groups go to."""
    groups: list[list[float]] = []
    options = usual(
        scratch,
        seed,
        max_steps=30,
        num_generations=8,
        per_device_train_batch_size=32,
        max_completion_length=40,
        **run.options,
    )

    def reward(completions: Sequence[str], **columns: Any) -> list[float]:
        values = REWARDS[run.reward](completions, **columns)
        groups.extend(values[i : i + 8] for i in range(0, len(values), 8))
        return values

    rows = Dataset.from_list([{"prompt": pair.prompt} for pair in pairs])
    given = {
        "reward_funcs": reward,
        "train_dataset": rows,
        "processing_class": tokenizer,
        "peft_config": lora(),
    }
    if run.trainer == "rloo":
        return RLOOTrainer(model, args=RLOOConfig(**options), **given), groups
    return GRPOTrainer(model, args=GRPOConfig(**options), **given), groups


def logps(model: Any, tokenizer: Any, pairs: Any) -> torch.Tensor:
    """Log-probs `(2, pairs)` of chosen and rejected, nats."""
    rows = [tokenize_pair(tokenizer, pair) for pair in pairs]
    batches = [collate(rows[i : i + 8], tokenizer.pad_token_id) for i in range(0, len(rows), 8)]
    return torch.cat([torch.stack(row_logps(model, batch).chunk(2)) for batch in batches], dim=1)


def moved(before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
    """Changes of the log-probs over the run, in nats."""
    change = after - before
    fell = (change < 0).all(0).double().mean()
    return {
        "change_chosen": float(change[0].mean()),
        "change_rejected": float(change[1].mean()),
        "before_chosen": float(before[0].mean()),
        "before_rejected": float(before[1].mean()),
        "share_both_fell": float(fell),
    }


def main() -> None:
    """Make the runs named on the command line, or all that are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", help="for instance dpo-hot-0; default: all that are missing")
    parser.add_argument("--output_dir", type=Path, default=LOGS)
    arguments = parser.parse_args()
    for name, run in SETTINGS.items():
        for seed in SEEDS:
            label = f"{name}-{seed}"
            missing = not (arguments.output_dir / label / "truth.json").is_file()
            missing &= seed == 1 or name not in LATER
            if label in arguments.runs or (not arguments.runs and missing):
                print(label, flush=True)
                make(name, run, seed, arguments.output_dir)


if __name__ == "__main__":
    main()

"""What trainers call their metrics, in TRL's present words, and which set of data a metric is of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

STEPS = (
    "train/global_step",
    "global_step",
    "global_step/max_steps",
    "training/global_step",
    "current_steps",
    "step",
    "_step",
    "iteration",
)
"""What a log calls the training step, the surest name first (wandb's `_step` counts its own log calls)."""

EPOCHS = ("epoch", "train/epoch")
"""What a log calls the epoch."""

_NOT_METRICS = {
    "total_flos",
    "_runtime",
    "_timestamp",
    "wall time",
    "relative time (process)",
    "relative time (wall)",
    "no log",
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "percentage",
    "elapsed_time",
    "remaining_time",
    "memory(gib)",
    "train_speed(iter/s)",
    "train_speed(s/it)",
    "total_steps",
    "validation runtime",
}

_ALIASES = {
    "chosen_reward": "rewards/chosen",
    "reject_reward": "rewards/rejected",
    "rejected_reward": "rewards/rejected",
    "acc": "rewards/accuracies",
    "accuracy": "rewards/accuracies",
    "reward_margin": "rewards/margins",
    "lr": "learning_rate",
    "learning rate": "learning_rate",
    "training loss": "loss",
    "train loss": "loss",
    "grad norm": "grad_norm",
    "gradient norm": "grad_norm",
    "completion_length": "completions/mean_length",
    "mean_completion_length": "completions/mean_length",
    "completions/mean": "completions/mean_length",
    "clipped_completions_ratio": "completions/clipped_ratio",
    "frac_zero_reward_std": "frac_reward_zero_std",
    "entropy/mean": "entropy",
    "clip_ratio": "clip_ratio/region_mean",
    "critic/score/mean": "reward",
    "actor/grad_norm": "grad_norm",
    "actor/kl_loss": "kl",
    "actor/entropy": "entropy",
    "actor/entropy_loss": "entropy",
    "actor/pg_clipfrac": "clip_ratio/region_mean",
    "actor/pg_loss": "loss",
    "response_length/mean": "completions/mean_length",
    "response_length/clip_ratio": "completions/clipped_ratio",
    "grpo/frac_reward_zero_std": "frac_reward_zero_std",
    "actor/lr": "learning_rate",
}
"""Older names of TRL, and those of OpenRLHF, verl, ms-swift and notebooks, for the same quantity."""

OLD_NAMES = ("completion_length", "mean_completion_length", "clipped_completions_ratio")
"""Names that only TRL of early 2025 wrote."""

_KNOWN = (
    r"(?:rewards|logps|logits|completions|clip_ratio|sampling|tools|entangle)/.+|nll_loss|sft_loss|odds_ratio_loss|"
    r"policy_loss|aux_loss|loss|rewards?_std|frac_reward_zero_std|reward|kl|entropy|completion_length|num_tokens|"
    r"log_odds_ratio|log_odds_chosen|mean_token_accuracy|grad_norm|learning_rate|runtime|samples_per_second|"
    r"steps_per_second|model_preparation_time"
)
_FIRST = ("loss", "rewards", "logps", "logits", "completions", "reward", "kl", "entropy")
"""First words of metrics, which notebooks capitalise."""

_SET_AND_METRIC = re.compile(rf"(?:(?P<set>.+?)[_/])??(?P<metric>{_KNOWN})", re.DOTALL)

JUDGED = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "reward", "reward_std")
"""Metrics by which a set of data can be judged."""


def step_name(keys: set[str]) -> str | None:
    """Which of a log's columns is its step: the surest name that it has, however it is written."""
    by_low = {_tidy(key).lower(): key for key in sorted(keys)}
    return next((by_low[name] for name in STEPS if name in by_low), None)


def is_metric(key: str) -> bool:
    """Whether a column is neither step, time nor epoch."""
    low = _tidy(key).lower()
    return bool(low) and low not in _NOT_METRICS and low not in STEPS and low not in EPOCHS


def metric(key: str) -> tuple[str, str | None]:
    """A metric in TRL's present words, and the evaluation set that it is of: None for training, "" for a nameless one.

    `eval_rewards/chosen` -> ("rewards/chosen", ""); `eval_helpful_rewards/chosen` -> ("rewards/chosen", "helpful").
    """
    name = _tidy(key)
    for prefix in ("eval/", "eval_", "validation "):
        if name.lower().startswith(prefix):
            found = _SET_AND_METRIC.fullmatch(name[len(prefix) :])
            if found is None:
                return _plain(name[len(prefix) :]), ""
            return _plain(found["metric"]), found["set"] or ""
    return _plain(name.removeprefix("train/")), None


def old_names(keys: set[str]) -> bool:
    """Whether a log has names that only TRL of early 2025 wrote."""
    plain = {_tidy(key).removeprefix("train/") for key in keys}
    functions = {key for key in plain if key.startswith("rewards/") and key.count("/") == 1}
    sides = {f"rewards/{side}" for side in ("chosen", "rejected", "margins", "accuracies")}
    return bool(plain & set(OLD_NAMES)) or ("reward" in plain and bool(functions - sides))


def unfolded(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose metrics lie one level down (`{"train": {"loss": ...}}`), flat."""
    if not any(isinstance(value, Mapping) for value in row.values()):
        return row
    flat: dict[str, Any] = {}
    for key, value in row.items():
        below = (
            {f"{key}/{name}": inner for name, inner in value.items()}
            if isinstance(value, Mapping)
            else {key: value}
        )
        flat |= below
    return flat


def _plain(name: str) -> str:
    known = _ALIASES.get(name.lower())
    if known is not None:
        return known
    first, slash, rest = name.partition("/")
    return f"{first.lower()}{slash}{rest}" if first.lower() in _FIRST else name


def _tidy(key: str) -> str:
    """A name without the blanks that notebooks put around slashes."""
    return re.sub(r"\s*/\s*", "/", key.strip())

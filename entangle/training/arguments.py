"""Options of `entangle train` as TRL's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.integration_utils import get_available_reporting_integrations
from trl import DPOConfig, SFTConfig  # pyright: ignore[reportPrivateImportUsage]

from entangle.config import TrainConfig
from entangle.training.trainer import TrainingError

SAME_NAME = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "logging_steps",
    "save_total_limit",
    "bf16",
    "gradient_checkpointing",
    "max_length",
    "trust_remote_code",
)
"""Options that are TRL's under TRL's name."""

SEED = 42
"""Seed where none is given: TRL's."""


def trainer_arguments(config: TrainConfig, folder: Path) -> DPOConfig | SFTConfig:
    """DPOConfig, or SFTConfig in the stage sft.

    Args:
        config: the options.
        folder: where the trainer writes.

    Raises:
        TrainingError: `trainer_options` names an option that there isn't, or one that is ours, or `report_to` a tracker
            that isn't installed.
    """
    cls = SFTConfig if config.stage == "sft" else DPOConfig
    ours: dict[str, Any] = {name: getattr(config, name) for name in SAME_NAME} | {
        "output_dir": str(folder),
        "seed": SEED if config.seed is None else config.seed,
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "report_to": list(config.report_to),
        "use_cpu": not torch.cuda.is_available() or config.device == "cpu",
        "disable_tqdm": True,  # the run has a bar of its own
    }
    if cls is DPOConfig:
        ours["precompute_ref_log_probs"] = config.precompute_ref_log_probs
    _check_trackers(config.report_to)
    further = config.options_of_trainer
    known = {field.name for field in fields(cls)}
    for name in further:
        if name not in known or name in ours:
            what = "is an option of its own" if name in ours else f"isn't one of {cls.__name__}'s options"
            raise TrainingError(
                f"trainer_options: {name!r} {what}. Drop it, or give it as an option of ours."
            )
    try:
        return cls(**ours | further)
    except (ValueError, TypeError, ImportError) as error:
        raise TrainingError(f"TRL refuses these options: {error}") from error


def _check_trackers(names: Sequence[str]) -> None:
    installed = get_available_reporting_integrations()
    unknown = sorted(set(names) - {*installed, "none", "all"})
    if unknown:
        raise TrainingError(
            f"report_to: no tracker {', '.join(map(repr, unknown))} is installed here. Installed are "
            f"{', '.join(sorted(installed)) or 'none'}; transformers documents which ones it knows."
        )

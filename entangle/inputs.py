"""From options to what they describe: the preference pairs and the policy."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from accelerate import PartialState

from entangle import embedded
from entangle.config import EMBEDDED, DataOptions, InputOptions, ModelOptions
from entangle.data import PreferencePair, load_pairs
from entangle.models import Policy, load_policy


def load_pairs_of(config: DataOptions) -> list[PreferencePair]:
    """The pairs that the options describe; `embedded` stands for the package's own pair set."""
    name = str(embedded.PAIRS) if config.dataset_name == EMBEDDED else config.dataset_name
    return load_pairs(
        name, split=config.dataset_train_split, config=config.dataset_config, columns=config.column_map,
        limit=config.limit, seed=config.seed,
    )  # fmt: skip


def load_policy_of(config: InputOptions, processes: PartialState | None = None) -> Policy:
    """The policy that the options describe; each of several processes takes an accelerator of its own."""
    options = model_options(config)
    if processes is not None and processes.num_processes > 1 and torch.cuda.is_available():
        options["device"] = options["device"] or f"cuda:{processes.local_process_index}"
    return load_policy(**options, seed=config.seed)


def model_options(config: ModelOptions) -> dict[str, Any]:
    """Arguments of `load_policy`; `embedded` stands for the package's own model, with its adapter if none is given."""
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelOptions)}
    if config.model_name_or_path == EMBEDDED:
        options["model_name_or_path"] = str(embedded.POLICY)
        if config.adapter_name_or_path is None and not config.use_peft and config.parameters != "full":
            options["adapter_name_or_path"] = str(embedded.ADAPTER)
    return options

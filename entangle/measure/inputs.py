"""From options to what they describe: the preference pairs and the policy."""

from __future__ import annotations

import torch
from accelerate import PartialState

from entangle.config import DataOptions, InputOptions
from entangle.data import PairSet, PreferencePair, pairs_of
from entangle.models import Policy, load_policy


def load_pairs_of(config: DataOptions) -> list[PreferencePair]:
    """The pairs alone; see `read_pairs_of`."""
    return read_pairs_of(config).pairs


def read_pairs_of(config: DataOptions) -> PairSet:
    """The pairs that the options describe, with notes (see `entangle.data.pairs_of`)."""
    return pairs_of(
        config.dataset_name,
        split=config.dataset_train_split,
        config=config.dataset_config,
        columns=config.column_map,
        limit=config.limit,
        seed=config.seed,
        skip_invalid=config.skip_invalid,
        format=config.format,
    )


def load_policy_of(config: InputOptions, processes: PartialState | None = None) -> Policy:
    """The policy that the options describe; each of several processes takes an accelerator of its own."""
    return load_policy(config, seed=config.seed, device=own_device(processes))


def own_device(processes: PartialState | None) -> str | None:
    """The accelerator of this process, where there are several of both; None where there is nothing to choose."""
    if processes is None or processes.num_processes == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{processes.local_process_index}"

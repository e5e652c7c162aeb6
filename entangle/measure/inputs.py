"""From options to what they describe: the preference pairs and the policy."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState

from entangle.config import DataOptions, InputOptions
from entangle.data import PairSet, PreferencePair, read_pairs
from entangle.models import Policy, load_policy


def load_pairs_of(config: DataOptions) -> list[PreferencePair]:
    """The pairs alone; see `read_pairs_of`."""
    return read_pairs_of(config).pairs


def read_pairs_of(config: DataOptions) -> PairSet:
    """The pairs that the options describe, with notes; `embedded` stands for the package's own pair set.

    A further column that holds values of several kinds is text in all of them, so that it fits one column of a table.
    """
    found = read_pairs(
        config.dataset_place, split=config.dataset_train_split, config=config.dataset_config, columns=config.column_map,
        limit=config.limit, seed=config.seed, skip_invalid=config.skip_invalid, format=config.format,
    )  # fmt: skip
    return dataclasses.replace(found, pairs=with_uniform_extras(found.pairs))


def with_uniform_extras(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The same pairs; an extra column with values of more than one kind (number, text, truth) is text throughout."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        for name, value in pair.extra.items():
            kinds[name].add(_kind(value))
    mixed = {name for name, found in kinds.items() if len(found) > 1}
    if not mixed:
        return list(pairs)
    return [
        dataclasses.replace(pair, extra={k: str(v) if k in mixed else v for k, v in pair.extra.items()})
        for pair in pairs
    ]


def _kind(value: Any) -> str:
    return (
        "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
    )


def load_policy_of(config: InputOptions, processes: PartialState | None = None) -> Policy:
    """The policy that the options describe; each of several processes takes an accelerator of its own."""
    return load_policy(config, seed=config.seed, device=own_device(processes))


def own_device(processes: PartialState | None) -> str | None:
    """The accelerator of this process, where there are several of both; None where there is nothing to choose."""
    if processes is None or processes.num_processes == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{processes.local_process_index}"

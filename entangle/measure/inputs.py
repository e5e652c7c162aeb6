"""From options to what they describe: the preference pairs and the policy."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState

from entangle import embedded
from entangle.config import EMBEDDED, DataOptions, InputOptions, ModelOptions
from entangle.data import PreferencePair, load_pairs
from entangle.models import Policy, load_policy


def load_pairs_of(config: DataOptions) -> list[PreferencePair]:
    """The pairs that the options describe; `embedded` stands for the package's own pair set.

    A further column that holds values of several kinds is text in all of them, so that it fits one column of a table.
    """
    name = str(embedded.PAIRS) if config.dataset_name == EMBEDDED else config.dataset_name
    pairs = load_pairs(
        name, split=config.dataset_train_split, config=config.dataset_config, columns=config.column_map,
        limit=config.limit, seed=config.seed, skip_invalid=config.skip_invalid,
    )  # fmt: skip
    return with_uniform_extras(pairs)


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

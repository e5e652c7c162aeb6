"""What `entangle why` is to measure: pairs, checkpoints and the loss, and what had to be assumed for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from entangle.commands.why.size import MOST, Size
from entangle.commands.why.training import Training
from entangle.config import SweepConfig, WhyConfig
from entangle.config.specs import spec_text, to_spec
from entangle.data import PreferencePair
from entangle.errors import ConfigError, RunError
from entangle.measure.inputs import read_pairs_of


@dataclass(frozen=True)
class Asked:
    """What is measured, where, and with which loss.

    Args:
        config: the options.
        training: the training folder.
        base: the model that training began from; empty: what an adapter names.
        losses: the training's first.
        pairs: the data, up to a number that is more than enough.
        started: when, by the monotonic clock.
    """

    config: WhyConfig
    training: Training
    base: str
    losses: tuple[Any, ...]
    pairs: Sequence[PreferencePair]
    started: float

    def sweep(self, pairs: int | None) -> SweepConfig:
        """The sweep whose probes are made."""
        return self.config.sweep_of(self.training.folder, self.base, self.losses, pairs)

    def sample(self, size: Size) -> str:
        """Which part of the data the pairs are, in words."""
        total = len(self.pairs)
        if self.config.limit is not None or size.pairs >= total:
            return ""
        return f", a random sample of {'at least ' if total >= 2 * MOST else ''}{total}"

    @property
    def left(self) -> float:
        """Seconds of the minutes given."""
        return 60 * self.config.minutes - (time.monotonic() - self.started)


def ask(config: WhyConfig, training: Training, missing: list[str], started: float) -> Asked:
    """What is to be measured, with a sentence on everything that had to be assumed.

    Raises:
        UserError: there are no checkpoints, no pairs, or the model that they stand on isn't here.
    """
    if not training.checkpoints:
        raise RunError(
            f"no checkpoint is in {training.folder} (checkpoint-* with config.json or adapter_config.json, or a final "
            "model). Train with save_steps to have some."
        )
    name = config.dataset_name or training.data
    if not name:
        raise ConfigError("the run's pairs aren't named. Name them: --dataset_name PAIRS.")
    if not config.dataset_name:
        config = replace(config, dataset_name=name)
        missing.append(f"The pairs are those that the run's files name: {name}.")
    pairs = read_pairs_of(replace(config, limit=config.limit or 2 * MOST)).pairs
    base = config.model_name_or_path or training.base
    if not base and not training.is_adapter and config.ref_model_name_or_path is None:
        missing.append(
            "The model that training began from isn't named in the folder or isn't here, so changes are counted from "
            "the first checkpoint: --model_name_or_path MODEL mends that."
        )
    return Asked(config, training, base, _losses(config, training, missing), pairs, started)


def _losses(config: WhyConfig, training: Training, missing: list[str]) -> tuple[Any, ...]:
    """The training's loss: named, else what the folder says, else dpo; which it is, is said."""
    if config.losses:
        return config.losses
    spec, source = training.loss
    if spec is not None:
        missing.append(f"Loss: {spec_text(to_spec(spec))}, by {source}.")
        return (to_spec(spec),)
    said = f" ({source})" if source else ""
    missing.append(
        f"Loss: dpo with beta 0.1 is assumed; the folder doesn't say{said}: --loss dpo:beta=... does."
    )
    return ("dpo",)

"""Options of `entangle forecast`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from entangle.config.base import ExtensionOptions, check_at_least
from entangle.config.kinds import Losses
from entangle.errors import ConfigError


@dataclass(frozen=True)
class ForecastConfig(ExtensionOptions):
    """Training curves of a finished probe's pairs under any loss, with all gradients held as they are at its start."""

    VERB: ClassVar[str] = "forecast"
    UNRECORDED: ClassVar[tuple[str, ...]] = (
        *ExtensionOptions.UNRECORDED,
        "losses",
        "learning_rate",
        "per_device_train_batch_size",
        "max_steps",
        "momentum",
        "eval_share",
        "seeds",
    )

    losses: Losses = ()
    """Losses to forecast, each name or name:key=value,...; by default the probe's first."""
    learning_rate: float | None = None
    """Step size of all steps, in the probe's metric (SGD's, or AdamW's). By default each loss's own: the one at which
    the mean margin of the trained pairs would grow by one nat over the steps at its first speed, so that losses are
    compared at equal margin."""
    per_device_train_batch_size: int = 8
    """Pairs per step."""
    max_steps: int = 20
    """Optimiser steps."""
    momentum: float | None = None
    """SGD's momentum, or AdamW's beta1; by default 0 with --metric sgd of the probe, and 0.9 with adamw."""
    eval_share: float = 0.25
    """Share of the pairs that isn't trained on; no prompt is on both sides."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Orders of the batches, one run each; the held-out pairs are the same."""
    limit: int | None = 96
    """This many scored pairs, evenly spread over the run; time and memory of the Gram matrix grow with the square."""
    batch_size: int | None = None
    """Pairs of a pass of the measurement; by default as many as make 4096 tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"limit": 4, "batch_size": 1, "per_device_train_batch_size": 1, "max_steps": 1})
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be above 0; got {self.learning_rate}.")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be at least 0 and below 1; got {self.momentum}.")
        if not 0 <= self.eval_share < 1:
            raise ConfigError(f"eval_share must be at least 0 and below 1; got {self.eval_share}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must be given once each; got {list(self.seeds)}.")

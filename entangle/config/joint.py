"""Options of `entangle joint`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from entangle.config.base import InputOptions, RunOptions
from entangle.config.kinds import Losses
from entangle.config.rft import AnswerOptions
from entangle.errors import ConfigError


@dataclass(frozen=True)
class JointConfig(AnswerOptions, RunOptions, InputOptions):
    """What preference pairs and sampled answers would teach on the same prompts: DPO's signal beside RFT's."""

    VERB: ClassVar[str] = "joint"
    UNRECORDED: ClassVar[tuple[str, ...]] = (*RunOptions.UNRECORDED, "plots")

    losses: Losses = ("dpo",)
    """The one preference loss that is compared, name or name:key=value,... (`entangle losses` lists them)."""
    signal_threshold: float = 0.1
    """A pair is saturated if the loss has less than this share of its incentive at the start of training left."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.losses) != 1:
            raise ConfigError(
                f"joint compares one loss with RFT; got {len(self.losses)}: {', '.join(map(str, self.losses))}."
            )
        if not 0 < self.signal_threshold <= 1:
            raise ConfigError(f"Expected 0 < signal_threshold <= 1; got {self.signal_threshold}.")

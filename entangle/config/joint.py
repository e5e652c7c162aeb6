"""Options of `entangle joint`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from entangle.config.base import InputOptions, Losses, RunOptions, check_at_least, parse_loss
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
    """A pair is saturated if the loss pushes with less than this share of its incentive at the start of training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"limit": 1, "max_length": 2})
        parsed = tuple(parse_loss(loss) if isinstance(loss, str) else loss for loss in self.losses)
        object.__setattr__(self, "losses", parsed)
        if len(parsed) != 1:
            raise ConfigError(
                f"joint compares one loss with RFT; got {len(parsed)}: {', '.join(map(str, parsed))}."
            )
        if not 0 < self.signal_threshold <= 1:
            raise ConfigError(f"Expected 0 < signal_threshold <= 1; got {self.signal_threshold}.")

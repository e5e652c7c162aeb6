"""Options of `entangle probe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from entangle.config.base import (
    DEFAULT_LOSSES,
    InputOptions,
    Losses,
    RunOptions,
    check_at_least,
    parse_loss,
)
from entangle.errors import ConfigError


@dataclass(frozen=True)
class ProbeConfig(RunOptions, InputOptions):
    """Geometry of every preference pair, and what each loss would do to it."""

    VERB: ClassVar[str] = "probe"
    UNRECORDED: ClassVar[tuple[str, ...]] = (*RunOptions.UNRECORDED, "dry_run")

    losses: Losses = DEFAULT_LOSSES
    """Losses to judge, each name or name:key=value,... (`entangle losses` lists them)."""
    loss_batch_size: int = 8
    """Pairs per batch for losses whose incentives depend on the batch (kto, aot, ...), in dataset order."""
    group_by: str = "kind"
    """Column of the data set by which the tables are broken down, where it is there."""
    engine: Literal["auto", "factored", "autograd"] = "auto"
    """How scores are computed: `factored` is fast and exact, `autograd` is its slow oracle."""
    batch_size: int | None = None
    """Pairs per pass; by default as many as fit 4096 tokens."""
    shard_size: int = 64
    """Pairs per shard: what a killed run loses at most."""
    verify: int = 0
    """Check the predictions by real SGD steps on this many pairs."""
    save_text: bool = True
    """Keep the texts of the pairs in the run folder."""
    dry_run: bool = False
    """Say what would be computed, and stop."""

    def __post_init__(self) -> None:
        check_at_least(self, {
            "limit": 1, "max_length": 2, "loss_batch_size": 1, "batch_size": 1, "shard_size": 1, "verify": 0,
        })  # fmt: skip
        parsed = (parse_loss(loss) if isinstance(loss, str) else loss for loss in self.losses)
        object.__setattr__(self, "losses", tuple(parsed))
        if not self.losses:
            raise ConfigError("At least one loss is needed; got none. `entangle losses` lists them.")

"""Options of `entangle whatif`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from entangle.config.base import Options, check_at_least
from entangle.config.kinds import Grid, Loss, Losses, RunName
from entangle.errors import ConfigError


@dataclass(frozen=True)
class WhatIfConfig(Options):
    """Other losses and hyper-parameters on a finished probe's pairs: no model, seconds."""

    run: tyro.conf.Positional[RunName] = ""
    """Run folder of a finished probe."""
    losses: Losses = ()
    """Losses to judge, each name or name:key=value,...; by default every one that the probe's rows can judge."""
    grid: Grid = ()
    """Hyper-parameters to vary: loss.field=1,2,3, or field=1,2,3 for every judged loss that has the field."""
    base: Loss | None = None
    """Loss that the knobs start from; by default dpo, or without a reference cpo:nll_weight=0."""
    target: float = 0.9
    """Share of the pairs that the smallest change must make ideal."""
    knobs: tuple[str, ...] = ("nll", "dpop", "shift", "length")
    """What may be changed: nll, nll_sum, nll_batch (NLL weight per token, sequence, batch token), dpop, shift,
    length."""
    loss_batch_size: int | None = None
    """Pairs per batch for losses whose incentives depend on the batch; by default the probe's."""
    rows: int = 12
    """Rows of the table of verdicts."""
    plots: bool = True
    """Draw the figures (needs matplotlib)."""
    output_dir: str | None = None
    """Where the result goes; by default RUN/whatif. An earlier result there is replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"loss_batch_size": 1, "rows": 1})
        if not 0 < self.target <= 1:
            raise ConfigError(f"target is a share of the pairs, above 0 and at most 1; got {self.target}.")

    @property
    def output_path(self) -> Path:
        """The folder of the result."""
        return Path(self.output_dir) if self.output_dir else Path(self.run) / "whatif"

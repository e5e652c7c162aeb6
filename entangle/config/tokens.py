"""Options of `entangle tokens`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from entangle.config.base import Options, check_at_least
from entangle.config.kinds import Losses, RunName


@dataclass(frozen=True)
class TokensConfig(Options):
    """Which tokens entangle a pair: a finished probe's pairs taken apart into their tokens."""

    run: tyro.conf.Positional[RunName] = ""
    """Run folder of a finished probe."""
    pairs: tuple[int, ...] = ()
    """Pairs by their index in the run; by default the worst ones."""
    worst: int = 3
    """Without --pairs: this many pairs whose chosen log-prob falls most, for each of the losses."""
    losses: Losses = ()
    """Losses of the run whose worst pairs are taken; tables show the changes under the first. By default the run's
    first loss."""
    matrix: bool = False
    """Also draw the cosines of all pairs of tokens as heat maps (needs matplotlib): a backward pass per token."""
    dtype: Literal["float32", "float64"] | None = None
    """Precision of the computation; by default the probe's."""
    rows: int = 8
    """Rows of the table, per response."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"worst": 1, "rows": 1})

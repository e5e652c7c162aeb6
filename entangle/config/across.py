"""Options of `entangle across`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from entangle.config.base import RecordedOptions, Replaced, check_at_least
from entangle.config.kinds import Losses, RunName


@dataclass(frozen=True)
class AcrossConfig(RecordedOptions):
    """What the other pairs of a data set do to each pair: entanglement across the pairs of a finished probe."""

    VERB: ClassVar[str] = "across"
    UNRECORDED: ClassVar[tuple[str, ...]] = ("run", "plots")

    run: tyro.conf.Positional[RunName] = ""
    """Run folder of a finished probe."""
    losses: Losses = ()
    """Losses of the run; by default all of them."""
    limit: int | None = None
    """This many scored pairs, evenly spread over the run; by default all."""
    epoch_pairs: int | None = None
    """Pairs of an epoch of your training, if the run holds only some of them; by default as many as are measured."""
    batch_size: int | None = None
    """Pairs of a pass; by default as many as make 4096 tokens."""
    plots: bool = True
    """Draw the figure (needs matplotlib)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"limit": 2, "epoch_pairs": 2, "batch_size": 1})

    @property
    def run_path(self) -> Path:
        """Where the measurement keeps what it has while it isn't finished: RUN/across."""
        return Path(self.run) / "across"

    @property
    def place(self) -> tuple[str, ...]:
        """The probe's run folder."""
        return (self.run,)

    @property
    def replaces(self) -> Replaced:
        """A measurement with other options or losses, which is begun anew."""
        return "another"

"""Options of `entangle across`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from entangle.config.base import ExtensionOptions, check_at_least
from entangle.config.kinds import Losses


@dataclass(frozen=True)
class AcrossConfig(ExtensionOptions):
    """What the other pairs of a data set do to each pair: entanglement across the pairs of a finished probe."""

    VERB: ClassVar[str] = "across"

    losses: Losses = ()
    """Losses of the run; by default all of them."""
    limit: int | None = None
    """This many scored pairs, evenly spread over the run; by default all."""
    epoch_pairs: int | None = None
    """Pairs of an epoch of your training, if the run holds only some of them; by default as many as are measured."""
    batch_size: int | None = None
    """Pairs of a pass; by default as many as make 4096 tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"limit": 2, "epoch_pairs": 2, "batch_size": 1})

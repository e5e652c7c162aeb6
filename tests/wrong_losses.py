"""Losses whose incentives aren't the gradient of what is trained: what --verify is there to find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from losses import DPO, Incentives, PairLogps


@dataclass(frozen=True)
class HalfPush(DPO):
    """DPO that says it pushes the rejected response half as much as it does."""

    name: ClassVar[str] = "half_push"

    def incentives(self, logps: PairLogps) -> Incentives:
        true = super().incentives(logps)
        return Incentives(true.chosen, true.rejected / 2)


@dataclass(frozen=True)
class DoubledBoth(DPO):
    """DPO that says it does everything twice as strongly: every sign is right, every size wrong."""

    name: ClassVar[str] = "doubled"

    def incentives(self, logps: PairLogps) -> Incentives:
        true = super().incentives(logps)
        return Incentives(2 * true.chosen, 2 * true.rejected)


@dataclass(frozen=True)
class Slightly(DPO):
    """DPO that is off by a hundredth, which no slope shows: the error's ratio does."""

    name: ClassVar[str] = "slightly"

    def incentives(self, logps: PairLogps) -> Incentives:
        true = super().incentives(logps)
        return Incentives(1.01 * true.chosen, 1.01 * true.rejected)

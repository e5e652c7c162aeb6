"""The set of a probe's pairs, as a result to be read: its drift under every loss, its cosine and its band."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from entangle.analysis.jackknife import Estimate
from entangle.analysis.regimes import Regime
from entangle.analysis.set_verdict import set_verdict
from entangle.analysis.sets import SetGeometry, SetMove
from entangle.measure.set_content import estimate_of, geometry_of_content, move_of
from entangle.tables.base import Shown
from entangle.tables.sets import set_tables


@dataclass(frozen=True)
class MeasuredSet(Shown):
    """All pairs of a probe as one pair, through their mean scores (see `entangle.analysis.sets`).

    On real data this, and not the single pairs, decides which way the mean log-probs go. Every number is an `Estimate`:
    its `value`, the ends `low` and `high` of its 95 % interval, and whether that rules anything out (`has_meaning`).

        probe.set.drift["dpo"].value     above 1/2 both log-probs rise, below -1/2 both fall, in between they part
        probe.set.moves["dpo"].chosen    nats per unit of learning rate

    Args:
        content: what set.json holds.
    """

    content: Mapping[str, Any]

    @property
    def pairs(self) -> int:
        """Pairs that were summed."""
        return self.content["pairs"]

    @property
    def prompts(self) -> int:
        """Different prompts that they have."""
        return self.content["prompts"]

    @property
    def moves(self) -> dict[str, SetMove]:
        """By loss: what a step on the set does to both mean log-probs, per unit of learning rate."""
        return {loss: move_of(move) for loss, move in self.content["losses"].items()}

    @property
    def drift(self) -> dict[str, Estimate]:
        """By loss: (D_w + D_l) / (2 (D_w - D_l)), nats of both log-probs per nat of margin; NaN if none is gained."""
        return {loss: move.drift for loss, move in self.moves.items()}

    @property
    def regimes(self) -> dict[str, Regime]:
        """By loss: which way the two mean log-probs go, by the estimates' values; `moves` says how certain that is."""
        return {loss: move.regime for loss, move in self.moves.items()}

    @property
    def cosine(self) -> Estimate:
        """Of the two mean scores."""
        return estimate_of(self.content["cosine"])

    @property
    def norm_ratio(self) -> Estimate:
        """|mean rejected score| / |mean chosen score|."""
        return estimate_of(self.content["norm_ratio"])

    @property
    def band(self) -> tuple[Estimate, Estimate]:
        """Incentive ratios d_w / d_l between which the mean chosen log-prob rises and the mean rejected one falls."""
        low, high = self.content["band"]
        return estimate_of(low), estimate_of(high)

    @property
    def geometry(self) -> SetGeometry:
        """The mean products of scores themselves, to judge any incentives by: `geometry.move(d_w, d_l)`."""
        return geometry_of_content(self.content)

    def renderable(self) -> RenderableType:
        """The tables as rich objects: the geometry, the drift under every loss, and what that means."""
        first = next(iter(self.content["losses"]))
        return Group(set_tables(self.content), Text(set_verdict(self.content, first), "bold"))

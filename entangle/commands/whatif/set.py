"""The set under losses and settings: its drift, and the smallest change that keeps it from drifting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import bisect

from entangle.analysis.hyperparameters import Knob
from entangle.analysis.regimes import Regime
from entangle.analysis.sets import SetGeometry, SetMove
from entangle.commands.whatif.scored import ScoredPairs
from entangle.measure.set_content import move_content
from losses import PreferenceLoss

STEPS = 48
"""Settings at which a knob is tried before the edge is found between two of them."""

FARTHEST = 1e3
"""The largest setting of a knob that has no end."""


@dataclass(frozen=True)
class ScoredSet:
    """The set of a run's pairs, judged by mean incentives on mean scores (see `SetGeometry.move`).

    Args:
        geometry: the set's.
        pairs: its pairs, which give a loss's incentives.
    """

    geometry: SetGeometry
    pairs: ScoredPairs

    def move(self, loss: PreferenceLoss) -> SetMove:
        """What a step of a loss does to the two mean log-probs."""
        incentives = self.pairs.incentives(loss)
        return self.geometry.move(float(incentives.chosen.mean()), float(incentives.rejected.mean()))

    def content(self, losses: Sequence[PreferenceLoss]) -> dict[str, dict[str, Any]]:
        """By label: the drift, its interval, the regime (see `entangle.measure.set_content.moves_of`)."""
        found = {}
        for loss in losses:
            incentives = self.pairs.incentives(loss)
            chosen, rejected = float(incentives.chosen.mean()), float(incentives.rejected.mean())
            found[loss.label] = move_content(self.geometry.move(chosen, rejected)) | {
                "incentive_chosen": chosen,
                "incentive_rejected": rejected,
            }
        return found

    def smallest_change(self, knob: Knob, base: PreferenceLoss) -> dict[str, Any]:
        """The setting nearest to a knob's start at which the set no longer drifts: chosen rises, rejected falls.

        `setting` is None where none on the way to the knob's end does. `stops` is the nearest setting at which the mean
        chosen log-prob rises, whatever the rejected does. The cost is in margin per unit of learning rate.
        """
        origin = knob.origin(base)

        def at(setting: float) -> SetMove:
            return self.move(origin if setting == knob.start else knob.loss(base, setting))

        setting = nearest(lambda x: at(x).regime is Regime.IDEAL, settings_of(knob))
        stops = nearest(lambda x: at(x).chosen.value > 0, settings_of(knob))
        found = {
            "knob": knob.name,
            "title": knob.title,
            "start": knob.start,
            "setting": setting,
            "stops": stops,
            "at_start": move_content(at(knob.start)),
        }
        if setting is None:
            return found | {"loss": None, "at_setting": None}
        return found | {"loss": knob.loss(base, setting).label, "at_setting": move_content(at(setting))}


def settings_of(knob: Knob) -> np.ndarray:
    """Settings from a knob's start towards its end, close together near the start: `(STEPS + 1,)`."""
    reach = min(abs(knob.end - knob.start), FARTHEST)
    distances = np.concatenate([[0.0], np.geomspace(1e-5 * reach, 0.999 * reach, STEPS)])
    return knob.start + distances * (1 if knob.end > knob.start else -1)


def nearest(holds: Callable[[float], bool], settings: np.ndarray) -> float | None:
    """The first setting at which something holds, to three digits between two of `settings`; None if it never does."""
    before = None
    for setting in map(float, settings):
        if holds(setting):
            break
        before = setting
    else:
        return None
    if before is None:
        return setting
    edge: Any = bisect(
        lambda x: 1.0 if holds(x) else -1.0, before, setting, xtol=1e-4 * abs(setting - before)
    )
    rounded = float(f"{float(edge) + 1e-3 * (setting - before):.3g}")
    return rounded if holds(rounded) else setting

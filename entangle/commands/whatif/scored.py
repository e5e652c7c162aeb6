"""The scored pairs of a run under losses: shares of regimes, exact intervals of knobs, smallest changes, curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from entangle.analysis.geometry import PairGeometry
from entangle.analysis.hyperparameters import (
    IncentiveLine,
    Knob,
    SettingRange,
    best_change,
    falling_interval,
    fewest_change,
    ideal_interval,
    readable,
    smallest_change,
)
from entangle.analysis.predictions import believed_codes, incentives_of
from entangle.analysis.regimes import REGIMES, Regime, predict
from entangle.analysis.statistics import share, wilson
from losses import Incentives, PairLogps, PreferenceLoss

CURVE_POINTS = 160
"""Settings at which a knob's curve of regime shares is drawn."""


@dataclass(frozen=True)
class ScoredPairs:
    """What losses are judged on: geometry and scalars of the scored pairs, and the batch composition."""

    geometry: PairGeometry
    logps: PairLogps
    batch_size: int

    def incentives(self, loss: PreferenceLoss) -> Incentives:
        """A loss's incentives on these pairs."""
        return incentives_of(loss, self.logps, self.batch_size)

    def codes(self, loss: PreferenceLoss, incentives: Incentives) -> Tensor:
        """The regime of every pair, as the probe judges it: indices into `REGIMES`."""
        codes = predict(self.geometry, incentives).regime_codes
        return believed_codes(loss, self.geometry, self.logps, self.batch_size, codes)

    def verdicts(
        self, losses: Sequence[PreferenceLoss], index: pd.Series
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """One row per loss, and the regime of every pair under it; equal verdicts share a number."""
        rows, columns, verdicts = [], {"index": index.to_numpy()}, {}
        names = [str(regime) for regime in REGIMES]
        for loss in losses:
            incentives = self.incentives(loss)
            codes = self.codes(loss, incentives).numpy()
            number = verdicts.setdefault(codes.tobytes(), len(verdicts))
            columns[loss.label] = pd.Categorical.from_codes(codes, dtype=pd.CategoricalDtype(names))
            rows.append(
                {
                    "label": loss.label,
                    "loss": loss.name,
                    "setting": _setting_json(loss),
                    "verdict": number,
                    "is_batch_coupled": loss.is_batch_coupled,
                    "pairs": len(codes),
                    **dict(zip(names, np.bincount(codes, minlength=len(names)), strict=True)),
                    **_ratio(incentives),
                    **margin_growth(self.geometry, incentives),
                }
            )
        return with_intervals(pd.DataFrame(rows)), pd.DataFrame(columns)

    def shares(self, incentives: Incentives) -> dict[str, int]:
        """Pairs per regime."""
        codes = predict(self.geometry, incentives).regime_codes
        return dict(
            zip(map(str, REGIMES), torch.bincount(codes, minlength=len(REGIMES)).tolist(), strict=True)
        )

    def interval(self, knob: Knob, base: PreferenceLoss) -> tuple[Tensor, Tensor]:
        """Settings of a knob that make each pair ideal, `(B,)` each; NaN for none."""
        return ideal_interval(self.geometry, knob.line(base, self.logps, self.batch_size))

    def change(
        self, knob: Knob, base: PreferenceLoss, lower: Tensor, upper: Tensor, target: float
    ) -> dict[str, Any]:
        """The smallest setting that makes `target` of the pairs ideal, else the best there is; its cost."""
        total = len(lower)
        needed = max(1, int(np.ceil(target * total - 1e-9)))
        found = smallest_change(lower, upper, needed, knob.start, knob.end)
        best = best_change(lower, upper, knob.start, knob.end)
        chosen = found or best
        setting = readable(chosen, knob.start)
        line = knob.line(base, self.logps, self.batch_size)
        before, after = (self._is_ideal(loss) for loss in (knob.origin(base), knob.loss(base, setting)))
        return {
            "knob": knob.name,
            "title": knob.title,
            "idle": knob.idle,
            "start": knob.start,
            "needed": needed,
            "reaches": found is not None,
            "acts_on": int(line.acts.sum()),
            "possible": int((~lower.isnan()).sum()),
            "exact": chosen.nearest,
            "until": chosen.until,
            "overshoots_into": self._past(line, chosen, knob),
            "setting": setting,
            "loss": knob.loss(base, setting).label,
            "gained": int((after & ~before).sum()),
            "lost": int((before & ~after).sum()),
            "best": readable(best, knob.start),
            "best_count": best.count,
            "at_start": self._state(knob.origin(base)),
            "at_setting": self._state(knob.loss(base, setting)),
            "falls": self._fewest_falls(knob, base),
        }

    def falls(self, loss: PreferenceLoss) -> dict[str, float]:
        """Share of pairs whose chosen log-prob a step of a loss lowers, whatever the rejected does."""
        found = predict(self.geometry, self.incentives(loss))
        return share(int((found.change_chosen < -found.floor_chosen).sum()), len(self.logps.chosen))

    def _fewest_falls(self, knob: Knob, base: PreferenceLoss) -> dict[str, Any]:
        """The setting nearest to a knob's start at which the chosen log-prob falls on the fewest pairs."""
        lower, upper = falling_interval(self.geometry, knob.line(base, self.logps, self.batch_size))
        found = fewest_change(lower, upper, knob.start, knob.end)
        setting = readable(found, knob.start)
        loss = knob.loss(base, setting)
        return {
            "setting": setting,
            "exact": found.nearest,
            "until": None if found.until == knob.end else found.until,
            "loss": loss.label,
            "before": self.falls(knob.origin(base)),
            "after": self.falls(loss),
            "at_setting": self._state(loss),
        }

    def _past(self, line: IncentiveLine, found: SettingRange, knob: Knob) -> str | None:
        """The regime that gains most pairs where a stretch ends; None where the knob itself ends there."""
        if found.until == knob.end or not np.isfinite(found.until):
            return None
        inside = self.shares(line.at(found.nearest))
        past = self.shares(line.at(found.until + 0.02 * (found.until - knob.start)))
        wrong = (Regime.BOTH_UP, Regime.BOTH_DOWN, Regime.INVERTED)
        return str(max(wrong, key=lambda name: past[name] - inside[name]))

    def _is_ideal(self, loss: PreferenceLoss) -> Tensor:
        return self.codes(loss, self.incentives(loss)) == REGIMES.index(Regime.IDEAL)

    def _state(self, loss: PreferenceLoss) -> dict[str, Any]:
        incentives = self.incentives(loss)
        counts = self.shares(incentives)
        regimes = {name: share(count, len(self.logps.chosen)) for name, count in counts.items()}
        return {"label": loss.label, "regimes": regimes, **margin_growth(self.geometry, incentives)}

    def curve(
        self, knob: Knob, base: PreferenceLoss, change: Mapping[str, Any], lower: Tensor, upper: Tensor
    ) -> pd.DataFrame:
        """Pairs per regime along a knob, at settings that show where the shares change."""
        line = knob.line(base, self.logps, self.batch_size)
        points = _curve_points(knob, change, torch.cat([lower, upper]))
        rows = [{"knob": knob.name, "setting": x, **self.shares(line.at(x))} for x in points]
        return pd.DataFrame(rows)


def margin_growth(geometry: PairGeometry, incentives: Incentives) -> dict[str, float]:
    """What a loss does to the margin log pi(chosen) - log pi(rejected), over the pairs.

    margin_change (mean and median): first-order change per unit of SGD learning rate on the pair's own loss,
    in nats. It scales with the loss, so across losses it compares scales more than anything else.

    margin_efficiency (mean and median): the same at equal length of the step, free of the loss's scale. With
    g the gradient of the pair's loss, it is margin_change / (|g| |g_w - g_l|): the cosine of the step and the
    direction in which the margin grows fastest. Laws: in [-1, 1]; 1 for every loss with rho = 1; the cost of
    making a pair ideal by another rho is 1 minus it. Pairs on which a loss doesn't act (g = 0) are left out.
    """
    prediction = predict(geometry, incentives)
    d_w, d_l = incentives.chosen.double(), incentives.rejected.double()
    squared = (d_w * prediction.change_chosen - d_l * prediction.change_rejected).clamp(min=0)  # |g|^2
    steepest = (geometry.gap_chosen + geometry.gap_rejected).clamp(min=0)  # |g_w - g_l|^2
    efficiency = (prediction.margin_change / (squared * steepest).sqrt()).clamp(-1, 1)
    return {
        f"{name}_{kind}": _aggregate(values, kind)
        for name, values in (("margin_change", prediction.margin_change), ("margin_efficiency", efficiency))
        for kind in ("mean", "median")
    }


def _aggregate(values: Tensor, kind: str) -> float:
    known = values[values.isfinite()].numpy()
    return float("nan") if len(known) == 0 else float(np.mean(known) if kind == "mean" else np.median(known))


def with_intervals(settings: pd.DataFrame) -> pd.DataFrame:
    """Counts per regime as shares: `ideal`, `ideal_low`, `ideal_high` (95 % Wilson), `ideal_count`, etc."""
    columns: dict[str, Any] = {}
    for name in settings.columns:
        if name not in {str(regime) for regime in REGIMES}:
            columns[name] = settings[name]
            continue
        low, high = wilson(settings[name].to_numpy(), settings["pairs"].to_numpy())
        columns |= {f"{name}_count": settings[name], name: settings[name] / settings["pairs"]}
        columns |= {f"{name}_low": low, f"{name}_high": high}
    return pd.DataFrame(columns)


def _setting_json(loss: PreferenceLoss) -> str:
    config = loss.config
    config.pop("name")
    return json.dumps(config)


def _ratio(incentives: Incentives) -> dict[str, float]:
    """Median of rho = d_w / d_l, and whether every pair has the same."""
    rho = (incentives.chosen / incentives.rejected).double().numpy()
    known = rho[~np.isnan(rho)]
    if len(known) == 0:
        return {"rho": float("nan"), "rho_spread": float("nan")}
    finite = known[np.isfinite(known)]
    spread = float(finite.max() - finite.min()) if len(finite) == len(known) else float("inf")
    return {"rho": float(np.median(known)), "rho_spread": spread}


def _curve_points(knob: Knob, change: Mapping[str, Any], ends: Tensor) -> list[float]:
    """Settings along a knob: evenly over a bounded one, else from well below to well above the ends."""
    if np.isfinite(knob.end):
        points = np.linspace(knob.start, knob.end, CURVE_POINTS)
        return [float(x) for x in points if x > 0 or knob.start == 0]
    positive = ends[ends.isfinite() & (ends > 0)].numpy()
    marks = [value for value in (change["setting"], change["best"]) if value > 0]
    low, high = np.quantile(positive, [0.02, 0.98]) if len(positive) else (0.1, 10.0)
    low, high = min([low, *marks]) / 3, max([high, *marks]) * 3
    points = np.geomspace(low, high, CURVE_POINTS - 1 - len(marks))
    return [0.0, *sorted([*points.tolist(), *marks])]

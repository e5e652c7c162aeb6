"""What a run's own batches say of the set while it trains, from the products that `entangle.training.memory` takes.

Every step has a 2 x 2 block E_t: what the chosen and the rejected half of the optimiser's memory do to the mean chosen
and mean rejected log-prob of fresh pairs. With the halves as the loss weighs them a step moves these by

    chosen  E_00 - E_01        rejected  E_10 - E_11

and with the chosen half times k the two part iff E_01 / E_00 < k < E_11 / E_10; k = 1 is the loss as it is.

One batch is noisy, so E is averaged over the last `WINDOW` steps. Given the memory the batches are independent of each
other, so the interval is a jackknife over them: each step of the window is a group of its own.

Four steps of which the rejected half pulls both log-probs down by more than the chosen half lifts them:

    >>> rows = pd.DataFrame({"step": [1, 2, 3, 4], "pairs": 8, "chosen_on_chosen": [1.0, 1.1, 0.9, 1.0],
    ...     "rejected_on_chosen": [1.4, 1.5, 1.3, 1.4], "chosen_on_rejected": 1.2, "rejected_on_rejected": 1.8})
    >>> point = live_point(window_geometry(rows))
    >>> {name: round(point[name], 2) for name in ("live_low", "live_high", "live_drift")}
    {'live_low': 1.4, 'live_high': 1.5, 'live_drift': -2.5}
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch

from entangle.analysis.sets import SetGeometry

WINDOW = 16
"""Steps that are averaged over."""

FEWEST = 4
"""With fewer steps Student's t makes intervals too wide to be of use."""

EFFECTS = ("chosen_on_chosen", "rejected_on_chosen", "chosen_on_rejected", "rejected_on_rejected")
"""Columns of E row by row: `rejected_on_chosen` is what the memory's rejected half does to the mean chosen log-prob."""


def window_geometry(rows: pd.DataFrame, last: int | None = None) -> SetGeometry | None:
    """The mean block of the last `WINDOW` steps up to `last`; None with fewer than `FEWEST`.

    Args:
        rows: step, pairs and `EFFECTS`, one per step and process.
        last: a step; None: the last one there is.
    """
    rows = rows if last is None else rows[rows["step"] <= last]
    weighted = rows[list(EFFECTS)].mul(rows["pairs"], axis=0).groupby(rows["step"]).sum()
    pairs = rows.groupby("step")["pairs"].sum()
    steps = pairs.index.sort_values()[-WINDOW:]
    if len(steps) < FEWEST:
        return None
    blocks = weighted.loc[steps].div(pairs[steps], axis=0).to_numpy()
    return SetGeometry.from_batches(
        torch.tensor(blocks).view(-1, 2, 2), torch.tensor(pairs[steps].to_numpy())
    )


def live_point(geometry: SetGeometry) -> dict[str, float]:
    """Drift and band of a window as columns, with the ends of their intervals as *_low and *_high.

    live_drift, nats of both log-probs per nat of margin, of the loss as it is; live_low and live_high, the factors on
    the chosen half between which the two part; live_pairs, pairs of the window.
    """
    move, (lower, upper) = geometry.move(1.0, 1.0), geometry.band
    return {
        "live_low": lower.value,
        "live_high": upper.value,
        "live_drift": move.drift.value,
        "live_drift_low": move.drift.low,
        "live_drift_high": move.drift.high,
        "live_pairs": geometry.pairs,
    }


def live_course(rows: pd.DataFrame) -> pd.DataFrame:
    """`live_point` after every step that has a window: one row per step.

    Args:
        rows: step, pairs and `EFFECTS`, one per step and process: the table `batches`.
    """
    found: list[Mapping[str, float]] = []
    for step in sorted(rows["step"].unique()):
        if (geometry := window_geometry(rows, int(step))) is not None:
            found.append({"step": int(step)} | live_point(geometry))
    return pd.DataFrame(found)

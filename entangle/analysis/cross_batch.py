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

import math
from collections.abc import Callable, Mapping

import pandas as pd
import torch
from torch import Tensor

from entangle.analysis.sets import SetGeometry

WINDOW = 16
"""Steps that are averaged over."""

LARGEST = 4.0
"""Largest factor on the chosen half, and one over the smallest."""

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


# --- what would keep the set in its band ---------------------------------------------------------------------


def edge_factor(block: Tensor) -> float:
    """The k nearest to 1 in the band, shrunk by a quarter of its log-width at either end; its centre if it is empty.

    An end that isn't there (E_01 or E_10 not positive) counts as 1 / `LARGEST` or `LARGEST`. NaN where a half doesn't
    do to its own side what it is for (E_00 or E_11 not positive): then there is no band to speak of.

    Args:
        block: E, `(2, 2)`.
    """
    low, high = _log_band(block)
    inset = (high - low) / 4
    return math.exp(min(max(0.0, low + inset), high - inset) if inset > 0 else (low + high) / 2)


def centre_factor(block: Tensor) -> float:
    """The k in the middle of the band, sqrt(low high); ends and NaN as in `edge_factor`."""
    return math.exp(sum(_log_band(block)) / 2)


def drift_factor(block: Tensor, drift: float) -> float:
    """The k under which both log-probs move by `drift` nats per nat of margin; NaN where no positive k does.

    k (E_00 + E_10 - 2 x (E_00 - E_10)) = E_01 + E_11 - 2 x (E_01 - E_11) for a drift of x.

    Args:
        block: E, `(2, 2)`.
        drift: x.
    """
    (a, b), (c, d) = block.tolist()
    top, bottom = b + d - 2 * drift * (b - d), a + c - 2 * drift * (a - c)
    return top / bottom if top > 0 and bottom > 0 else math.nan


def steady_factor(rule: Callable[[Tensor], float], geometry: SetGeometry) -> float:
    """A rule's k from a window, cut to [1 / `LARGEST`, `LARGEST`]; 1 while its interval covers all of that.

    Args:
        rule: from E to k.
        geometry: of a window.
    """
    blocks = [geometry.products, *geometry.replicates[:, 0]]
    value, *others = (math.log(k) if (k := rule(block)) > 0 else math.nan for block in blocks)
    found = geometry.jackknife.number(value, torch.tensor(others, dtype=torch.float64))
    limit = math.log(LARGEST)
    if math.isnan(value) or (found.low <= -limit and found.high >= limit):
        return 1.0
    return math.exp(min(max(value, -limit), limit))


def common_share(geometry: SetGeometry, *, of_chosen: bool) -> float:
    """How much of the common direction a step has: a, so that the step less a P (C_w + C_l) doesn't move both means.

        a = (D_w + D_l) / (G_w + G_l)        of the chosen alone: min(D_w, 0) / G_w

    with D what the step's memory does to the two means and G what the common direction does; 0 where the window can't
    tell a (its interval is infinite).

    Args:
        geometry: of a window with four directions: the two halves M_w, M_l and the two mean scores C_w, C_l.
        of_chosen: keep the mean chosen log-prob from falling, and nothing else.
    """
    blocks = torch.cat([geometry.products[None], geometry.replicates[:, 0]])
    step = blocks[..., 0] - blocks[..., 1]
    gain = blocks[..., 2] + blocks[..., 3]
    sides = slice(0, 1) if of_chosen else slice(0, 2)
    tops, bottoms = step[:, sides].sum(1), gain[:, sides].sum(1)
    top, bottom = float(tops[0]), float(bottoms[0])
    found = geometry.jackknife.ratio(top, bottom, torch.stack([tops[1:], bottoms[1:]], 1))
    if bottom <= 0 or not math.isfinite(found.low) or (of_chosen and top > 0):
        return 0.0
    return found.value


def _log_band(block: Tensor) -> tuple[float, float]:
    (a, b), (c, d) = block.tolist()
    if a <= 0 or d <= 0:
        return math.nan, math.nan
    limit = math.log(LARGEST)
    return math.log(b / a) if b > 0 else -limit, math.log(d / c) if c > 0 else limit

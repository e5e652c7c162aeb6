"""What a fixed set of pairs did over a run: rows of (step, pair) -> changes since the start, curve, onset.

Two pairs at two steps: both log-probs of pair 0 fall, those of pair 1 part.

    >>> rows = pd.DataFrame({"step": [0, 0, 5, 5], "index": [0, 1, 0, 1],
    ...     "logps_chosen": [-9.0, -8.0, -9.5, -7.5], "logps_rejected": [-9.0, -8.0, -10.0, -8.5]})
    >>> curve(with_changes(rows, rows[:2])).loc[1, ["moved_rejected", "both_fell", "accuracy"]].tolist()
    [-0.75, 0.5, 1.0]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from entangle.analysis.geometry import SIDES
from entangle.analysis.regimes import REGIMES
from entangle.analysis.set_verdict import finding
from entangle.analysis.statistics import Z


def with_changes(rows: pd.DataFrame, start: pd.DataFrame) -> pd.DataFrame:
    """Rows with `moved_chosen` and `moved_rejected`: each log-prob minus its value at the start, nats.

    Args:
        rows: step, index, logps_chosen, logps_rejected and further columns.
        start: index, logps_chosen and logps_rejected of every pair, once.
    """
    known = start.set_index("index")
    changes = {
        f"moved_{side}": rows[f"logps_{side}"] - rows["index"].map(known[f"logps_{side}"]) for side in SIDES
    }
    return rows.assign(**changes)


def curve(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per step of rows that `with_changes` gave; a pair without numbers is left out.

    Columns: step; pairs; moved_chosen, moved_rejected and moved_margin (means over pairs, nats), each with its
    standard error over pairs as *_error (paired: every pair against its own start); chosen_fell, rejected_fell,
    both_fell (shares of the pairs below their start); accuracy (share whose margin has grown: the implicit reward
    prefers the chosen response); and, where the rows have them, cosine (median), cosine_q25, cosine_q75, a share of
    the pairs per predicted regime, and predicted_chosen, predicted_rejected (means of the changes that one SGD step on
    each pair alone would make, per unit learning rate).
    """
    scored = rows.dropna(subset=["moved_chosen", "moved_rejected"])
    scored = scored.assign(moved_margin=scored["moved_chosen"] - scored["moved_rejected"])
    return pd.DataFrame([{"step": step} | _point(group) for step, group in scored.groupby("step", sort=True)])


def _point(pairs: pd.DataFrame) -> dict[str, Any]:
    chosen_fell, rejected_fell = pairs["moved_chosen"] < 0, pairs["moved_rejected"] < 0
    point: dict[str, Any] = {"pairs": len(pairs)}
    for name in ("moved_chosen", "moved_rejected", "moved_margin"):
        point[name], point[f"{name}_error"] = pairs[name].mean(), pairs[name].sem()
    point |= {
        "chosen_fell": chosen_fell.mean(),
        "rejected_fell": rejected_fell.mean(),
        "both_fell": (chosen_fell & rejected_fell).mean(),
        "accuracy": (pairs["moved_margin"] > 0).mean(),
    }
    if "cosine" in pairs:
        low, middle, high = pairs["cosine"].quantile([0.25, 0.5, 0.75])
        point |= {"cosine": middle, "cosine_q25": low, "cosine_q75": high}
    if "regime" in pairs:
        point |= {str(regime): (pairs["regime"] == regime).mean() for regime in REGIMES}
        point |= {f"predicted_{side}": pairs[f"change_{side}"].mean() for side in SIDES}
    return point


def set_point(content: Mapping[str, Any], loss: str) -> dict[str, float]:
    """What the set of pairs does at one step, as columns beside those of `curve`.

    Columns: set_cosine of the mean scores; set_low and set_high, the incentive ratios between which the set is ideal;
    set_rho, the loss's own; set_drift, nats of both log-probs per nat of margin; set_change_chosen and
    set_change_rejected, what a step does to the mean log-probs, nats per unit of learning rate; all but rho with their
    intervals as *_low and *_high. NaN where the mean scores have no common direction, or no margin is gained.

    Args:
        content: a probe's `summary["set"]`, in which null stands for what isn't finite.
        loss: the loss's label.
    """
    move, (lower, upper) = content["losses"][loss], content["band"]
    chosen, rejected = move["incentive_chosen"], move["incentive_rejected"]
    estimates = {"set_cosine": content["cosine"], "set_drift": move["drift"]}
    estimates |= {f"set_change_{side}": move[side] for side in SIDES}
    has_direction = content["cosine"]["value"] is not None
    ends = {
        f"set_{name}_{end}": _number(edge[end], infinite) if has_direction else math.nan
        for name, edge in (("low", lower), ("high", upper))
        for end, infinite in (("low", -math.inf), ("high", math.inf))
    }
    return ends | {
        "set_low": _number(lower["value"], math.nan) if has_direction else math.nan,
        "set_high": _number(upper["value"], math.inf) if has_direction else math.nan,
        "set_rho": chosen / rejected if rejected else math.copysign(math.inf, chosen),
        **{name: _number(found["value"], math.nan) for name, found in estimates.items()},
        **{f"{name}_low": _number(found["low"], -math.inf) for name, found in estimates.items()},
        **{f"{name}_high": _number(found["high"], math.inf) for name, found in estimates.items()},
    }


def set_row(content: Mapping[str, Any], loss: str | None) -> dict[str, Any]:
    """`set_point` and what a table of a run's probes says beside it.

    Columns: metric, set_pairs, set_regime by the signs of the two changes, and set_finding, what is known for certain
    (see `entangle.analysis.set_verdict.finding`).

    Args:
        content: the set at one step.
        loss: the loss's label; None where it can't be judged: then only the geometry is there.
    """
    row: dict[str, Any] = {"metric": content["metric"], "set_pairs": content["pairs"]}
    if loss is None or loss not in content["losses"]:
        return row | {"set_cosine": _number(content["cosine"]["value"], math.nan)}
    move = content["losses"][loss]
    return row | set_point(content, loss) | {"set_regime": move["regime"], "set_finding": finding(move)}


def _number(value: float | None, missing: float) -> float:
    return missing if value is None else value


def onset(points: pd.DataFrame) -> int | None:
    """The step from which on the coupled decrease lasts; None if there is none at the end.

    The coupled decrease: the mean over pairs of the change since the start is below 0 by more than `Z` standard
    errors, of the chosen log-prob and of the rejected one. Its onset is the first step from which on this holds at
    every later step too, so a dip that recovers isn't one.

    Args:
        points: rows of `curve`.
    """
    fallen = [points[f"moved_{side}"] < -Z * points[f"moved_{side}_error"] for side in SIDES]
    lasting = (fallen[0] & fallen[1])[::-1].cummin()[::-1]
    return int(points.loc[lasting, "step"].min()) if lasting.any() else None


def pair_onsets(rows: pd.DataFrame) -> pd.Series:
    """Per pair (by index), the step from which on both its log-probs stay below their start; NaN: never.

    Args:
        rows: rows that `with_changes` gave.
    """
    fallen = rows.assign(fallen=(rows["moved_chosen"] < 0) & (rows["moved_rejected"] < 0))
    table = fallen.pivot(index="index", columns="step", values="fallen").sort_index(axis=1).astype(bool)
    lasting = np.minimum.accumulate(table.to_numpy()[:, ::-1], axis=1)[:, ::-1]
    steps = np.where(lasting, table.columns.to_numpy(dtype=float), np.inf).min(axis=1)
    return pd.Series(np.where(np.isfinite(steps), steps, np.nan), index=table.index, name="onset")


def over_seeds(curves: pd.DataFrame, by: Sequence[str] = ("variant", "loss", "step")) -> pd.DataFrame:
    """Mean over seeds of every number, and its smallest and largest value as *_low and *_high.

    A number's own interval, which has these names already, is left out.

    Args:
        curves: rows of `curve` with a column `seed` and those of `by`.
        by: what a row is told apart by, beside the seed.
    """
    ends = [f"{name}{end}" for name in curves for end in ("_low", "_high") if f"{name}{end}" in curves]
    numbers = curves.drop(columns=["seed", *ends]).groupby(list(by), sort=False)
    low, high = numbers.min().add_suffix("_low"), numbers.max().add_suffix("_high")
    return numbers.mean().join(low).join(high).reset_index()

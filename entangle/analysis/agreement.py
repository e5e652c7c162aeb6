"""Does the inner-product condition explain training? Predicted against measured directions of the mean log-probs.

At every probe the condition predicts, for each held-out pair, in which direction one SGD step on that pair alone would
move its two log-probs, and for the set of these pairs in which direction a step on others like them moves both means
(under Adam's preconditioner where the run has it). Training takes AdamW steps on batches of other pairs. `directions`
compares signs of either with the sign of the mean change until the next probe, a side at a time; `drifts` compares both
sides at once, and the size: nats that both log-probs move per nat of margin.

A run whose two pairs both lose both log-probs, while each pair alone was predicted to part:

    >>> rows = pd.DataFrame({"variant": "dpo", "loss": "dpo", "seed": 0, "step": [0, 0, 5, 5], "index": [0, 1, 0, 1],
    ...     "logps_chosen": [-9.0, -8.0, -9.5, -8.7], "logps_rejected": [-9.0, -8.0, -10.0, -9.4],
    ...     "change_chosen": 1.0, "change_rejected": -1.0})
    >>> sets = pd.DataFrame({"variant": ["dpo"], "loss": "dpo", "seed": 0, "step": 0, "set_change_chosen": -1.0,
    ...     "set_change_rejected": -2.0, "set_drift_low": -2.0, "set_drift_high": -1.0})
    >>> drifts(rows, sets)[["measured", "set_says", "pairs_say", "drift"]].values.tolist()
    [['fall', 'fall', 'part', -1.5]]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from entangle.analysis.drift import following, gained, mean_drift, of_changes
from entangle.analysis.geometry import SIDES
from entangle.analysis.statistics import Z, bootstrap

KEYS = ["variant", "loss", "seed"]
"""What tells runs apart."""

IDEAL = {"chosen": 1.0, "rejected": -1.0}
"""The direction that a loss is meant to have: the baseline of a forecast without any measurement."""


def directions(rows: pd.DataFrame, sets: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per run, probe (but the last) and response: predicted and measured direction until the next probe.

    Columns: variant, loss, seed, step, side; predicted (mean over pairs of the predicted change), measured (mean change
    until the next probe, nats), error (its standard error over pairs); agrees, ideal_agrees (whether the measured
    direction is the intended one) and is_clear (|measured| above `Z` errors); pair_agrees (share of the pairs whose own
    direction was predicted); set_predicted (the change of the mean that the set predicts) and set_agrees, 1 or 0, both
    NaN where the set wasn't measured.

    Args:
        rows: probe rows of all runs: `KEYS`, step, index, logps_* and change_*.
        sets: what the set said at these probes: `KEYS`, step, metric and the columns of `curves.set_row`; of a step's
            rows under several metrics the last one counts.
    """
    found = []
    for key, step, now, later in _intervals(rows):
        said = _said(sets, key, step)
        for side in SIDES:
            moved = (later[f"logps_{side}"] - now[f"logps_{side}"]).dropna()
            predicted = now[f"change_{side}"].astype(float).reindex(moved.index)
            if predicted.isna().any():
                continue  # a loss whose incentives the rows don't hold
            of_set = said.get(f"set_change_{side}", math.nan)
            found.append(
                dict(zip(KEYS, key, strict=True))
                | {"step": step, "side": side, "predicted": predicted.mean(), "measured": moved.mean()}
                | {"error": moved.sem(), "pair_agrees": (np.sign(predicted) == np.sign(moved)).mean()}
                | {"set_predicted": of_set}
            )
    table = pd.DataFrame(found)
    if table.empty:
        return table
    measured = np.sign(table["measured"])
    same = (np.sign(table["set_predicted"]) == measured).astype(float)
    return table.assign(
        agrees=np.sign(table["predicted"]) == measured,
        ideal_agrees=table["side"].map(IDEAL) == measured,
        is_clear=table["measured"].abs() > Z * table["error"],
        set_agrees=same.where(table["set_predicted"].notna()),
    )


def drifts(rows: pd.DataFrame, sets: pd.DataFrame) -> pd.DataFrame:
    """One row per run and probe (but the last) at which the set was measured: both means at once, until the next probe.

    Columns: variant, loss, seed, step; measured, set_says and pairs_say, each `rise`, `fall`, `part` or `inverted` by
    the signs of both mean changes (`pairs_say`: by the means of the pairs' own predictions); is_clear (both measured
    changes above `Z` errors); drift and measured_drift with their intervals *_low and *_high, and pairs_drift, nats of
    both log-probs per nat of margin, NaN where no margin is gained; gains (the measured margin grew by over `Z`
    errors).

    Args:
        rows: see `directions`.
        sets: likewise.
    """
    found = []
    for key, step, now, later in _intervals(rows):
        said = _said(sets, key, step)
        moved = gained(now, later)
        own = [float(now[f"change_{side}"].astype(float).reindex(moved.index).mean()) for side in SIDES]
        of_set = [said.get(f"set_change_{side}", math.nan) for side in SIDES]
        if any(map(math.isnan, [*own, *of_set])):
            continue
        numbers = moved.to_numpy(float)
        mean, gain = numbers.mean(0), numbers[:, 0] - numbers[:, 1]
        error, root = Z * numbers.std(0, ddof=1), len(numbers) ** 0.5
        drift = mean_drift(numbers[:, 0], numbers[:, 1])
        found.append(
            dict(zip(KEYS, key, strict=True))
            | {
                "step": step,
                "measured": _named(*mean),
                "set_says": _named(*of_set),
                "pairs_say": _named(*own),
            }
            | {"is_clear": bool((abs(mean) > error / root).all())}
            | {
                "drift": of_changes(*of_set),
                "drift_low": said["set_drift_low"],
                "drift_high": said["set_drift_high"],
            }
            | {"pairs_drift": of_changes(*own), "measured_drift": drift.value}
            | {"measured_drift_low": drift.low, "measured_drift_high": drift.high}
            | {"gains": bool(gain.mean() > Z * gain.std(ddof=1) / root)}
        )
    return pd.DataFrame(found)


def drift_agreement(table: pd.DataFrame, by: str | None = None, draws: int = 2000) -> pd.DataFrame:
    """How often both directions were foretold together, and how far off the drift was.

    One row per value of `by` (one without it): set_agrees with its interval low and high (a bootstrap over runs),
    pairs_agree and ideal_agrees (a forecast of `part` without any measurement); clear_agrees (the set's, where both
    measured changes are clear); and, over the `gains` of which both foretell one, medians of |foretold - measured|
    drift: set_off, pairs_off, and ideal_off of a foretold 0; probes, gains (these), runs.

    Args:
        table: rows of `drifts`.
        by: a column to break down by, such as "variant".
        draws: bootstrap samples.
    """
    found = []
    for key, own in table.groupby(by, sort=False) if by else [("", table)]:
        own = own.assign(agrees=own["set_says"] == own["measured"])
        low, high = _interval(own, draws)
        gained = own[own["gains"] & own["drift"].notna() & own["pairs_drift"].notna()]
        measured = gained["measured_drift"]
        found.append(
            ({by: key} if by else {})
            | {"set_agrees": own["agrees"].mean(), "low": low, "high": high}
            | {"pairs_agree": (own["pairs_say"] == own["measured"]).mean()}
            | {"ideal_agrees": (own["measured"] == "part").mean()}
            | {"clear_agrees": own.loc[own["is_clear"], "agrees"].mean()}
            | {"set_off": (gained["drift"] - measured).abs().median()}
            | {"pairs_off": (gained["pairs_drift"] - measured).abs().median()}
            | {"ideal_off": measured.abs().median()}
            | {"probes": len(own), "gains": len(gained), "runs": own.groupby(KEYS).ngroups}
        )
    return pd.DataFrame(found)


def drift_sentence(found: Mapping[Any, Any], between: str = "probes") -> str:
    """How well the set foretold the two means, against the pairs alone and against no measurement at all.

    Args:
        found: a row of `drift_agreement`.
        between: what the intervals are between.
    """
    shares = [f"{100 * found[name]:.0f} %" for name in ("set_agrees", "pairs_agree", "ideal_agrees")]
    sentence = (
        f"Over {found['probes']} intervals between {between} the set gave the directions of both mean log-probs in "
        f"{shares[0]} (the pairs alone in {shares[1]}; they parted as intended in {shares[2]})"
    )
    if not found["gains"] or found["set_off"] is None or math.isnan(found["set_off"]):
        return f"{sentence}."
    off = [f"{found[name]:.2g}" for name in ("set_off", "pairs_off", "ideal_off")]
    return (
        f"{sentence}; where the margin grew as foretold ({found['gains']} of them), its drift was off by {off[0]} "
        f"nats per nat of margin (the pairs' by {off[1]}, a forecast of 0 by {off[2]}; medians)."
    )


def _intervals(rows: pd.DataFrame) -> Iterator[tuple[Any, int, pd.DataFrame, pd.DataFrame]]:
    """(run, step, its rows, the next probe's rows), both by index of the pair."""
    for key, run in rows.groupby(KEYS, sort=False):
        for now, later in following(run):
            yield key, int(now["step"].iloc[0]), now, later


def _said(sets: pd.DataFrame | None, key: Any, step: int) -> Mapping[Any, Any]:
    """What the set said at a probe."""
    if sets is None or sets.empty:
        return {}
    here = (sets[KEYS] == list(key)).all(axis=1) & (sets["step"] == step)
    return sets[here].iloc[-1].to_dict() if here.any() else {}


def _named(chosen: float, rejected: float) -> str:
    """The two directions in a word."""
    if chosen > 0:
        return "rise" if rejected > 0 else "part"
    return "inverted" if rejected > 0 else "fall"


def agreement(table: pd.DataFrame, by: str | None = None, draws: int = 2000) -> pd.DataFrame:
    """Shares of `directions` that agree, with 95 % intervals.

    The intervals are from a bootstrap over runs, since the probes of one run hang together.

    One row per value of `by` and side: agrees, low, high; ideal_agrees; clear_agrees (among clear changes);
    pair_agrees; set_agrees (where the set was measured); probes, runs.

    Args:
        table: rows of `directions`.
        by: a column to break down by, such as "variant".
        draws: bootstrap samples.
    """
    groups = table.groupby(([by] if by else []) + ["side"], sort=False)
    rows = []
    for key, own in groups:
        low, high = _interval(own, draws)
        rows.append(
            dict(zip([by, "side"] if by else ["side"], key, strict=True))
            | {
                "agrees": own["agrees"].mean(),
                "low": low,
                "high": high,
                "ideal_agrees": own["ideal_agrees"].mean(),
            }
            | {
                "clear_agrees": own.loc[own["is_clear"], "agrees"].mean(),
                "pair_agrees": own["pair_agrees"].mean(),
            }
            | {"set_agrees": own["set_agrees"].mean()}
            | {"probes": len(own), "runs": own.groupby(KEYS).ngroups}
        )
    return pd.DataFrame(rows)


def _interval(table: pd.DataFrame, draws: int) -> tuple[float, float]:
    """Interval of the share that agrees, runs drawn with replacement; NaN for one run."""
    per_run = table.groupby(KEYS)["agrees"].agg(["sum", "count"]).to_numpy(dtype=float)
    return bootstrap(
        lambda agree, of, axis: agree.sum(axis) / of.sum(axis), per_run[:, 0], per_run[:, 1], draws=draws
    )

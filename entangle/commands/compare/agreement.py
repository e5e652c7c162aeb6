"""Does the inner-product condition explain training? Predicted against measured directions of the mean log-probs.

At every probe the condition predicts, for each held-out pair, in which direction one SGD step on that pair alone would
move its two log-probs. Training takes AdamW steps on batches of other pairs. This compares the sign of the mean
prediction with the sign of the mean change until the next probe.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from entangle.analysis.geometry import SIDES
from entangle.analysis.statistics import Z, bootstrap
from entangle.commands.compare.curves import KEYS

IDEAL = {"chosen": 1.0, "rejected": -1.0}
"""The direction that a loss is meant to have: the baseline of a forecast without any measurement."""


def directions(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per run, probe (but the last) and response: predicted and measured direction until the next probe.

    Columns: variant, loss, seed, step, side; predicted (mean over pairs of the predicted change), measured (mean change
    until the next probe, nats), error (its standard error over pairs); agrees, ideal_agrees (whether the measured
    direction is the intended one) and is_clear (|measured| above `Z` errors); pair_agrees (share of the pairs whose own
    direction was predicted).

    Args:
        rows: probe rows of all runs (see `labelled`).
    """
    found = []
    for key, run in rows.groupby(KEYS, sort=False):
        steps = sorted(run["step"].unique())
        tables = {step: own.set_index("index") for step, own in run.groupby("step")}
        for step, following in zip(steps, steps[1:], strict=False):
            now, later = tables[step], tables[following]
            for side in SIDES:
                moved = (later[f"logps_{side}"] - now[f"logps_{side}"]).dropna()
                predicted = now[f"change_{side}"].astype(float).reindex(moved.index)
                if predicted.isna().any():
                    continue  # a loss whose incentives the rows don't hold
                found.append(
                    dict(zip(KEYS, key, strict=True))
                    | {"step": step, "side": side, "predicted": predicted.mean(), "measured": moved.mean()}
                    | {"error": moved.sem(), "pair_agrees": (np.sign(predicted) == np.sign(moved)).mean()}
                )
    table = pd.DataFrame(found)
    if table.empty:
        return table
    measured = np.sign(table["measured"])
    return table.assign(
        agrees=np.sign(table["predicted"]) == measured,
        ideal_agrees=table["side"].map(IDEAL) == measured,
        is_clear=table["measured"].abs() > Z * table["error"],
    )


def agreement(table: pd.DataFrame, by: str | None = None, draws: int = 2000) -> pd.DataFrame:
    """Shares of `directions` that agree, with 95 % intervals.

    The intervals are from a bootstrap over runs, since the probes of one run hang together.

    One row per value of `by` and side: agrees, low, high; ideal_agrees; clear_agrees (among clear changes);
    pair_agrees; probes, runs.

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
            | {"probes": len(own), "runs": own.groupby(KEYS).ngroups}
        )
    return pd.DataFrame(rows)


def _interval(table: pd.DataFrame, draws: int) -> tuple[float, float]:
    """Interval of the share that agrees, runs drawn with replacement; NaN for one run."""
    per_run = table.groupby(KEYS)["agrees"].agg(["sum", "count"]).to_numpy(dtype=float)
    return bootstrap(
        lambda agree, of, axis: agree.sum(axis) / of.sum(axis), per_run[:, 0], per_run[:, 1], draws=draws
    )

"""From the rows of a comparison's runs to curves per run and final numbers."""

from __future__ import annotations

from typing import Any

import pandas as pd

from entangle.analysis.curves import curve, onset, with_changes
from entangle.analysis.ledger import PARTS, cumulate
from entangle.commands.compare.trials import Trial

KEYS = ["variant", "loss", "seed"]


def labelled(trial: Trial, rows: pd.DataFrame) -> pd.DataFrame:
    """A run's probe rows with what the run is, and the changes since its first probe (before the first step)."""
    start = rows[rows["step"] == rows["step"].min()]
    return with_changes(rows, start).assign(variant=trial.variant, loss=trial.loss, seed=trial.seed)


def run_curves(rows: pd.DataFrame) -> pd.DataFrame:
    """`entangle.analysis.curves.curve` of every run, one below the other, with variant, loss and seed."""
    parts = []
    for key, own in rows.groupby(KEYS, sort=False):
        labels: dict[str, Any] = dict(zip(KEYS, key, strict=True))
        parts.append(curve(own).assign(**labels))
    return pd.concat(parts, ignore_index=True)


def ledger_means(trial: Trial, ledger: pd.DataFrame) -> pd.DataFrame:
    """A run's ledger summed over its steps, mean over the pairs: one row per side, causes as columns, nats."""
    means = cumulate(ledger).groupby("side", sort=False)[["measured", *PARTS]].mean().reset_index()
    return means.assign(variant=trial.variant, loss=trial.loss, seed=trial.seed)


def final_numbers(curves: pd.DataFrame) -> pd.DataFrame:
    """One row per run: the last point of its curve, and the onset of the coupled decrease (NaN: none)."""
    last = curves.loc[curves.groupby(KEYS, sort=False)["step"].idxmax()]
    onsets = {key: onset(own) for key, own in curves.groupby(KEYS, sort=False)}
    found = [onsets[tuple(row)] for row in last[KEYS].itertuples(index=False)]
    return last.assign(onset=pd.array(found, dtype="Float64")).reset_index(drop=True)

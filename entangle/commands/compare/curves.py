"""From the rows of a comparison's runs to curves per run and final numbers."""

from __future__ import annotations

from typing import Any

import pandas as pd

from entangle.analysis.agreement import KEYS
from entangle.analysis.curves import curve, onset, with_changes
from entangle.analysis.ledger import PARTS, cumulate
from entangle.commands.compare.trials import Trial

ESTIMATES = ("set_cosine", "set_drift", "set_change_chosen", "set_change_rejected")

SET_NUMBERS = (
    "set_low",
    "set_high",
    "set_rho",
    *(f"{name}{end}" for name in ESTIMATES for end in ("", "_low", "_high")),
)
"""Columns of the set's that go into curves."""


def labelled(trial: Trial, rows: pd.DataFrame) -> pd.DataFrame:
    """A run's probe rows with what the run is, and the changes since its first probe (before the first step)."""
    start = rows[rows["step"] == rows["step"].min()]
    return with_changes(rows, start).assign(variant=trial.variant, loss=trial.loss, seed=trial.seed)


def run_curves(rows: pd.DataFrame, sets: pd.DataFrame) -> pd.DataFrame:
    """`entangle.analysis.curves.curve` of every run, one below the other, with variant, loss and seed.

    Beside it stand the numbers of the set, in the plain metric, and as *_adamw under Adam's preconditioner.

    Args:
        rows: probe rows of all runs (see `labelled`).
        sets: rows of their sets, with variant, loss and seed; may be empty.
    """
    parts = []
    for key, own in rows.groupby(KEYS, sort=False):
        labels: dict[str, Any] = dict(zip(KEYS, key, strict=True))
        parts.append(curve(own).assign(**labels))
    points = pd.concat(parts, ignore_index=True)
    for metric, ending in (("sgd", ""), ("adamw", "_adamw")) if len(sets) else ():
        own = sets[sets["metric"] == metric]
        numbers = [name for name in SET_NUMBERS if name in own]
        named = own[[*KEYS, "step", *numbers]].rename(columns={name: name + ending for name in numbers})
        points = points.merge(named, on=[*KEYS, "step"], how="left") if len(own) else points
    return points


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

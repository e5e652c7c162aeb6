"""How diagnostics rank pairs: Spearman's correlation with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from entangle.analysis.predictions import is_scored
from entangle.analysis.summary import derived

COLUMNS = ("first", "second", "pairs", "rho", "low", "high")


def rank_correlation(first: pd.Series, second: pd.Series, level: float = 0.95) -> dict[str, float]:
    """Spearman's rho of two columns over the rows where both are finite: {pairs, rho, low, high}.

    The interval is Fisher's, tanh(atanh rho -+ z sqrt((1 + rho^2 / 2) / (n - 3))), with the variance of Bonett and
    Wright (Psychometrika 65, 2000). NaN where it isn't defined: fewer than 4 rows, or a column that is constant.
    """
    both = pd.DataFrame({"a": first, "b": second}).replace([np.inf, -np.inf], np.nan).dropna()
    count = len(both)
    unknown = {"pairs": count, "rho": np.nan, "low": np.nan, "high": np.nan}
    if count < 4 or both["a"].nunique() == 1 or both["b"].nunique() == 1:
        return unknown
    rho = float(np.clip(both["a"].rank().corr(both["b"].rank()), -1.0, 1.0))
    if abs(rho) == 1.0:
        return {"pairs": count, "rho": rho, "low": rho, "high": rho}
    width = norm.ppf((1 + level) / 2) * np.sqrt((1 + rho**2 / 2) / (count - 3))
    low, high = np.tanh([np.arctanh(rho) - width, np.arctanh(rho) + width])
    return {"pairs": count, "rho": rho, "low": float(low), "high": float(high)}


def rank_correlations(
    rows: pd.DataFrame, diagnostics: Sequence[str], geometry: Sequence[str] = ()
) -> pd.DataFrame:
    """Rank correlations of diagnostics with the geometry, and with each other.

    Args:
        rows: one row per pair.
        diagnostics: columns of `rows`.
        geometry: columns of `rows` that every diagnostic is set against.

    Returns:
        One row per couple of columns: first, second, pairs, rho, low, high.
    """
    couples = [(d, g) for d in diagnostics for g in geometry if d != g] + list(combinations(diagnostics, 2))
    found = [{"first": a, "second": b, **rank_correlation(rows[a], rows[b])} for a, b in couples]
    return pd.DataFrame(found, columns=pd.Index(COLUMNS))


def summarise_diagnostics(
    pairs: pd.DataFrame, predictions: pd.DataFrame, columns: Sequence[str]
) -> dict[str, Any]:
    """Rank correlations of a probe's diagnostics, for its summary.

    They are set against the geometry that people read (`entangle.analysis.summary.derived`) and against
    `change_chosen`, the predicted change of the chosen log-prob under the run's first loss.

    Args:
        pairs: rows of a run folder.
        predictions: rows of its predictions.
        columns: the diagnostics' columns.

    Returns:
        {"columns", "geometry", "loss", "correlations": [{first, second, pairs, rho, low, high}, ...]}.
    """
    scored = pairs[is_scored(pairs)]
    rows = derived(scored)
    geometry = [str(name) for name in rows if name not in columns]
    loss = None if predictions.empty else str(predictions["loss"].iloc[0])
    if loss is not None:
        changes = predictions[predictions["loss"] == loss].set_index("index")["change_chosen"]
        rows["change_chosen"] = scored["index"].map(changes)
        geometry.append("change_chosen")
    rows = rows.assign(**{name: scored[name] for name in columns})
    found = rank_correlations(rows, columns, geometry)
    return {
        "columns": list(columns), "geometry": geometry, "loss": loss, "correlations": found.to_dict("records"),
    }  # fmt: skip

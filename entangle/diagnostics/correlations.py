"""How diagnostics rank pairs: their rank correlations with the geometry and with each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pandas as pd

from entangle.analysis.predictions import is_scored
from entangle.analysis.statistics import rank_correlation
from entangle.analysis.summary import derived

COLUMNS = ("first", "second", "pairs", "rho", "low", "high")


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
    facts = {"columns": list(columns), "geometry": geometry, "loss": loss}
    return facts | {"correlations": found.to_dict("records")}

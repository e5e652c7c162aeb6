"""The aggregates of a probe, recomputed from its rows and from nothing else.

Three of four pairs are ideal:

    >>> rows = pd.DataFrame({"loss": "dpo", "regime": ["ideal", "ideal", "ideal", "both_down"]})
    >>> found = regime_shares(rows)["dpo"]["ideal"]
    >>> found["count"], round(found["low"], 2), round(found["high"], 2)
    (3, 0.3, 0.95)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from entangle.analysis.predictions import FLAGS, is_scored
from entangle.analysis.regimes import REGIMES
from entangle.analysis.statistics import quantiles, wilson


def derived(pairs: pd.DataFrame) -> pd.DataFrame:
    """Quantities of a pair's geometry that people read, by column of the rows.

    cosine = c / sqrt(AB); norm_ratio r* = |g_l| / |g_w|; ratio_chosen = c / A and ratio_rejected = c / B (DPO is
    ideal iff both are below 1); length_ratio = rejected tokens / chosen tokens.
    """
    return pd.DataFrame(
        {
            "cosine": pairs["cosine"],
            "norm_ratio": np.sqrt(pairs["sq_rejected"] / pairs["sq_chosen"]),
            "ratio_chosen": pairs["inner"] / pairs["sq_chosen"],
            "ratio_rejected": pairs["inner"] / pairs["sq_rejected"],
            "length_ratio": pairs["length_rejected"] / pairs["length_chosen"],
        }
    )


def summarise(pairs: pd.DataFrame, predictions: pd.DataFrame, group_by: str | None = None) -> dict[str, Any]:
    """Counts, regime shares per loss with intervals, quantiles, and regime shares per group.

    Args:
        pairs: rows of a run folder.
        predictions: rows of its predictions.
        group_by: column of `pairs` to break the shares down by; ignored where it isn't there.
    """
    scored = pairs[is_scored(pairs)]
    summary: dict[str, Any] = {
        "pairs": {"total": len(pairs), "scored": len(scored)}
        | {flag: int(pairs[flag].sum()) for flag in FLAGS},
        "regimes": regime_shares(predictions),
        "incentive_ratio": _incentive_ratios(predictions),
        "quantiles": {str(name): quantiles(column) for name, column in derived(scored).items()},
    }
    if group_by and group_by in pairs:
        summary["groups"] = {
            "column": group_by,
            "values": {
                str(value): {
                    "pairs": len(rows),
                    "cosine": float(rows["cosine"].median()),
                    "band": [float(rows["band_lower"].median()), float(rows["band_upper"].median())],
                    "regimes": regime_shares(predictions[predictions["index"].isin(rows["index"])]),
                }
                for value, rows in scored.groupby(group_by, sort=False)
            },
        }
    return summary


def regime_shares(predictions: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """Loss -> regime -> share of pairs with its interval."""
    codes, losses = pd.factorize(predictions["loss"])
    regimes = pd.Index(list(map(str, REGIMES))).get_indexer(pd.Index(predictions["regime"].astype(str)))
    counts = np.zeros((len(losses), len(REGIMES)), dtype=int)
    np.add.at(counts, (codes, regimes), 1)
    totals = counts.sum(1, keepdims=True).repeat(len(REGIMES), 1)
    columns = (counts, counts / totals, *wilson(counts, totals))
    numbers = np.stack([column.astype(object) for column in columns], -1)
    return {
        str(loss): {
            str(regime): dict(zip(("count", "share", "low", "high"), numbers[i, k], strict=True))
            for k, regime in enumerate(REGIMES)
        }
        for i, loss in enumerate(losses)
    }


def _incentive_ratios(predictions: pd.DataFrame) -> dict[str, float]:
    """Median of rho = d_w / d_l per loss; infinite where the rejected response has no incentive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = predictions["incentive_chosen"] / predictions["incentive_rejected"]
    return {str(loss): float(rows.median()) for loss, rows in ratios.groupby(predictions["loss"], sort=False)}

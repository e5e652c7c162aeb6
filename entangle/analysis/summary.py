"""The aggregates of a probe, recomputed from its rows and from nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from entangle.analysis.predictions import FLAGS, is_scored
from entangle.analysis.regimes import REGIMES

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def share(count: int, total: int) -> dict[str, float]:
    """A share of pairs with its 95 % Wilson interval: {count, share, low, high}; NaN where total is 0."""
    if total == 0:
        return {"count": 0, "share": float("nan"), "low": float("nan"), "high": float("nan")}
    low, high = wilson(np.array(count), np.array(total))
    return {"count": count, "share": count / total, "low": float(low), "high": float(high)}


def wilson(
    counts: np.ndarray, totals: np.ndarray, z: float = 1.959963984540054
) -> tuple[np.ndarray, np.ndarray]:
    """95 % Wilson intervals of many shares at once: (low, high)."""
    shares, spread = counts / totals, z * z / totals
    centre = shares + spread / 2
    half = np.sqrt(spread * (shares * (1 - shares) + spread / 4))
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return np.where(counts == 0, 0.0, low), np.where(counts == totals, 1.0, high)


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
        "quantiles": {
            name: {
                f"{q:g}": float(value)
                for q, value in zip(QUANTILES, column.quantile(list(QUANTILES)), strict=True)
            }
            for name, column in derived(scored).items()
        },
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
    cells = np.stack([column.astype(object) for column in columns], -1)
    return {
        str(loss): {
            str(regime): dict(zip(("count", "share", "low", "high"), cells[i, k], strict=True))
            for k, regime in enumerate(REGIMES)
        }
        for i, loss in enumerate(losses)
    }


def _incentive_ratios(predictions: pd.DataFrame) -> dict[str, float]:
    """Median of rho = d_w / d_l per loss; infinite where nothing pushes the rejected response."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = predictions["incentive_chosen"] / predictions["incentive_rejected"]
    return {str(loss): float(rows.median()) for loss, rows in ratios.groupby(predictions["loss"], sort=False)}

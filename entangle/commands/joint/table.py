"""The table of a joint run, one row per prompt, and its aggregates: pure functions of the kept rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from entangle.analysis.statistics import Array, bootstrap, mean_and_error, quantiles, rank_correlation, share
from entangle.commands.joint.measure import (
    RFT_STATES,
    SOURCES,
    STATES,
    VERDICTS,
    best_frame,
    pair_columns,
    pair_frame,
    pair_state,
    reward_products,
    rft_state,
    shared_columns,
    verdict,
)
from entangle.commands.rft.run import prompt_rows
from entangle.measure.prompts import measured_rows
from entangle.rewards.signals import Setting
from entangle.rewards.summary import Thresholds, gradient_summary, prevalence
from losses import PreferenceLoss

RANKED = {
    "cosine_and_std": ("pair_cosine", "reward_std"),
    "best_cosine_and_std": ("best_cosine", "reward_std"),
    "effect_and_std": ("pair_effect", "reward_std"),
    "distances": ("pair_distance", "answer_distance"),
    "norms": ("pair_grad_norm", "grad_norm"),
    "signals": ("pair_signal", "rft_signal"),
}
"""Rank correlations over the prompts, by name. The first answers whether entangled pairs are the low-std prompts:
then it is negative."""

DISTRIBUTIONS = (
    "pair_signal",
    "best_signal",
    "online_signal",
    "online_yield",
    "rft_signal",
    "pair_cosine",
    "best_cosine",
    "pair_distance",
    "best_distance",
    "answer_distance",
    "pair_grad_norm",
    "best_grad_norm",
    "pair_margin",
    "reward_mean",
    "reward_std",
    "pair_reward_cosine",
)
"""Columns whose quantiles the summary holds."""


def joint_table(
    rows: pd.DataFrame, loss: PreferenceLoss, setting: Setting, resolution: float
) -> pd.DataFrame:
    """All numbers of every prompt: RFT's as in `entangle rft`, the pairs' under `pair_` and `best_`.

    Prompts without numbers keep their row.
    """
    table, used = prompt_rows(rows, setting), measured_rows(rows)
    if used.empty:
        return table
    for source, frame in zip(SOURCES, (pair_frame(used), best_frame(used)), strict=True):
        columns = pair_columns(frame, loss, resolution) if len(frame) else _no_pairs(used, loss, resolution)
        names = {name: f"{source}_{name}" for name in columns if name != "index"}
        table = table.merge(columns.rename(columns=names), on="index", how="left")
    shared = [shared_columns(row, loss) for row in used.to_dict("records")]
    return reward_products(table.merge(pd.DataFrame(shared), on="index", how="left"))


def _no_pairs(used: pd.DataFrame, loss: PreferenceLoss, resolution: float) -> pd.DataFrame:
    """The columns of `best` where every prompt's rewards tie: none of its rows."""
    columns = pair_columns(pair_frame(used), loss, resolution).iloc[:0]
    return columns.assign(chosen_answer=[], rejected_answer=[], reward_gap=[])


def with_states(table: pd.DataFrame, thresholds: Thresholds, std_share: float, signal: float) -> pd.DataFrame:
    """Measured rows with rft_signal, pair_state, best_state, rft_state and verdict.

    rft_signal is the std over the half-range of the rewards; where that isn't known, over what the threshold
    takes in its place (`Thresholds.choose`).
    """
    records = table.to_dict("records")
    table = table.assign(rft_signal=table["reward_std"] * std_share / thresholds.std)
    for source in SOURCES:
        pairs = ({str(k).removeprefix(f"{source}_"): v for k, v in row.items()} for row in records)
        table[f"{source}_state"] = [pair_state(pair, signal) for pair in pairs]
    table["rft_state"] = [rft_state({str(k): v for k, v in row.items()}, thresholds) for row in records]
    both = zip(table["pair_state"], table["rft_state"], strict=True)
    return table.assign(verdict=[verdict(pair, rft) for pair, rft in both])


def summarise_joint(prompts: pd.DataFrame, thresholds: Thresholds) -> dict[str, Any]:
    """Aggregates of measured rows that have their states."""
    lost_pair, lost_rft = prompts["pair_state"] != "clear", prompts["rft_state"] != "clear"
    cells = prompts.groupby(["pair_state", "rft_state"]).size()
    online = prompts[["online_signal", "rft_signal"]].dropna()
    return {
        "states": {
            name: {state: share(int((prompts[column] == state).sum()), len(prompts)) for state in states}
            for name, column, states in (
                ("pair", "pair_state", STATES),
                ("best", "best_state", STATES),
                ("rft", "rft_state", RFT_STATES),
            )
        },
        "verdicts": {name: share(int((prompts["verdict"] == name).sum()), len(prompts)) for name in VERDICTS},
        "neither_if_independent": float(lost_pair.mean() * lost_rft.mean()),
        "reasons": {
            pair: {rft: int(cells.get((pair, rft), 0)) for rft in RFT_STATES}
            for pair in STATES
            if pair != "tied"
        },
        "prevalence": prevalence(prompts, thresholds),
        "rank_correlations": {
            name: rank_correlation(prompts[first], prompts[second])
            for name, (first, second) in RANKED.items()
        },
        "angles": angles(prompts),
        "gradient": gradient_summary(prompts),
        "online": {"prompts": len(online), "yield": float(prompts["online_yield"].mean())},
        "reward_step": {
            name: _mean(prompts[f"reward_change_{name}"].to_numpy()) for name in ("chosen", "rejected")
        },
        "quantiles": {name: quantiles(prompts[name]) for name in DISTRIBUTIONS},
    }


def angles(prompts: pd.DataFrame) -> dict[str, Any]:
    """Between the preference step and the expected reward gradient, for the data set's and for sampled pairs.

    `cosine`: sum <d, grad V> / sqrt(sum |d|^2 sum ||grad V||^2) over prompts, every sum of unbiased estimates,
    with a bootstrap interval over prompts: the cosine of the two steps if each prompt had parameters of its
    own. NaN where a sum of squares isn't above 0. `product`: mean of <d, grad V>; `positive`: share of prompts
    where its estimate is above 0 (noise draws it towards a half).
    """
    squares = {"pair": prompts["pair_grad_norm"] ** 2, "online": prompts["online_sq"]}
    found = {}
    for name, product in {"pair": "pair_reward_product", "online": "online_product"}.items():
        columns = pd.DataFrame(
            {"ab": prompts[product], "aa": squares[name], "bb": prompts["grad_sq"]}
        ).dropna()
        values = columns.to_numpy()
        low, high = bootstrap(_cosine_of_columns, *values.T)
        positive = share(int((columns["ab"] > 0).sum()), len(columns))
        found[name] = {"cosine": float(pooled_cosine(values.sum(0))), "low": low, "high": high} | {
            "product": _mean(values[:, 0]),
            "positive": positive,
        }
    return found


def pooled_cosine(sums: Array) -> Array:
    """Sums `(..., 3)` of <a, b>, |a|^2 and |b|^2 -> <a, b> / (|a| |b|); NaN where a square isn't above 0."""
    product, first, second = np.moveaxis(sums, -1, 0)
    known = (first > 0) & (second > 0)
    return np.where(known, product, math.nan) / np.sqrt(np.where(known, first * second, 1.0))


def _cosine_of_columns(product: Array, first: Array, second: Array, axis: int = -1) -> Array:
    """`pooled_cosine` of prompts along an axis."""
    return pooled_cosine(np.stack([column.sum(axis) for column in (product, first, second)], -1))


def _mean(values: Array) -> dict[str, float]:
    """A mean over prompts with its standard error."""
    return dict(zip(("mean", "error"), mean_and_error(values), strict=True))

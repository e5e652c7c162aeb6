"""What set.json holds: the set's block with intervals, what each loss does to it, and both read back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from entangle.analysis.jackknife import Estimate
from entangle.analysis.regimes import Regime
from entangle.analysis.sets import GramSums, SetGeometry, SetMove, by_kind
from entangle.measure.modules import describe_modules
from entangle.measure.sets import Grouping
from entangle.scores.sums import SumGram

SET_DETAILS = ("sums", "layers", "kinds")
"""Parts of set.json that the summary leaves out."""


def set_content(
    grams: Mapping[str, SumGram], grouping: Grouping, predictions: pd.DataFrame, metric: str
) -> dict[str, Any]:
    """The set's block, what each loss does to it, the block of kinds, and the block by layer, for set.json.

    Args:
        grams: products of group sums by module.
        grouping: of the pairs.
        predictions: rows of the run's predictions: incentives per pair and loss.
        metric: name of the optimiser's metric.
    """
    total = _added(grams.values())
    geometry = SetGeometry.from_sums(total, grouping.kinds)
    content = {
        **brief_content(grams, grouping, predictions, metric),
        "epoch": block_of(geometry.epoch()) | {"losses": moves_of(geometry.epoch(), predictions)},
        "layers": {
            name: block_of(SetGeometry.from_sums(gram, grouping.kinds)) for name, gram in _by_layer(grams)
        },
        "sums": {
            "kinds": grouping.kinds,
            **{
                name: getattr(total, name).tolist()
                for name in ("products", "own", "pairs", "squares", "prompts")
            },
        },
    }
    if grouping.column:
        content["kinds"] = {
            "column": grouping.column,
            "block": [
                {"of": of, "by": by} | block_of(found) | {"losses": moves_of(found, predictions)}
                for (of, by), found in by_kind(total, grouping.kinds).items()
            ],
        }
    return content


def brief_content(
    grams: Mapping[str, SumGram], grouping: Grouping, predictions: pd.DataFrame, metric: str
) -> dict[str, Any]:
    """The set's block and what each loss does to it, all that a sentence needs; arguments as in `set_content`."""
    geometry = SetGeometry.from_sums(_added(grams.values()), grouping.kinds)
    return {
        "metric": metric,
        "pairs": geometry.pairs,
        "prompts": geometry.prompts,
        "groups": len(grouping.kinds),
        **block_of(geometry),
        "losses": moves_of(geometry, predictions),
    }


def geometry_of_content(content: Mapping[str, Any]) -> SetGeometry:
    """The set's geometry from set.json: other losses are judged without the model."""
    return SetGeometry.from_sums(_sums_of(content), tuple(content["sums"]["kinds"]))


def content_under(content: Mapping[str, Any], predictions: pd.DataFrame) -> dict[str, Any]:
    """What `set_content` would give under other losses: the same block, sums and layers, other moves.

    Args:
        content: of the same pairs, from set.json.
        predictions: rows of predictions of these losses.
    """
    sums, kinds = _sums_of(content), tuple(content["sums"]["kinds"])
    geometry = SetGeometry.from_sums(sums, kinds)
    found = dict(content) | {"losses": moves_of(geometry, predictions)}
    found["epoch"] = dict(content["epoch"]) | {"losses": moves_of(geometry.epoch(), predictions)}
    if "kinds" in content:
        between = by_kind(sums, kinds)
        found["kinds"] = dict(content["kinds"]) | {
            "block": [
                dict(part) | {"losses": moves_of(between[part["of"], part["by"]], predictions)}
                for part in content["kinds"]["block"]
            ]
        }
    return found


def _sums_of(content: Mapping[str, Any]) -> GramSums:
    """Products of group sums from set.json, in which null stands for NaN."""
    types = {
        "products": "float64",
        "own": "float64",
        "pairs": "int64",
        "squares": "int64",
        "prompts": "int64",
    }
    return GramSums(
        **{
            name: torch.from_numpy(np.array(content["sums"][name], dtype=kind))
            for name, kind in types.items()
        }
    )


def block_of(geometry: SetGeometry) -> dict[str, Any]:
    """U_ww, U_wl, U_ll, cosine, norm ratio and band with intervals, and the own terms."""
    lower, upper = geometry.band
    own = geometry.own
    return {
        "sq_chosen": asdict(geometry.sq_chosen),
        "inner": asdict(geometry.inner),
        "sq_rejected": asdict(geometry.sq_rejected),
        "own": {"sq_chosen": float(own[0, 0]), "inner": float(own[0, 1]), "sq_rejected": float(own[1, 1])},
        "cosine": asdict(geometry.cosine),
        "may_be_parallel": geometry.may_be_parallel,
        "norm_ratio": asdict(geometry.norm_ratio),
        "band": [asdict(lower), asdict(upper)],
    }


def moves_of(geometry: SetGeometry, predictions: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """By loss: what its mean incentives do to the mean log-probs, and the drift."""
    found = {}
    for loss, rows in predictions.groupby("loss", sort=False):
        chosen, rejected = rows["incentive_chosen"], rows["incentive_rejected"]
        move = geometry.move(float(chosen.mean()), float(rejected.mean()))
        spread = max(float(chosen.std(ddof=0)), float(rejected.std(ddof=0)))
        is_exact = spread <= 1e-6 * max(abs(float(chosen.mean())), abs(float(rejected.mean())))
        found[str(loss)] = move_content(move) | {
            "incentive_chosen": float(chosen.mean()),
            "incentive_rejected": float(rejected.mean()),
            "is_exact": is_exact,
        }
    return found


def move_content(move: SetMove) -> dict[str, Any]:
    """A move as plain values."""
    numbers = {name: asdict(getattr(move, name)) for name in ("chosen", "rejected", "margin", "drift")}
    return numbers | {"regime": str(move.regime), "is_certain": move.is_certain}


def move_of(content: Mapping[str, Any]) -> SetMove:
    """A move from its plain values."""
    numbers = {name: estimate_of(content[name]) for name in ("chosen", "rejected", "margin", "drift")}
    return SetMove(**numbers, regime=Regime(content["regime"]), is_certain=content["is_certain"])


def estimate_of(content: Mapping[str, Any]) -> Estimate:
    """An estimate from its plain values, in which null stands for what isn't finite."""
    low, high = content["low"], content["high"]
    return Estimate(
        value=float("nan") if content["value"] is None else content["value"],
        low=float("-inf") if low is None else low,
        high=float("inf") if high is None else high,
        has_meaning=content["has_meaning"],
        pairs_needed=content["pairs_needed"],
    )


def _added(grams: Any) -> SumGram:
    first, *rest = grams
    products, own = first.products.clone(), first.own.clone()
    for gram in rest:
        products += gram.products
        own += gram.own
    return replace(first, products=products, own=own)


def _by_layer(grams: Mapping[str, SumGram]) -> list[tuple[str, SumGram]]:
    """Products by layer; what is outside the layers under its kind."""
    names = describe_modules(list(grams))
    parts: dict[str, list[SumGram]] = defaultdict(list)
    for name, layer, kind in zip(names["module"], names["layer"], names["kind"], strict=True):
        parts[str(kind) if pd.isna(layer) else str(layer)].append(grams[name])
    return [(name, _added(found)) for name, found in parts.items()]

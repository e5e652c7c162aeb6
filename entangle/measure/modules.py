"""Where in a model the entanglement lives: Gram blocks of every module, and their sums by layer and by kind.

A pair's A, B, c and both gaps are sums over parameters, so a module's are theirs alone and the modules' sum to the
pair's. LoRA's A and B are two modules.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from entangle.analysis.geometry import GEOMETRY_COLUMNS
from entangle.analysis.predictions import is_scored
from entangle.analysis.statistics import share
from entangle.scores import PairScores

WRAPPERS = {"base_layer", "modules_to_save", "original_module"}
"""Parts of a module's name that PEFT puts between a layer and its parameters."""

QUANTILES = {"low": 0.05, "cosine": 0.5, "high": 0.95}


def module_rows(indices: Sequence[int], scores: PairScores) -> pd.DataFrame:
    """One row per pair and module.

    Columns: index, module (its name), layer (its number; missing outside the layers), kind (see `describe_modules`),
    sq_chosen, sq_rejected, inner, gap_chosen, gap_rejected, cosine (of the module's two scores), share (of the pair's
    inner product, signed: a pair's shares sum to 1).

    Args:
        indices: the pairs' rows in the data set, in the batch's order.
        scores: of that batch, with modules.

    Raises:
        ValueError: `scores` has no modules.
    """
    if scores.modules is None:
        raise ValueError("module_rows needs scores by module: engine.pairs(batch, modules=True).")
    names = describe_modules(list(scores.modules))
    blocks = scores.modules.values()
    columns = {
        name: np.stack([getattr(block, name).numpy() for block in blocks], 1).ravel()
        for name in (*GEOMETRY_COLUMNS, "cosine")
    }  # (n * modules,), a pair's modules side by side
    inner = np.repeat(scores.geometry.inner.numpy(), len(names))
    with np.errstate(divide="ignore", invalid="ignore"):
        columns["share"] = columns["inner"] / inner
    described = pd.concat([names] * len(indices), ignore_index=True)
    return pd.concat(
        [pd.DataFrame({"index": np.repeat(indices, len(names))}), described, pd.DataFrame(columns)], axis=1
    )


def describe_modules(names: Sequence[str]) -> pd.DataFrame:
    """Layer number and kind of modules by name: columns module, layer, kind.

    The layer is the first number in a name. The kind is the last part of what follows it, with LoRA's factor
    (`q_proj.lora_A`); with its parent where two kinds have the same last part (GPT-2's `attn.c_proj` and `mlp.c_proj`).
    """
    parts = [_take_apart(name) for name in names]
    homonyms: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for _, path, _ in parts:
        homonyms[path[-1]].add(path)
    kinds = [
        ".".join((*path[-1 if len(homonyms[path[-1]]) == 1 else -2 :], *factor)) for _, path, factor in parts
    ]
    layers = pd.array([layer for layer, _, _ in parts], dtype="Int64")
    categories = {"module": pd.Categorical(list(names)), "kind": pd.Categorical(kinds)}
    return pd.DataFrame(categories | {"layer": layers})[["module", "layer", "kind"]]


def _take_apart(name: str) -> tuple[int | None, tuple[str, ...], tuple[str, ...]]:
    """(layer, path inside the layer, LoRA's factor) of a module's name."""
    base, *adapter = re.split(r"\.(?=lora_)", name, maxsplit=1)
    parts = base.split(".")
    if "modules_to_save" in parts:  # and what follows is the adapter's name
        parts = parts[: parts.index("modules_to_save")]
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    inside = parts[numbers[0] + 1 :] if numbers else parts
    path = tuple(part for part in inside if not part.isdecimal() and part not in WRAPPERS)
    factor = (adapter[0].split(".")[0],) if adapter else ()
    return int(parts[numbers[0]]) if numbers else None, path or (base,), factor


def summarise_modules(modules: pd.DataFrame, pairs: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """What layers and kinds of modules contribute, over the scored pairs: {"layers": {...}, "kinds": {...}}.

    For each: `cosine` with `low` and `high` (median, 5 % and 95 % quantile over pairs of c_m / sqrt(A_m B_m), the
    cosine if nothing else were trained), `cosine_part` (mean of c_m / sqrt(A B); the parts sum to the mean cosine),
    `inner_share` (that part of the mean cosine), `norm_share` (mean of A_m / A and B_m / B), and `chosen_falls` (share
    of pairs with A_m < c_m, whose chosen log-prob equal incentives on both responses would lower if nothing else were
    trained).
    What is outside the layers stands under its kind.

    Args:
        modules: rows of `module_rows`.
        pairs: the run's rows of pairs.
    """
    whole = pairs[is_scored(pairs)].set_index("index")
    rows = modules[modules["index"].isin(whole.index)]
    layers = rows["layer"].astype("string").fillna(rows["kind"].astype("string"))
    return {
        "layers": {str(name): _summarise(rows[layers == name], whole) for name in _in_order(rows, layers)},
        "kinds": {str(name): _summarise(rows[rows["kind"] == name], whole) for name in rows["kind"].unique()},
    }


def _in_order(rows: pd.DataFrame, layers: pd.Series) -> list[str]:
    """Places as the model has them: numbered layers by number, where the first one of them stands."""
    names = list(dict.fromkeys(layers))
    numbered = sorted((name for name in names if name.isdecimal()), key=int)
    start = next((i for i, name in enumerate(names) if name.isdecimal()), 0)
    rest = [name for name in names if not name.isdecimal()]
    return rest[:start] + numbered + rest[start:]


def _summarise(part: pd.DataFrame, whole: pd.DataFrame) -> dict[str, Any]:
    own = part.groupby("index")[list(GEOMETRY_COLUMNS)].sum()
    all_of = whole.loc[own.index]
    scale = np.sqrt(all_of["sq_chosen"] * all_of["sq_rejected"])
    cosine = (own["inner"] / np.sqrt(own["sq_chosen"] * own["sq_rejected"])).quantile(
        list(QUANTILES.values())
    )
    cosine_part = float((own["inner"] / scale).mean())
    norms = own["sq_chosen"] / all_of["sq_chosen"] + own["sq_rejected"] / all_of["sq_rejected"]
    return dict(zip(QUANTILES, map(float, cosine), strict=True)) | {
        "cosine_part": cosine_part,
        "inner_share": cosine_part / float(all_of["cosine"].mean()),
        "norm_share": float(norms.mean() / 2),
        "chosen_falls": share(int((own["gap_chosen"] < 0).sum()), len(own)),
    }

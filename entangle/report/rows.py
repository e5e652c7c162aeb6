"""The pairs of a run as columns for the page's script: compact, cut to a size, nothing of it markup."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from entangle.analysis.geometry import GEOMETRY_COLUMNS, SIDES
from entangle.analysis.predictions import FLAGS
from entangle.analysis.regimes import REGIMES
from entangle.analysis.summary import derived
from entangle.analysis.verdict import worst_pairs
from entangle.analysis.wording import sentence_codes
from entangle.report.source import Source

BASE_COLUMNS = (
    "index",
    "prompt_hash",
    "prompt_length",
    *GEOMETRY_COLUMNS,
    "logps_chosen",
    "logps_rejected",
    "ref_logps_chosen",
    "ref_logps_rejected",
    "cosine",
    "band_lower",
    "band_upper",
    "length_chosen",
    "length_rejected",
    *FLAGS,
)
"""Columns that every run has; a number in any other column is shown too."""

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("index", "pair", ""),
    ("regime", "regime", "regime"),
    ("cosine", "cosine", "cosine"),
    ("norm_ratio", "norm ratio", "norm_ratio"),
    ("band_lower", "band from", "band"),
    ("band_upper", "band to", "band"),
    ("change_chosen", "chosen changes", "change"),
    ("change_rejected", "rejected changes", "change"),
    ("length_chosen", "chosen tokens", "length"),
    ("length_rejected", "rejected tokens", "length"),
)
"""Columns of the table of pairs: name, head, key of the definition."""

WORST = 20
"""Worst pairs per loss that are kept with their whole texts."""

FEWEST = 5
"""Where fewer pairs fall under a loss, those with the least slack are shown too, up to this many."""

KEPT = (
    "band_lower",
    "band_upper",
    "logps_chosen",
    "logps_rejected",
    "length_chosen",
    "length_rejected",
    "prompt_length",
)
"""Columns that the page keeps as they are."""

TOKEN_PAIRS = 200
"""Pairs taken apart into tokens that are kept, at most; the worst ones first."""

INFINITE = 1e308
"""Stands for infinity, which JSON can't write."""

EXTRA_COLUMNS = 20
"""Columns of the data set or of diagnostics that the table shows, at most."""


def extra_columns(pairs: pd.DataFrame) -> list[str]:
    """Numeric columns beyond those that every run has: diagnostics, and what the data set brought along."""
    return [
        str(name)
        for name in pairs
        if name not in BASE_COLUMNS
        and pd.api.types.is_numeric_dtype(pairs[name])
        and pairs[name].nunique() > 1
    ][:EXTRA_COLUMNS]


def pair_rows(source: Source, budget: int) -> dict[str, Any]:
    """Columns of the scored pairs, of the losses, and the texts, in at most about `budget` bytes of JSON.

    Too many pairs are sampled (the worst ones stay); texts are cut before that, those of the worst pairs last.
    """
    assert source.pairs is not None
    scored = source.scored.reset_index(drop=True)
    falling = {loss: harmed(source, loss) for loss in source.losses}
    worst = {loss: [*found, *_tightest(source, loss, found)] for loss, found in falling.items()}
    wanted = sorted({index for indices in worst.values() for index in indices})
    per_pair = 110 + 34 * len(source.losses)
    kept = _sample(scored, wanted, max(1, int(0.65 * budget / per_pair)))
    table = {
        "count": len(kept),
        "scored": len(scored),
        "total": len(source.pairs),
        "columns": _columns(kept, extra_columns(scored)),
        "losses": [_loss(source, loss, kept) for loss in source.losses],
    }
    places = {index: place for place, index in enumerate(kept["index"])}
    for entry, indices in zip(table["losses"], worst.values(), strict=True):
        entry["worst"] = [places[index] for index in indices]
        entry["falling"] = len(falling[entry["label"]])
    spent = len(json.dumps(table))
    table["texts"], table["cut"] = _texts(source, kept, set(wanted), budget - spent)
    table["tokens"] = {} if source.tokens is None else _tokens(source.tokens, wanted)
    return table


def harmed(source: Source, loss: str) -> list[int]:
    """The pairs whose chosen falls most: over an epoch where that was measured, else by a step on each alone."""
    epoch = epoch_rows(source, loss)
    if epoch is not None:
        rows = epoch[epoch["epoch_chosen"] < 0].nsmallest(WORST, "epoch_chosen")
        return rows.loc[rows["index"].isin(source.scored["index"]), "index"].tolist()
    assert source.predictions is not None
    return worst_pairs(source.scored, source.predictions, loss, WORST)["index"].tolist()


def epoch_rows(source: Source, loss: str) -> pd.DataFrame | None:
    """What an epoch does to each pair under a loss; None where `entangle across` hasn't measured it."""
    if source.epochs is None or loss not in set(source.epochs["loss"]):
        return None
    return source.epochs[source.epochs["loss"] == loss]


def _tightest(source: Source, loss: str, known: Sequence[int]) -> list[int]:
    """The other pairs with the least slack, as many as `known` is short of `FEWEST`."""
    rest = source.judged(loss).dropna(subset=["slack"])
    rest = rest[~rest["index"].isin(known)]
    return rest.nsmallest(max(0, FEWEST - len(known)), "slack")["index"].tolist()


def _sample(scored: pd.DataFrame, wanted: Sequence[int], limit: int) -> pd.DataFrame:
    """At most about `limit` rows, evenly drawn, with the wanted ones among them; in dataset order."""
    if len(scored) <= limit:
        return scored
    drawn = scored.sample(limit, random_state=0)
    missing = scored[scored["index"].isin(set(wanted) - set(drawn["index"]))]
    return pd.concat([drawn, missing]).sort_values("index", ignore_index=True)


def _columns(kept: pd.DataFrame, extra: Sequence[str]) -> dict[str, Any]:
    geometry = derived(kept)
    columns: dict[str, Any] = {"index": kept["index"].tolist()}
    for name in ("cosine", "norm_ratio", "ratio_chosen", "ratio_rejected"):
        columns[name] = numbers(geometry[name])
    for name in (*KEPT, *extra):
        columns[name] = numbers(kept[name])
    for side in SIDES:
        columns[f"log_ratio_{side}"] = numbers(kept[f"logps_{side}"] - kept[f"ref_logps_{side}"])
    flags = kept[[name for name in FLAGS if name in kept]].astype(bool)
    columns["flags"] = {name: np.flatnonzero(flags[name]).tolist() for name in flags if flags[name].any()}
    if "kind" in kept:
        kinds, names = pd.factorize(kept["kind"].astype(str))
        columns["kind"] = {"names": [str(name) for name in names], "codes": kinds.tolist()}
    return columns


def _loss(source: Source, loss: str, kept: pd.DataFrame) -> dict[str, Any]:
    """One loss on the kept pairs; regimes and sentences as one character per pair."""
    judged = kept[["index"]].merge(source.judged(loss), on="index", how="left")
    codes = {str(regime): str(number) for number, regime in enumerate(REGIMES)}
    ratio = source.summary.get("incentive_ratio", {}).get(loss)
    d_w, d_l = judged["incentive_chosen"], judged["incentive_rejected"]
    return {
        "label": loss,
        "spec": spec_of(loss),
        "rho": INFINITE if ratio is None else ratio,
        "rho_varies": bool((d_w / d_l).round(9).nunique() > 1),
        "regimes": "".join(judged["regime"].astype(str).map(codes)),
        "sentences": "".join(chr(48 + code) for code in sentence_codes(judged)),
        "d_w": numbers(d_w),
        "d_l": numbers(d_l),
        "change_chosen": numbers(judged["change_chosen"]),
        "change_rejected": numbers(judged["change_rejected"]),
        "epochs": _epochs(source, loss, kept, codes),
    }


def _epochs(source: Source, loss: str, kept: pd.DataFrame, codes: dict[str, str]) -> str | None:
    """Regimes over an epoch, a character per pair, `-` where it wasn't measured; None where it was on none."""
    rows = epoch_rows(source, loss)
    if rows is None:
        return None
    found = kept["index"].map(rows.set_index("index")["epoch_regime"].astype(str).map(codes))
    return "".join(found.fillna("-"))


def spec_of(label: str) -> str:
    """A loss's label as options of a command take it.

    >>> spec_of("dpop(beta=0.2, penalty=5)"), spec_of("dpo")
    ('dpop:beta=0.2,penalty=5', 'dpo')
    """
    name, bracket, options = label.partition("(")
    return f"{name}:{options.removesuffix(')').replace(', ', ',')}" if bracket else name


def numbers(values: pd.Series) -> Any:
    """A column with four digits per number; a column of one value is that value."""
    short = _short(values)
    return short[0] if len(short) > 1 and len(set(short)) == 1 and short[0] is not None else short


def _short(values: pd.Series) -> list[float | None]:
    array = np.clip(values.to_numpy(dtype=float), -INFINITE, INFINITE)
    return [None if v != v else int(v) if v == int(v) and abs(v) < 1e6 else float(f"{v:.4g}") for v in array]


def _texts(
    source: Source, kept: pd.DataFrame, whole: set[int], budget: int
) -> tuple[dict[str, list[str]] | None, int | None]:
    """prompt, chosen, rejected of the kept pairs, and the length that they had to be cut to (None: not cut)."""
    if source.texts is None:
        return None, None
    texts = kept[["index"]].merge(source.texts, on="index", how="left")[
        ["index", "prompt", "chosen", "rejected"]
    ]
    texts = texts.fillna("")
    sides = ("prompt", "chosen", "rejected")
    is_whole = texts["index"].isin(whole).to_numpy()
    columns = {side: texts[side].astype(str).tolist() for side in sides}
    sizes = {side: np.array([len(text.encode()) for text in column]) for side, column in columns.items()}
    for limit in (None, 2000, 1000, 500, 250, 120, 60, 0):
        most = np.where(is_whole, WHOLE, np.inf if limit is None else limit)
        if limit != 0 and sum(np.minimum(size, most).sum() for size in sizes.values()) > budget:
            continue  # more than the budget before a character is escaped
        found = {
            side: [_cut(text, WHOLE if keep else limit) for text, keep in zip(column, is_whole, strict=True)]
            for side, column in columns.items()
        }
        if limit == 0 or len(json.dumps(found, ensure_ascii=False).encode()) <= budget:
            return found, limit
    raise AssertionError("the last limit always fits")


WHOLE = 4000
"""Characters of a worst pair's text that are kept, at most."""


def _cut(text: str, limit: int | None) -> str:
    return text if limit is None or len(text) <= limit else text[:limit] + ("…" if limit else "")


def _tokens(tokens: pd.DataFrame, worst: Sequence[int]) -> dict[str, dict[str, dict[str, list[Any]]]]:
    """Pair -> response -> its tokens' texts, shares of c and log-probs, in their order."""
    there = list(dict.fromkeys(tokens["index"]))
    shown = [index for index in worst if index in set(there)] + there
    rows = tokens[tokens["index"].isin(list(dict.fromkeys(shown))[:TOKEN_PAIRS])].sort_values(
        ["index", "position"]
    )
    return {
        str(index): {
            str(side): {
                "text": part["text"].tolist(),
                "share": _short(part["share"]),
                "logp": _short(part["logp"]),
            }
            for side, part in pair.groupby("side")
        }
        for index, pair in rows.groupby("index")
    }

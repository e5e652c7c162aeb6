"""What the callback writes down and logs: rows of steps, and the few numbers of them that a tracker is told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import pandas as pd
from accelerate.utils import gather_object

from entangle.analysis.cross_batch import EFFECTS, live_point, window_geometry
from entangle.analysis.curves import set_row
from entangle.analysis.geometry import GEOMETRY_COLUMNS
from entangle.analysis.ledger import PARTS, cumulate
from entangle.analysis.regimes import REGIMES, predict
from entangle.measure.set_content import move_content
from entangle.runs.folder import as_json
from entangle.runs.shards import StepShards
from entangle.training.live import MicroBatch
from losses import Incentives

MEANS = ("logps_chosen", "logps_rejected", "logps_per_token_chosen", "logps_per_token_rejected")
"""Columns of the probe set that are logged as means over pairs."""


SET_METRICS = {
    "cosine": "cosine",
    "band_low": "low",
    "band_high": "high",
    "rho": "rho",
    "drift": "drift",
    "drift_low": "drift_low",
    "drift_high": "drift_high",
    "change_chosen": "change_chosen",
    "change_rejected": "change_rejected",
    "pairs": "pairs",
}
"""What is logged of the set, by the column (after `set_`) that it comes from."""


class StepRows:
    """Rows that come step by step, from every process, on their way to the log and into shards.

    Args:
        shards: where they are written.
        args: the trainer's arguments.
    """

    def __init__(self, shards: StepShards, args: Any) -> None:
        self.shards = shards
        self._is_shared, self._is_main = args.world_size > 1, args.process_index == 0
        self._own: list[dict[str, Any]] = []
        self._unlogged: list[dict[str, Any]] = []
        self._unwritten: list[dict[str, Any]] = []

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows of this process."""
        self._own += rows

    def collect(self) -> pd.DataFrame:
        """All processes' rows since the last time that this was called; all must call."""
        self._gather()
        new, self._unlogged = self._unlogged, []
        return pd.DataFrame(new)

    def write(self, step: int) -> None:
        """Write the rows since the last time as a shard; all processes must call."""
        self._gather()
        if self._unwritten and self._is_main:
            self.shards.write(step, pd.DataFrame(self._unwritten).sort_values("step", kind="stable"))
        self._unwritten = []

    def _gather(self) -> None:
        new = gather_object(self._own) if self._is_shared else self._own
        self._own = []
        self._unlogged += new
        self._unwritten += new


def live_rows(batch: MicroBatch, number: int, processes: int) -> list[dict[str, Any]]:
    """Rows of a micro-batch: its pairs' log-probs, geometry, incentives and regimes.

    Incentives are those that the step applies: of the mean over the micro-batch, the accumulation and `processes`.

    Args:
        batch: after its backward pass.
        number: of the micro-batch in its step.
        processes: that share the step.
    """
    assert batch.upstream is not None and batch.logps is not None
    geometry = batch.geometry
    chosen, rejected = (batch.upstream.double().cpu() / processes).chunk(2)
    predicted = predict(geometry, Incentives(-chosen, rejected))
    logps, lengths = batch.logps.cpu().chunk(2), batch.scored.sum(1).cpu().chunk(2)
    columns = {name: getattr(geometry, name) for name in GEOMETRY_COLUMNS} | {
        "cosine": geometry.cosine,
        "logps_chosen": logps[0],
        "logps_rejected": logps[1],
        "length_chosen": lengths[0],
        "length_rejected": lengths[1],
        "incentive_chosen": -chosen,
        "incentive_rejected": rejected,
        "change_chosen": predicted.change_chosen,
        "change_rejected": predicted.change_rejected,
    }
    known = (geometry.is_finite).tolist()
    values = {name: value.tolist() for name, value in columns.items()}
    return [
        {"micro_batch": number, "row": i, "pair": key, "known": known[i]}
        | {name: value[i] for name, value in values.items()}
        | {"regime": str(regime) if known[i] else None}
        for i, (key, regime) in enumerate(zip(batch.keys(), predicted.regimes, strict=True))
    ]


def live_metrics(rows: pd.DataFrame) -> dict[str, float]:
    """What a tracker is told about the batches since the last row of the log."""
    if rows.empty:
        return {}
    metrics = {"cosine": float(rows["cosine"].median()), "known": float(rows["known"].mean())}
    return _named("live", metrics | _regime_shares(rows))


def ledger_metrics(rows: pd.DataFrame) -> dict[str, float]:
    """What a tracker is told about the ledger since the last row of the log: sums, as means over pairs."""
    if rows.empty:
        return {}
    sums = cumulate(rows).groupby("side")[["measured", *PARTS]].mean().to_dict("index")
    return _named(
        "ledger", {f"{side}/{part}": nats for side, parts in sums.items() for part, nats in parts.items()}
    )


def probe_metrics(rows: pd.DataFrame) -> dict[str, float]:
    """What a tracker is told about a probe: means of log-probs, median cosine, shares of the regimes."""
    metrics = {name: float(rows[name].mean()) for name in MEANS} | {"cosine": float(rows["cosine"].median())}
    return _named("probe", metrics | _regime_shares(rows))


def set_rows(sets: Mapping[str, Mapping[str, Any]], loss: str | None) -> list[dict[str, Any]]:
    """A probe's set, a row per metric (see `entangle.analysis.curves.set_row`).

    Args:
        sets: by metric.
        loss: the trained loss's label; None where it can't be judged.
    """
    return [set_row(content, loss) for content in sets.values()]


def set_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a tracker is told of the set at a probe: cosine, band, drift with its interval, regime, pairs.

    Names under the optimiser's preconditioner end in `_adamw`. The regime is a 1 at its name.

    Args:
        rows: of `set_rows`.
    """
    metrics: dict[str, float] = {}
    for row in rows:
        ending = "" if row["metric"] == "sgd" else f"_{row['metric']}"
        found = {name: row[f"set_{column}"] for name, column in SET_METRICS.items() if f"set_{column}" in row}
        if "set_regime" in row:
            found |= {str(regime): float(row["set_regime"] == regime) for regime in REGIMES}
        metrics |= {f"{name}{ending}": float(value) for name, value in found.items()}
    return _named("set", {name: value for name, value in metrics.items() if math.isfinite(value)})


def batch_row(step: int, pairs: int, effects: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A step's row of the table `batches`.

    Args:
        step: counts it.
        pairs: of its batch, in this process.
        effects: E, `(2, 2)`.
    """
    return {"step": step, "pairs": pairs} | dict(zip(EFFECTS, chain(*effects), strict=True))


def batch_metrics(rows: pd.DataFrame) -> tuple[dict[str, float], dict[str, Any] | None]:
    """What a tracker is told of the last steps' batches, and what these say of fresh pairs (see `live_verdict`).

    Args:
        rows: step, pairs and products of at least a window's steps.
    """
    geometry = None if rows.empty else window_geometry(rows)
    if geometry is None:
        return {}, None
    numbers = {name: value for name, value in live_point(geometry).items() if math.isfinite(value)}
    move = as_json(move_content(geometry.move(1.0, 1.0)))
    return _named("set", numbers), move | {"pairs": geometry.pairs, "steps": len(geometry.jackknife.sizes)}


def _regime_shares(rows: pd.DataFrame) -> dict[str, float]:
    judged = rows["regime"].dropna()
    return {str(regime): float((judged == regime).mean()) for regime in REGIMES} if len(judged) else {}


def _named(what: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"entangle/{what}/{name}": value for name, value in metrics.items()}

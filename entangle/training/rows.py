"""What the callback writes down and logs: rows of steps, and the few numbers of them that a tracker is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from accelerate.utils import gather_object

from entangle.analysis.geometry import GEOMETRY_COLUMNS
from entangle.analysis.ledger import PARTS, cumulate
from entangle.analysis.regimes import REGIMES, predict
from entangle.runs.shards import StepShards
from entangle.training.live import MicroBatch
from losses import Incentives

MEANS = ("logps_chosen", "logps_rejected", "logps_per_token_chosen", "logps_per_token_rejected")
"""Columns of the probe set that are logged as means over pairs."""


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
        self._all: list[dict[str, Any]] = []

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows of this process."""
        self._own += rows

    def collect(self) -> pd.DataFrame:
        """All processes' rows since the last time; all must call."""
        new = gather_object(self._own) if self._is_shared else self._own
        self._own = []
        self._all += new
        return pd.DataFrame(new)

    def write(self, step: int) -> None:
        """Write the rows since the last time as a shard; all processes must call."""
        self.collect()
        if self._all and self._is_main:
            self.shards.write(step, pd.DataFrame(self._all).sort_values("step", kind="stable"))
        self._all = []


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


def _regime_shares(rows: pd.DataFrame) -> dict[str, float]:
    judged = rows["regime"].dropna()
    return {str(regime): float((judged == regime).mean()) for regime in REGIMES} if len(judged) else {}


def _named(what: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"entangle/{what}/{name}": value for name, value in metrics.items()}

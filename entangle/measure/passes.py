"""A pass over pairs: through the model once, to one row of numbers each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pandas as pd
import torch

from entangle.data import TokenizedPair
from entangle.diagnostics import compute
from entangle.measure.modules import module_rows
from entangle.measure.plan import Plan, is_scorable
from entangle.measure.rows import Columns, Pass, description_of, number_columns, unscored_row
from entangle.models import Policy
from entangle.scores import Engine, Metric
from entangle.scores.summing import PassSums


@dataclass(frozen=True)
class Measurement:
    """What every pass over pairs needs.

    Args:
        policy: the model.
        engine: its scores.
        columns: what is written of every pair.
        modules: whether the scores are wanted by module too.
        metric: the diagonal metric; None is SGD's.
        sums: where scores are added up for the set's block; None where it isn't wanted.
    """

    policy: Policy
    engine: Engine
    columns: Sequence[Columns]
    modules: bool = False
    metric: Metric | None = None
    sums: Summing | None = None


class Summing(Protocol):
    """What adds up the scores of passes (see `entangle.measure.sets.SetSums`)."""

    def of_pass(self, pairs: Sequence[TokenizedPair]) -> PassSums | None:
        """Where the pairs of a pass go; None once sums have been given up."""
        ...

    def give_up(self) -> None:
        """A pass broke off and left a part of itself in the sums."""
        ...


class Measured(NamedTuple):
    """What passes found.

    Args:
        rows: one per pair.
        modules: rows of the pairs' modules, a frame per pass, where these are wanted.
    """

    rows: list[dict[str, Any]]
    modules: list[pd.DataFrame]


def rows_of_shard(
    plan: Plan, number: int, measurement: Measurement, advance: Callable[[int], None]
) -> Measured:
    """The rows of a shard's pairs, and of their modules where asked for; `advance` is told of every pass."""
    rows = [unscored_row(pair) for pair in plan.shards[number] if not is_scorable(pair)]
    modules: list[pd.DataFrame] = []
    advance(len(rows))
    for batch in plan.passes(number):
        scored, parts = _scored_rows(batch, measurement)
        rows += scored
        modules += parts
        advance(len(batch))
    return Measured(rows, modules)


def _scored_rows(batch: list[TokenizedPair], measurement: Measurement) -> Measured:
    """Rows of one pass; a pass that doesn't fit the memory is halved until it does."""
    try:
        return rows_of_pass(batch, measurement)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    if measurement.sums is not None:
        measurement.sums.give_up()
    half = len(batch) // 2
    first, second = _scored_rows(batch[:half], measurement), _scored_rows(batch[half:], measurement)
    return Measured(first.rows + second.rows, first.modules + second.modules)


def rows_of_pass(batch: Sequence[TokenizedPair], measurement: Measurement) -> Measured:
    """The rows of pairs that go through the model together, and of their modules where asked for."""
    rows = measurement.policy.collate(batch)
    sums = None if measurement.sums is None else measurement.sums.of_pass(batch)
    scores = measurement.engine.pairs(rows, modules=measurement.modules, metric=measurement.metric, sums=sums)
    done = Pass(batch, rows, scores, measurement.policy)
    columns = {
        name: value.tolist() for measure in measurement.columns for name, value in measure(done).items()
    }
    described = [
        description_of(pair) | {name: values[i] for name, values in columns.items()}
        for i, pair in enumerate(batch)
    ]
    modules = [module_rows([pair.index for pair in batch], scores)] if measurement.modules else []
    return Measured(described, modules)


def column_functions(diagnostics: Sequence[str]) -> list[Columns]:
    """What is written of every pair: each function adds its columns to the rows."""
    if not diagnostics:
        return [number_columns]
    return [number_columns, lambda done: compute(diagnostics, done.policy, done.rows, done.pairs)]

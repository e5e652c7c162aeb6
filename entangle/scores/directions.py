"""Products of every score with weighted sums of all scores, in two passes: first the sums, then the products.

    <S_a, P T_d>   with   T_d = sum_b weights[d, b] S_b

are the Gram matrix times the weights, for the price of two passes over the rows instead of R of them, or of one where
all scores fit in memory.

    held, sums = HeldScores(engine), Directions()
    for number, batch in enumerate(batches):
        sums.add(held.of(number, batch), weights_of(batch))
    sums = sums.under(metric)
    products = [sums.products(held.of(number, batch)) for number, batch in enumerate(batches)]
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import Tensor

from entangle.scores.base import Engine, Metric
from entangle.scores.gram import MEMORY, cross, row_bytes
from entangle.scores.rows import RowBatch


class HeldScores:
    """Written-out scores of batches, kept for another pass as far as memory allows.

    Args:
        engine: whose scores.
        memory: bytes of scores to keep.
    """

    def __init__(self, engine: Engine, memory: int = MEMORY) -> None:
        self._engine, self._left = engine, memory
        self._kept: dict[Hashable, dict[str, Tensor]] = {}

    def of(self, name: Hashable, batch: RowBatch) -> dict[str, Tensor]:
        """`(rows, parameter's size)` by parameter.

        Args:
            name: what the batch is known by: asked again under this name, kept scores are given back.
            batch: its rows; as many as one pass of the engine can take.
        """
        if name in self._kept:
            return self._kept[name]
        found, size = self._engine.scores(batch), row_bytes(self._engine) * len(batch.input_ids)
        if size <= self._left:
            self._kept[name] = found
            self._left -= size
        return found


class Directions:
    """Weighted sums of scores: T_d = sum_b weights[d, b] S_b, in the scores' precision.

    Args:
        sums: `(D, parameter's size)` by parameter; none yet if left out.
    """

    def __init__(self, sums: Mapping[str, Tensor] | None = None) -> None:
        self.sums = dict(sums or {})

    def add(self, scores: Mapping[str, Tensor], weights: Tensor) -> None:
        """Add the rows of a batch.

        Args:
            scores: of its rows.
            weights: `(D, rows)`.
        """
        self.merge(Directions({name: weights.to(rows) @ rows for name, rows in scores.items()}))

    def merge(self, other: Directions) -> None:
        """Add what was summed elsewhere."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def under(self, metric: Metric | None) -> Directions:
        """P T: whole sums in a metric, to take products with."""
        if metric is None:
            return self
        return Directions({name: value * metric[name].ravel().to(value) for name, value in self.sums.items()})

    def products(self, scores: Mapping[str, Tensor]) -> Tensor:
        """<S_a, T_d> for the rows a of a batch, `(rows, D)` float64."""
        return cross(scores, self.sums)


def directions_at_a_time(engine: Engine, memory: int = MEMORY) -> int:
    """How many directions fit, at least one; more of them take two passes for each block of as many.

    Args:
        engine: the engine; its parameters give the size of a direction.
        memory: bytes that the directions may take.
    """
    return max(1, memory // row_bytes(engine))

"""The Gram matrix of a finished probe's pairs, kept in its run folder: gram.parquet, one row per pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from entangle.analysis.geometry import SIDES
from entangle.data import TokenizedPair
from entangle.measure.across import CrossProducts, Weights
from entangle.measure.plan import Plan
from entangle.models import Policy
from entangle.runs.folder import RunFolder
from entangle.runs.session import Session
from entangle.scores import Engine, Metric
from entangle.scores.directions import directions_at_a_time

GRAM = "gram.parquet"


@dataclass(frozen=True)
class PairGram:
    """K = S P S^T over both responses of N pairs.

    Args:
        products: `(2N, 2N)` float64: chosen rows first, then rejected; nats^2 per unit of squared parameter, or in the
            probe's metric.
        indices: `(N,)`, index of each pair.
    """

    products: Tensor
    indices: tuple[int, ...]

    @classmethod
    def load(cls, run: RunFolder) -> PairGram | None:
        """What `entangle forecast` has kept in a probe's run folder; None: nothing."""
        table = run.table(GRAM)
        return None if table is None else cls.of_rows(table)

    @classmethod
    def of_rows(cls, rows: pd.DataFrame) -> PairGram:
        """From the table that `rows` makes."""
        sides = [np.stack(rows[f"products_{side}"].to_list()) for side in SIDES]
        return cls(torch.from_numpy(np.concatenate(sides)), tuple(rows["index"].tolist()))

    def rows(self) -> pd.DataFrame:
        """A row per pair: index, and products_<side> with all 2N responses."""
        halves = zip(SIDES, self.products.numpy().reshape(2, len(self.indices), -1), strict=True)
        return pd.DataFrame(
            {"index": self.indices} | {f"products_{side}": list(half) for side, half in halves}
        )


def measure_gram(
    session: Session,
    policy: Policy,
    engine: Engine,
    pairs: list[TokenizedPair],
    *,
    metric: Metric | None = None,
    shard_size: int = 64,
    batch_size: int | None = None,
) -> PairGram:
    """All products of the pairs' scores, exact: two passes for each block of responses whose scores fit memory.

    Args:
        session: of the folder that keeps what is finished; its processes share the shards.
        policy: the model.
        engine: its scores.
        pairs: N of them, all scorable.
        metric: the diagonal metric P, None for P = 1.
        shard_size: pairs per shard.
        batch_size: pairs of a pass; by default as many as make 4096 tokens.

    Raises:
        Interrupted: Ctrl-C; the shard at hand is finished.
    """
    indices = [pair.index for pair in pairs]
    n = len(indices)
    each_response = torch.eye(2 * n, dtype=torch.float64).view(2 * n, 2, n)
    products = CrossProducts(
        session=session,
        plan=Plan.make(pairs, shard_size, batch_size, directions_at_a_time(engine) // 4),
        policy=policy,
        engine=engine,
        weights=Weights(each_response, indices),
        metric=metric,
    )
    products.measure()
    by_pair = products.read()  # (N, 2, 2N)
    whole = by_pair.transpose(0, 1).reshape(2 * n, 2 * n)
    return PairGram((whole + whole.T) / 2, tuple(indices))

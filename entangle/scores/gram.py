"""The Gram matrix of more rows than fit one batch: blocks of written-out scores against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from entangle.scores.base import Engine, Metric
from entangle.scores.reduce import dots
from entangle.scores.rows import RowBatch

MEMORY = 2**31
"""Bytes of scores, or of weighted sums of them, that are held at a time."""


def score_gram(
    engine: Engine,
    batches: Sequence[RowBatch],
    *,
    metric: Metric | None = None,
    memory: int = MEMORY,
) -> Tensor:
    """K[a, b] = <S_a, P S_b> over the rows of all batches in their order, `(R, R)` float64.

    As many batches' scores as fit in `memory` are held at a time, and later batches are run against them: one
    pass over all rows if everything fits, else about half as many passes as there are blocks. Exact in any
    case: nothing is projected. Law: independent of how the rows are cut into batches.

    Args:
        engine: whose scores.
        batches: rows; a batch's size is what one pass of the engine can take.
        metric: the diagonal metric P, None for P = 1.
        memory: bytes of scores to hold at a time; at least one batch's scores are held.
    """
    sizes = [len(batch.input_ids) for batch in batches]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    gram = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    size = row_bytes(engine)
    held: dict[int, dict[str, Tensor]] = {}
    for first in range(len(batches)):
        if first in held:
            continue
        held.clear()
        for j in range(first, len(batches)):
            scores = engine.scores(batches[j])
            if not held or size * (sizes[j] + sum(sizes[i] for i in held)) <= memory:
                held[j] = scores
            for i, other in held.items():
                a, b = slice(starts[i], starts[i] + sizes[i]), slice(starts[j], starts[j] + sizes[j])
                gram[a, b] = block = cross(other, scores, metric)
                gram[b, a] = block.T
    return gram


def row_bytes(engine: Engine) -> int:
    """Bytes of one row's scores, written out."""
    return sum(p.numel() * max(p.element_size(), 4) for p in engine.parameters.values())


def cross(a: Mapping[str, Tensor], b: Mapping[str, Tensor], metric: Metric | None = None) -> Tensor:
    """<a_i, P b_j> over all parameters, `(rows of a, rows of b)` float64.

    Args:
        a: scores by parameter, `(rows, *)`.
        b: scores or directions by parameter, `(rows, *)`.
        metric: the diagonal metric P, None for P = 1.
    """
    return torch.stack(
        [
            dots(a[name] if metric is None else a[name] * metric[name].ravel().to(a[name]), b[name]).cpu()
            for name in a
        ]
    ).sum(0)

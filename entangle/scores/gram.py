"""The Gram matrix of more rows than fit one batch: blocks of written-out scores against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from entangle.scores.base import Engine, Metric
from entangle.scores.reduce import dots
from entangle.scores.rows import RowBatch

MEMORY = 2**31
"""Bytes of scores, or of directions, that are held at a time."""


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
    row_bytes = _row_bytes(engine)
    held: dict[int, dict[str, Tensor]] = {}
    for first in range(len(batches)):
        if first in held:
            continue
        held.clear()
        for j in range(first, len(batches)):
            scores = engine.scores(batches[j])
            if not held or row_bytes * (sizes[j] + sum(sizes[i] for i in held)) <= memory:
                held[j] = scores
            for i, other in held.items():
                a, b = slice(starts[i], starts[i] + sizes[i]), slice(starts[j], starts[j] + sizes[j])
                gram[a, b] = block = _cross(other, scores, metric)
                gram[b, a] = block.T
    return gram


def gram_products(
    engine: Engine,
    batches: Sequence[RowBatch],
    weights: Tensor,
    *,
    metric: Metric | None = None,
    memory: int = MEMORY,
    advance: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """<S_a, P sum_b weights[d, b] S_b> for all rows a and directions d, `(R, D)` float64.

    Law: `score_gram(engine, batches) @ weights.T`, for the price of two passes over the rows instead of R of
    them, or of one where all scores fit in `memory`. With more directions than fit, two passes for each lot.

    Args:
        engine: whose scores.
        batches: rows; a batch's size is what one pass of the engine can take.
        weights: `(D, R)`, over the rows of all batches in their order.
        metric: the diagonal metric P, None for P = 1.
        memory: bytes of directions to hold at a time, and bytes of scores to keep for the second pass.
        advance: told of the rows of every pass.
    """
    sizes = [len(batch.input_ids) for batch in batches]
    row_bytes = _row_bytes(engine)
    kept: dict[int, dict[str, Tensor]] = {}

    def scores(number: int) -> dict[str, Tensor]:
        found = kept.get(number) or engine.scores(batches[number])
        if row_bytes * (sum(sizes[i] for i in {*kept, number})) <= memory:
            kept[number] = found
        advance(sizes[number])
        return found

    found = torch.zeros(sum(sizes), len(weights), dtype=torch.float64)
    lot = directions_at_a_time(engine, memory)
    for first in range(0, len(weights), lot):
        wanted = weights[first : first + lot]
        directions: dict[str, Tensor] = {}
        for number, part in enumerate(wanted.split(sizes, 1)):
            for name, rows in scores(number).items():
                directions[name] = directions.get(name, 0.0) + part.to(rows) @ rows
        if metric is not None:
            directions = {k: v * metric[k].ravel().to(v) for k, v in directions.items()}
        for number, part in enumerate(found[:, first : first + lot].split(sizes)):
            part += _cross(scores(number), directions, None)
    return found


def directions_at_a_time(engine: Engine, memory: int = MEMORY) -> int:
    """How many directions `gram_products` holds; it makes two passes for each lot of as many.

    Args:
        engine: the engine; its parameters give the size of a direction.
        memory: bytes that the directions may take.
    """
    return max(1, memory // _row_bytes(engine))


def _row_bytes(engine: Engine) -> int:
    """Bytes of one row's scores, written out."""
    return sum(p.numel() * max(p.element_size(), 4) for p in engine.parameters.values())


def _cross(a: dict[str, Tensor], b: dict[str, Tensor], metric: Metric | None) -> Tensor:
    """<a_i, P b_j> over all parameters, `(rows of a, rows of b)` float64."""
    return torch.stack([
        dots(a[name] if metric is None else a[name] * metric[name].ravel().to(a[name]), b[name]).cpu()
        for name in a
    ]).sum(0)  # fmt: skip

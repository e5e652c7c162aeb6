"""From one parameter's scores to numbers: pair blocks and Gram matrices, in whichever form is cheaper."""

from __future__ import annotations

import torch
from torch import Tensor

from entangle.scores.ghost import Ghost, Kernels, cheapest_ghost
from entangle.scores.summing import Sink
from entangle.scores.terms import OneHot, Outer, Score

DOUBLE_ELEMENTS = 2**22
"""Most elements that `dots` holds as float64 at a time."""

PASS_COST = 16
"""What one pass over a written-out element costs, in multiply-adds of a matrix product."""


SUMMED_PASS_COST = 110
"""The same where scores are summed too: the alternative is then one large product over all pairs, not one for each.

Measured on the shapes of `benchmarks/engine.py` (one CPU thread): writing out is cheaper at width 512, where the ghost
form takes 170 to 250 per element, and dearer at width 1536, where it takes 55 to 85.
"""

SUMMED_SLICE = 2**22
"""Fewest elements of a slice of scores that are summed too: larger products outweigh what the cache likes."""


def pair_block(
    score: Score, weight: Tensor | None, kernels: Kernels | None = None, sink: Sink | None = None
) -> Tensor:
    """(A, B, c, A - c, B - c) of every pair, `(5, n)` float64, in the order of `GEOMETRY_COLUMNS`.

    Member 0 is chosen, member 1 rejected. `weight` `(a, b)` is the metric in this parameter; `kernels` go from one
    parameter to the next, for layers that read the same input. In either form the gaps come from the difference of
    the scores. With a `sink` the scores are summed there. That takes the products that write them out in any case, so
    that the ghost form is only worth its price against the passes over what is written out.

    Args:
        score: a parameter's scores, member 0 chosen, member 1 rejected.
        weight: `(a, b)`, the metric in this parameter; None: the plain dot product.
        kernels: of the inputs, from the parameters before.
        sink: where the scores are summed; None: nowhere.
    """
    ghost = cheapest_ghost(score, members=2) if weight is None else None
    alternative = _written_out_cost(score) if sink is None else _passing_cost(score, SUMMED_PASS_COST)
    if ghost is not None and ghost.pair_cost < alternative / score.prompts:
        block = ghost.pair_block(kernels or Kernels())
        if sink is not None:
            sink.add_factored(score, block.isfinite().all(0))
        return block
    total = torch.zeros(4, score.prompts, dtype=torch.float64, device=score.device)
    for start, stop, value in score.slices(0 if sink is None else SUMMED_SLICE):
        chosen, rejected = value.flatten(1).chunk(2)
        difference = chosen - rejected
        if weight is None:
            left, right = chosen, rejected
        else:
            metric = weight[start:stop].flatten().to(value)
            left, right = chosen * metric, rejected * metric
        factors = ((left, chosen), (right, rejected), (left, difference), (right, difference))
        part = torch.stack([(x * y).sum(1) for x, y in factors]).double()
        if sink is not None:
            sink.add(value, part.isfinite().all(0), start)
        total += part
    sq_chosen, sq_rejected, gap_chosen, gap_rejected = total[0], total[1], total[2], -total[3]
    inner = torch.where(sq_chosen <= sq_rejected, sq_chosen - gap_chosen, sq_rejected - gap_rejected)
    return torch.stack([sq_chosen, sq_rejected, inner, gap_chosen, gap_rejected])


def gram_block(score: Score, weight: Tensor | None) -> Tensor:
    """<S_a, P S_b> of all rows in this parameter, `(rows, rows)` float64.

    Args:
        score: a parameter's scores.
        weight: `(a, b)`, the metric P in this parameter; None: the plain dot product.
    """
    n, members = score.prompts, len(score.members)
    ghost = cheapest_ghost(score, members) if weight is None else None
    if ghost is not None and n**2 * ghost.cost(members) < _written_out_cost(score):
        return _ghost_gram(ghost, members, n)
    total = torch.zeros(len(score), len(score), dtype=torch.float64, device=score.device)
    for start, stop, value in score.slices():
        left = value if weight is None else value * weight[start:stop].to(value)
        total += dots(left.flatten(1), value.flatten(1))
    return total


def dots(a: Tensor, b: Tensor) -> Tensor:
    """All inner products of the rows of `a` `(r, m)` and `b` `(s, m)`: `(r, s)` float64.

    Args:
        a: `(r, m)`.
        b: `(s, m)`.
    """
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    step = max(1, DOUBLE_ELEMENTS // (len(a) + len(b)))
    for part_a, part_b in zip(a.split(step, 1), b.split(step, 1), strict=True):
        total += part_a.double() @ part_b.double().T
    return total


def _ghost_gram(ghost: Ghost, members: int, n: int) -> Tensor:
    """All dot products, prompt against prompt: at shift t, prompt i meets prompt i + t."""
    blocks = torch.stack([ghost.dots(ghost.rolled(shift)) for shift in range(n)], -1)  # (K, K, i, t)
    i = torch.arange(n, device=blocks.device)
    by_prompt = blocks[:, :, i[:, None], (i[None, :] - i[:, None]) % n]  # (K, K, i, j)
    return by_prompt.permute(0, 2, 1, 3).reshape(members * n, members * n)


def _written_out_cost(score: Score) -> float:
    """Multiply-adds of writing all rows' scores out and passing over them."""
    a, b = score.shape
    positions = [
        term.positions
        for member in score.members
        for term in member
        if isinstance(term, Outer) and not (isinstance(term.left, OneHot) or isinstance(term.right, OneHot))
    ]
    return score.prompts * a * b * sum(positions) + _passing_cost(score, PASS_COST)


def _passing_cost(score: Score, cost: float) -> float:
    """What passing over all rows' written-out scores costs, in multiply-adds, at `cost` per element."""
    a, b = score.shape
    return score.prompts * a * b * cost * len(score.members)

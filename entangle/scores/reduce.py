"""From one parameter's scores to numbers: pair blocks, Gram matrices. Written once, over `terms.Score`."""

from __future__ import annotations

import torch
from torch import Tensor

from entangle.scores.terms import Outer, Score, ghost_cost, ghost_dots


def pair_block(score: Score, weight: Tensor | None) -> Tensor:
    """(A, B, c, A - c, B - c) of every pair, `(5, n)` float64, in the order of `GEOMETRY_COLUMNS`.

    Rows 0..n are chosen, n..2n rejected. `weight` `(a, b)` is the metric in this parameter. The gaps come
    from the difference of the scores where these are written out, from float64 kernels in the ghost form.
    """
    n = len(score) // 2
    outers = _outers(score)
    if (
        weight is None
        and outers is not None
        and 3 * ghost_cost(outers, outers, score.shape) < 2 * _cost(score)
    ):
        chosen, rejected = [t[:n] for t in outers], [t[n:] for t in outers]
        chosen_sq, rejected_sq = ghost_dots(chosen, chosen), ghost_dots(rejected, rejected)
        inner = ghost_dots(chosen, rejected)
        return torch.stack([chosen_sq, rejected_sq, inner, chosen_sq - inner, rejected_sq - inner])
    total = 0
    for start, stop, value in score.slices():
        chosen, rejected = value[:n], value[n:]
        difference = chosen - rejected
        left, right = (
            (chosen, rejected)
            if weight is None
            else (chosen * weight[start:stop].to(value), rejected * weight[start:stop].to(value))
        )
        total = total + torch.stack(
            [
                (x * y).sum((1, 2), dtype=torch.float64)
                for x, y in (
                    (left, chosen),
                    (right, rejected),
                    (left, rejected),
                    (left, difference),
                    (-right, difference),
                )
            ]
        )
    return torch.as_tensor(total)


def gram_block(score: Score, weight: Tensor | None) -> Tensor:
    """<S_a, P S_b> of all rows in this parameter, `(rows, rows)` float64."""
    rows = len(score)
    outers = _outers(score)
    written_out = _cost(score) + rows * score.shape[0] * score.shape[1]
    if weight is None and outers is not None and rows * ghost_cost(outers, outers, score.shape) < written_out:
        shifted = [ghost_dots(outers, [_roll(t, k) for t in outers]) for k in range(rows)]
        a = torch.arange(rows, device=shifted[0].device)
        return torch.stack(shifted, 1)[a[:, None], (a[None, :] - a[:, None]) % rows]
    total = 0
    for start, stop, value in score.slices():
        left = value if weight is None else value * weight[start:stop].to(value)
        total = total + left.flatten(1).double() @ value.flatten(1).double().T
    return torch.as_tensor(total)


def _outers(score: Score) -> list[Outer] | None:
    """The terms, if all of them are outer products."""
    outers = [term for term in score.terms if isinstance(term, Outer)]
    return outers if len(outers) == len(score.terms) else None


def _cost(score: Score) -> int:
    """Multiply-adds of writing one row's score out."""
    a, b = score.shape
    return (
        a
        * b
        * sum(term.positions if isinstance(term, Outer) and term.is_dense else 1 for term in score.terms)
    )


def _roll(term: Outer, k: int) -> Outer:
    rows = term.left.shape[0]
    return term[(torch.arange(rows) + k) % rows]

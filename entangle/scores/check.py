"""The self-check: on its first batch the fast engine is compared with plain autograd on a few rows.

No list of rules can know every model. A weight that is used outside its layer, rows that mix, a cache that
isn't one: all of these show as a squared norm, or a log-prob, that autograd doesn't agree with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from entangle.analysis.geometry import logp_resolution
from entangle.scores.logps import Rows


def sample_rows(rows: Rows, group_size: int) -> Rows | None:
    """All rows of the two cheapest prompts that have scored tokens in every row; None if there is none.

    Args:
        rows: a batch without padding.
        group_size: rows per prompt.
    """
    n = len(rows) // group_size
    tokens = rows.lengths.view(group_size, n).sum(0)
    usable = rows.valid.any(1).view(group_size, n).all(0)
    prompts = torch.where(usable, tokens, tokens.max() + 1).argsort()[: min(2, int(usable.sum()))]
    if not len(prompts):
        return None
    return rows[torch.cat([k * n + prompts for k in range(group_size)])]


def disagreeing(fast: Mapping[str, float], oracle: Mapping[str, float], resolution: float) -> list[str]:
    """Names whose squared norms differ by more than round-off; the bar is set to catch mistakes, not digits.

    A non-finite oracle disagrees with nothing: there is nothing to compare with.

    Args:
        fast: squared norm by name, 1/parameter^2.
        oracle: the same by autograd.
        resolution: relative error of the dot products.
    """
    share = max(1e-3, 10 * resolution)
    noise = resolution * sum(oracle.values())
    return [
        name
        for name, expected in oracle.items()
        if not abs(fast.get(name, 0.0) - expected) <= share * expected + noise
        and torch.isfinite(torch.tensor([expected, noise])).all()
    ]


def logps_agree(fast: Tensor, plain: Tensor, resolution: float) -> bool:
    """Whether two computations of the rows' log-probs are the same up to round-off.

    Args:
        fast: `(rows,)`, nats.
        plain: `(rows,)`, nats.
        resolution: relative error of dot products in this precision.
    """
    share = max(1e-4, 10 * logp_resolution(resolution))
    return torch.allclose(fast.cpu(), plain.cpu(), rtol=share, atol=share, equal_nan=True)

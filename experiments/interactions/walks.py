"""Walk indices: how many walks lead from the boundary of a partition (arXiv 2211.16494)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from experiments.interactions.graphs import Adjacency

Side = NDArray[np.bool_]  # (V,), true for the vertices of I


def boundary(adjacency: Adjacency, inside: Side) -> Side:
    """C_I: the vertices, of both sides, with a neighbour on the other side of the partition; `(V,)`."""
    return (adjacency.astype(bool) & (inside[:, None] != inside)).any(1)


def walk_index(adjacency: Adjacency, inside: Side, length: int, target: int | None = None) -> int:
    """WI_length(I), the number of walks of `length` steps that start in C_I; with a target, those that end there.

    1_C^T A^length 1, and 1_C^T A^length e_t. A step along a self-loop counts.
    """
    walks = boundary(adjacency, inside).astype(np.int64) @ np.linalg.matrix_power(adjacency, length)
    return int(walks.sum() if target is None else walks[target])

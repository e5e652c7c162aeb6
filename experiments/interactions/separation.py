"""Separation rank: the least R with f(X) = sum over r <= R of g_r(X_I) h_r(X_{I^c}); measured, and bounded."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from experiments.interactions.graphs import Adjacency
from experiments.interactions.network import PRIME, Field, ProductNetwork
from experiments.interactions.walks import Side

SIZES = (8, 16, 32, 64, 128, 256, 512)


def rank(matrix: Field) -> int:
    """Rank modulo PRIME, by elimination."""
    left, found = matrix % PRIME, 0
    for column in range(left.shape[1]):
        rows = found + np.flatnonzero(left[found:, column])
        if rows.size:
            left[[found, rows[0]]] = left[[rows[0], found]]
            pivot = left[found, column:] * pow(int(left[found, column]), -1, PRIME) % PRIME
            found += 1
            below = left[found:, column:]
            below[:] = (below - below[:, :1] * pivot) % PRIME
    return found


def grid(network: ProductNetwork, inside: Side, size: int, rng: Generator, target: int | None) -> Field:
    """The network on every pairing of `size` random inputs of I (rows) with as many of I^c (columns)."""
    inputs = rng.integers(PRIME, size=(2, size, len(inside), len(network.output)))
    rows, columns = (inputs[k] * side[:, None] for k, side in enumerate((inside, ~inside)))
    return np.stack([network(row + columns, target) for row in rows])


def grid_ranks(network: ProductNetwork, inside: Side, rng: Generator, target: int | None) -> list[int]:
    """Ranks of grids of 8, 16, 32, ... templates a side, until one is below its size.

    No grid's rank exceeds sep(f; I), and r random templates find min(r, sep) of it but for a chance of order degree r /
    PRIME. So a last rank below its grid's size is the separation rank itself; one as large is a lower bound.
    """
    ranks = []
    for size in SIZES:
        ranks.append(rank(grid(network, inside, size, rng, target)))
        if ranks[-1] < size:
            break
    return ranks


def cut(adjacency: Adjacency, inside: Side, depth: int, target: int | None = None) -> int:
    """Legs of width D in the least cut of the unrolled network between I and I^c: sep(f; I) <= D^cut.

    A copy tensor (one per walk that ends at the target) goes to one side with its branches, or is split in two joined
    by one leg, and then each branch may choose. Splitting at the boundary alone costs sum_{k<L} WI_{k,t}(I) <
    2 WI_{L-1,t}(I): a vertex of the boundary has two neighbours there, itself and one across, so walks at least double
    with each step. The copy tensor above all vertices, in graph prediction, may cost one more.
    """
    cost = np.stack([~inside, inside]).astype(
        np.int64
    )  # (2, V): to have a vertex's vector on the side of I, of I^c
    for _ in range(depth):
        cost = np.minimum(cost @ adjacency, 1 + cost.min(0) @ adjacency)
    whole = min(cost.sum(1).min(), 1 + cost.min(0).sum())
    return int(whole if target is None else cost[:, target].min())

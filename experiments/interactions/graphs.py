"""Undirected graphs, as symmetric 0/1 matrices `(V, V)` with every self-loop."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Adjacency = NDArray[np.int64]
Edge = tuple[int, int]


def graph(vertices: int, edges: Iterable[Edge]) -> Adjacency:
    """The graph with these edges, and a self-loop at every vertex."""
    adjacency = np.eye(vertices, dtype=np.int64)
    for i, j in edges:
        adjacency[i, j] = adjacency[j, i] = 1
    return adjacency


def edges_of(adjacency: Adjacency) -> list[Edge]:
    """Edges (i, j) with i < j, in the order of rows."""
    return [(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(adjacency, 1)), strict=True)]


def nearest_neighbours(points: NDArray[np.float64], count: int) -> Adjacency:
    """Two points `(V, F)` are joined if either is among the other's `count` nearest (Euclidean)."""
    squares = (points**2).sum(1)
    distances = squares[:, None] + squares - 2 * points @ points.T
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return graph(len(points), ((i, j) for i, row in enumerate(nearest.tolist()) for j in row))


def small_graphs(vertices: int) -> dict[str, Adjacency]:
    """From sparse to dense; `two_cliques` are two complete halves joined by one edge."""
    half, ring = vertices // 2, [(i, (i + 1) % vertices) for i in range(vertices)]
    pairs = [(i, j) for j in range(vertices) for i in range(j)]
    cliques = [(i, j) for i, j in pairs if (i < half) == (j < half)]
    edges = {"path": ring[:-1], "star": [(0, j) for j in range(1, vertices)], "cycle": ring}
    edges |= {"two_cliques": [*cliques, (half - 1, half)], "complete": pairs}
    return {name: graph(vertices, some) for name, some in edges.items()}

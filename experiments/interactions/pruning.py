"""Orders in which edges are taken out of a graph: by walk indices, by effective resistance.

Every function takes all edges (i, j), i < j, and returns them, first to go first; equals keep their order.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from experiments.interactions.graphs import Adjacency, Edge, graph
from experiments.interactions.walks import Side, walk_index

Partition = tuple[Side, int]  # I, and the target of the prediction


def by_walks(
    vertices: int, edges: Sequence[Edge], length: int, partitions: Sequence[Partition]
) -> list[Edge]:
    """Walk index sparsification for any partitions, L - 1 = `length` (arXiv 2211.16494).

    Each step takes out the edge after whose removal the walk indices are largest: sorted from the smallest and compared
    lexicographically, so that the partition which is worst off counts first.
    """
    left, removed = list(edges), []
    while left:
        found = []
        for edge in left:
            without = graph(vertices, (other for other in left if other != edge))
            found.append(sorted(walk_index(without, inside, length, t) for inside, t in partitions))
        removed.append(left.pop(found.index(max(found))))
    return removed


def by_near_walks(adjacency: Adjacency, edges: Sequence[Edge], length: Literal[1, 2]) -> list[Edge]:
    """The same for single vertices, each against the rest, from local counts; `length` is 1 or 2.

    The boundary of {t} is t with its neighbours, so its walk index is the number of closed walks of `length` + 1 steps:
    1 + degree, or 1 + 3 degree + 2 triangles at t (without a neighbour zero, not one: the smallest all the same). A
    removal changes it at the edge's ends and, for two steps, at their common neighbours: only these are compared, and
    only keys nearby renewed. With one step the edge of the largest smaller degree goes, then of the largest larger one.
    """
    near = [set(np.flatnonzero(row).tolist()) - {t} for t, row in enumerate(adjacency)]
    values = np.diagonal(np.linalg.matrix_power(adjacency, length + 1)).tolist()

    def without(edge: Edge) -> dict[int, int]:
        shared = near[edge[0]] & near[edge[1]] if length == 2 else set()
        fall = 1 if length == 1 else 3 + 2 * len(shared)
        return {t: values[t] - fall for t in edge} | {t: values[t] - 2 for t in shared}

    def key(edge: Edge) -> tuple:
        """Sorts as the tuples of walk indices do, best first: at the first value that counts differ, more is worse."""
        changed = without(edge)
        more = Counter(changed.values())
        more.subtract(values[t] for t in changed)
        return (*((2, -v, n) if n > 0 else (0, v, n) for v, n in sorted(more.items()) if n), (1,))

    place = {edge: k for k, edge in enumerate(edges)}
    keys = {edge: key(edge) for edge in edges}
    heap, removed = [(keys[edge], k) for edge, k in place.items()], []
    heapq.heapify(heap)
    while heap:
        found, k = heapq.heappop(heap)
        edge = edges[k]
        if keys.get(edge) != found:
            continue  # gone, or renewed since
        changed = without(edge)
        for t, new in changed.items():
            values[t] = new
        near[edge[0]].remove(edge[1])
        near[edge[1]].remove(edge[0])
        del keys[edge]
        removed.append(edge)
        stale = {(min(t, j), max(t, j)) for t in changed for j in near[t]}
        if length == 2:
            stale |= {(i, j) for t in changed for i in near[t] for j in near[t] & near[i] if i < j}
        for other in stale:
            keys[other] = key(other)
            heapq.heappush(heap, (keys[other], place[other]))
    return removed


def resistances(adjacency: Adjacency, edges: Sequence[Edge]) -> NDArray[np.float64]:
    """Effective resistance of every edge, `(E,)`: (e_i - e_j)^T Laplacian^+ (e_i - e_j)."""
    inverse = np.linalg.pinv((np.diag(adjacency.sum(1)) - adjacency).astype(np.float64), hermitian=True)
    i, j = np.array(edges).T
    return inverse[i, i] + inverse[j, j] - 2 * inverse[i, j]


def by_resistance(
    edges: Sequence[Edge], resistance: NDArray[np.float64], rng: np.random.Generator
) -> list[Edge]:
    """Edges drawn one by one with probability proportional to resistance; the last to be drawn goes first.

    The draws of spectral sparsification (arXiv 0803.0929), without its weights: which edges are kept is compared.
    """
    arrival = (
        rng.exponential(size=len(edges)) / resistance
    )  # the first of several is k with probability rate_k / sum
    return [edges[k] for k in np.argsort(-arrival)]

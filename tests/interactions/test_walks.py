"""Walk indices by powers of the adjacency matrix against walks that are listed one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from experiments.interactions.graphs import edges_of, graph, nearest_neighbours, small_graphs
from experiments.interactions.walks import boundary, walk_index
from tests.interactions.drawn import random_graph


@pytest.mark.parametrize("seed", range(12))
def test_walk_index_counts_the_listed_walks(seed: int):
    rng = np.random.default_rng(seed)
    vertices = int(rng.integers(2, 8))
    adjacency, inside = random_graph(vertices, rng), rng.random(vertices) < 0.5
    border = {
        i for i in range(vertices) for j in range(vertices) if adjacency[i, j] and inside[i] != inside[j]
    }
    for length in range(4):
        walks = [
            walk
            for walk in product(range(vertices), repeat=length + 1)
            if walk[0] in border and all(adjacency[i, j] for i, j in zip(walk, walk[1:], strict=False))
        ]
        assert walk_index(adjacency, inside, length) == len(walks)
        for target in range(vertices):
            ends_there = sum(walk[-1] == target for walk in walks)
            assert walk_index(adjacency, inside, length, target) == ends_there


def test_boundary_has_both_ends_of_every_edge_across():
    path = graph(4, [(0, 1), (1, 2), (2, 3)])
    assert boundary(path, np.array([True, True, False, False])).tolist() == [False, True, True, False]
    assert not boundary(path, np.zeros(4, bool)).any()


def test_walk_index_of_a_path_by_hand():
    """Boundary 1, 2. One step: from 1 to 0, 1, 2; from 2 to 1, 2, 3."""
    path, halves = graph(4, [(0, 1), (1, 2), (2, 3)]), np.array([True, True, False, False])
    assert walk_index(path, halves, 1) == 6
    assert [walk_index(path, halves, 1, t) for t in range(4)] == [1, 2, 2, 1]


def test_graphs_are_symmetric_with_every_self_loop():
    points = np.random.default_rng(0).normal(size=(40, 3))
    for adjacency in [*small_graphs(6).values(), nearest_neighbours(points, 4)]:
        assert (adjacency == adjacency.T).all() and (np.diagonal(adjacency) == 1).all()
        assert (graph(len(adjacency), edges_of(adjacency)) == adjacency).all()


def test_nearest_neighbours_are_the_nearest():
    points = np.random.default_rng(1).normal(size=(30, 2))
    adjacency = nearest_neighbours(points, 3)
    nearest = [
        sorted((j for j in range(30) if j != i), key=lambda j, i=i: np.linalg.norm(points[i] - points[j]))[:3]
        for i in range(30)
    ]
    expected = {(min(i, j), max(i, j)) for i, row in enumerate(nearest) for j in row}
    assert set(edges_of(adjacency)) == expected

"""Removal orders: the local form against the general one, and both against small cases by hand."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.interactions.graphs import edges_of, graph, small_graphs
from experiments.interactions.pruning import by_near_walks, by_resistance, by_walks, resistances
from experiments.interactions.walks import walk_index
from tests.interactions.drawn import random_graph


def singles(vertices: int) -> list[tuple[np.ndarray, int]]:
    """Every vertex against the rest, and prediction there."""
    return [(np.arange(vertices) == t, t) for t in range(vertices)]


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_the_local_form_removes_as_the_general_one_does(seed: int, length):
    rng = np.random.default_rng(seed)
    vertices = int(rng.integers(3, 8))
    adjacency = random_graph(vertices, rng)
    edges = edges_of(adjacency)
    edges = [edges[k] for k in rng.permutation(len(edges))]
    expected = by_walks(vertices, edges, length, singles(vertices))
    assert by_near_walks(adjacency, edges, length) == expected


def test_one_step_removes_by_degrees():
    """Degrees 3, 3, 2, 2, 1, 1: the edge between the two vertices of degree 3 goes, an only neighbour stays longest."""
    edges = [(0, 4), (0, 1), (0, 2), (1, 3), (1, 2), (3, 5)]
    assert by_near_walks(graph(6, edges), edges, 1)[0] == (0, 1)
    assert {(0, 4), (3, 5)} & set(by_near_walks(graph(6, edges), edges, 1)[:2]) == set()


@pytest.mark.parametrize("seed", range(6))
def test_one_step_follows_the_degrees_of_a_larger_graph(seed: int):
    """Each removed edge has the largest (smaller degree, larger degree) of those left, the first named among equals."""
    adjacency = random_graph(14, np.random.default_rng(seed))
    left, degrees = edges_of(adjacency), adjacency.sum(1)
    for edge in by_near_walks(adjacency, left, 1):
        ends = [tuple(sorted((degrees[i], degrees[j]))) for i, j in left]
        assert edge == left.pop(ends.index(max(ends)))
        degrees[list(edge)] -= 1


def test_among_equal_smaller_degrees_the_larger_decides():
    """Vertex 0 has four neighbours and 1 three, of degree 2 each: an edge at 0 goes before any at 1."""
    edges = [(1, 2), (1, 3), (1, 4), (0, 2), (0, 3), (0, 4), (0, 5), (5, 6)]
    assert by_near_walks(graph(7, edges), edges, 1)[0] == (0, 2)


def test_a_removal_never_leaves_a_smaller_least_walk_index_than_another_would():
    rng = np.random.default_rng(3)
    edges = edges_of(random_graph(6, rng))
    left = list(edges)
    for gone in by_walks(6, edges, 2, singles(6)):
        least = {
            edge: min(
                walk_index(graph(6, [e for e in left if e != edge]), side, 2, t) for side, t in singles(6)
            )
            for edge in left
        }
        assert least[gone] == max(least.values())
        left.remove(gone)


def test_a_partition_keeps_the_edges_that_its_walks_take():
    """Cliques 0 1 2 and 3 4 5 joined by (2, 3): in one step, 0 is reached from the boundary {2, 3} by (0, 2) alone."""
    cliques, halves = small_graphs(6)["two_cliques"], np.arange(6) < 3
    order = by_walks(6, edges_of(cliques), 1, [(halves, 0)])
    assert set(order[-2:]) == {(0, 2), (2, 3)}


@pytest.mark.parametrize(
    ("name", "expected"), [("path", 1), ("star", 1), ("cycle", 5 / 6), ("complete", 1 / 3)]
)
def test_resistances_of_known_graphs(name: str, expected: float):
    adjacency = small_graphs(6)[name]
    np.testing.assert_allclose(resistances(adjacency, edges_of(adjacency)), expected, rtol=1e-10)


def test_resistances_sum_to_the_edges_of_a_spanning_forest():
    adjacency = graph(
        9, [(0, 1), (1, 2), (0, 2), (2, 3), (4, 5), (5, 6), (6, 7), (4, 7), (4, 6)]
    )  # and 8 alone
    assert resistances(adjacency, edges_of(adjacency)).sum() == pytest.approx(9 - 3, rel=1e-10)


def test_resistance_decides_how_often_an_edge_is_kept_longest():
    """Probability R_e / sum R; 4000 orders, so three standard errors are below 0.024."""
    edges, rng = [(0, 1), (1, 2), (2, 3)], np.random.default_rng(0)
    resistance = np.array([1.0, 2.0, 5.0])
    orders = [by_resistance(edges, resistance, rng) for _ in range(4000)]
    assert all(sorted(order) == edges for order in orders)
    shares = [np.mean([order[-1] == edge for order in orders]) for edge in edges]
    np.testing.assert_allclose(shares, resistance / 8, atol=0.024)

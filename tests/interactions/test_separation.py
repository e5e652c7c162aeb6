"""The product network, the rank of its grids, and the upper bound; each against something slower."""

from __future__ import annotations

from fractions import Fraction
from itertools import count
from math import comb, isqrt, prod

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from experiments.interactions.graphs import Adjacency, small_graphs
from experiments.interactions.network import PRIME, generic
from experiments.interactions.separation import SIZES, cut, grid, grid_ranks, rank
from experiments.interactions.walks import walk_index
from tests.interactions.drawn import random_graph

HALVES, ONE = (np.array(side, bool) for side in ((1, 1, 1, 0, 0, 0), (1, 0, 0, 0, 0, 0)))


def test_prime_is_prime():
    assert all(PRIME % divisor for divisor in range(2, isqrt(PRIME) + 1))


def test_network_equals_its_definition_in_python_integers():
    rng = np.random.default_rng(0)
    network = generic(random_graph(5, rng), 3, 2, rng)
    inputs = rng.integers(PRIME, size=(4, 5, 2))

    def hidden(level: int, i: int, x: list) -> list[int]:
        if level == 0:
            return x[i]
        result = [1, 1]
        for j in np.flatnonzero(network.adjacency[i]):
            below = hidden(level - 1, int(j), x)
            for k in range(2):
                result[k] *= sum(
                    w * v for w, v in zip(network.weights[level - 1, k].tolist(), below, strict=True)
                )
        return [value % PRIME for value in result]

    for x in inputs:
        last = [hidden(3, i, x.tolist()) for i in range(5)]
        whole = [prod(vector[k] for vector in last) for k in range(2)]
        assert network(x) == sum(w * v for w, v in zip(network.output.tolist(), whole, strict=True)) % PRIME
        assert (
            network(x, 2) == sum(w * v for w, v in zip(network.output.tolist(), last[2], strict=True)) % PRIME
        )
    assert network(inputs).tolist() == [network(x) for x in inputs]


def exact_rank(matrix: np.ndarray) -> int:
    """Over the rationals."""
    rows, found = [[Fraction(int(value)) for value in row] for row in matrix], 0
    for column in range(matrix.shape[1]):
        pivot = next((k for k in range(found, len(rows)) if rows[k][column]), None)
        if pivot is not None:
            rows[found], rows[pivot] = rows[pivot], rows[found]
            for k in range(found + 1, len(rows)):
                factor = rows[k][column] / rows[found][column]
                rows[k] = [a - factor * b for a, b in zip(rows[k], rows[found], strict=True)]
            found += 1
    return found


@pytest.mark.parametrize("true", range(7))
def test_rank_equals_the_rank_over_the_rationals(true: int):
    rng = np.random.default_rng(true)
    matrix = rng.integers(-3, 4, (7, true)) @ rng.integers(-3, 4, (true, 9))
    matrix[:, 2] = 0  # a column without a pivot
    assert rank(matrix) == exact_rank(matrix) == rank(matrix.T)


def least_cut(adjacency: Adjacency, inside: np.ndarray, depth: int, target: int | None) -> int:
    """By maximum flow through the unrolled network: matrices are vertices, copy tensors are arcs of capacity one.

    A copy tensor's arc runs from its entrance to its exit; each of its matrices is tied to both, so the arc is cut
    iff they aren't all on one side.
    """
    arcs, fresh, free = [], count(2), 1_000
    source, sink = 0, 1

    def copy_tensor() -> tuple[int, int]:
        entrance, leave = next(fresh), next(fresh)
        arcs.append((entrance, leave, 1))
        return entrance, leave

    def tie(matrix: int, tensor: tuple[int, int]) -> None:
        arcs.extend([(matrix, tensor[0], free), (tensor[1], matrix, free)])

    def unroll(level: int, i: int, above: int) -> None:
        """Hang h^(level, i) below a matrix."""
        if level == 0:
            arcs.extend([(source, above, 1)] if inside[i] else [(above, sink, 1)])
            return
        tensor = copy_tensor()
        tie(above, tensor)
        for j in np.flatnonzero(adjacency[i]):
            matrix = next(fresh)
            tie(matrix, tensor)
            unroll(level - 1, int(j), matrix)

    root = next(fresh)
    if target is not None:
        unroll(depth, target, root)
    else:
        top = copy_tensor()
        tie(root, top)
        for i in range(len(adjacency)):  # an identity between two copy tensors changes nothing
            matrix = next(fresh)
            tie(matrix, top)
            unroll(depth, i, matrix)
    size = next(fresh)
    starts, ends, capacities = (np.array(part, np.int32) for part in zip(*arcs, strict=True))
    return int(maximum_flow(csr_array((capacities, (starts, ends)), (size, size)), source, sink).flow_value)


@pytest.mark.parametrize("seed", range(10))
def test_cut_equals_the_least_cut_of_the_unrolled_network(seed: int):
    rng = np.random.default_rng(seed)
    adjacency, inside = random_graph(5, rng), rng.random(5) < 0.5
    for depth in (1, 2, 3):
        for target in (None, 0, 3):
            assert cut(adjacency, inside, depth, target) == least_cut(adjacency, inside, depth, target)


@pytest.mark.parametrize("seed", range(12))
def test_rank_never_breaks_the_bounds(seed: int):
    """The rank is at most D^cut, cut <= 2 WI (+ 1 in graph prediction); no walk from the boundary, no interaction."""
    rng = np.random.default_rng(seed)
    vertices, depth, width = int(rng.integers(2, 7)), int(rng.integers(1, 4)), int(rng.integers(2, 4))
    adjacency, inside = random_graph(vertices, rng), rng.random(vertices) < 0.5
    for target in (None, int(rng.integers(vertices))):
        legs, walks = cut(adjacency, inside, depth, target), walk_index(adjacency, inside, depth - 1, target)
        assert legs <= 2 * walks + (target is None)
        found = rank(grid(generic(adjacency, depth, width, rng), inside, 64, rng, target))
        assert found <= width**legs
        if target is not None and walks == 0:
            assert found == 1


@pytest.mark.parametrize("name", small_graphs(6))
@pytest.mark.parametrize(("depth", "width"), [(1, 2), (1, 4), (2, 2), (2, 3), (3, 2)])
def test_one_vertex_against_the_rest_has_the_rank_of_a_symmetric_power(name: str, depth: int, width: int):
    """It is C(D + WI - 1, WI): f is of degree WI_t({t}) in x^(t), and all monomials of it are told apart."""
    adjacency, rng = small_graphs(6)[name], np.random.default_rng(0)
    walks = walk_index(adjacency, ONE, depth - 1, 0)
    ranks = grid_ranks(generic(adjacency, depth, width, rng), ONE, rng, 0)
    assert ranks[-1] == comb(width + walks - 1, walks) < SIZES[len(ranks) - 1]


def test_grid_has_the_rank_as_soon_as_it_is_as_large():
    """Two cliques, halves, L = 2, D = 2: the separation rank is 50."""
    rng, adjacency = np.random.default_rng(0), small_graphs(6)["two_cliques"]
    network = generic(adjacency, 2, 2, rng)
    assert [rank(grid(network, HALVES, size, rng, None)) for size in (20, 49, 50, 51, 90)] == [
        20,
        49,
        50,
        50,
        50,
    ]
    assert grid_ranks(network, HALVES, rng, None) == [8, 16, 32, 50]

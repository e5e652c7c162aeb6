"""Random graphs for tests."""

from __future__ import annotations

import numpy as np

from experiments.interactions.graphs import Adjacency, graph


def random_graph(vertices: int, rng: np.random.Generator) -> Adjacency:
    """From nearly empty to nearly complete."""
    share = rng.uniform(0.2, 0.9)
    return graph(vertices, [(i, j) for j in range(vertices) for i in range(j) if rng.random() < share])

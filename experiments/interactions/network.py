"""The graph network with product aggregation, computed exactly: its numbers are integers modulo a prime.

With rounding, the rank of a matrix of high-degree polynomials is a matter of thresholds; in a finite field it is a
fact. It can't exceed the rank over the rationals, and generic weights lose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from experiments.interactions.graphs import Adjacency

Field = NDArray[np.int64]
PRIME = 2**29 - 3  # sums of up to 32 products stay below 2^63


@dataclass(frozen=True)
class ProductNetwork:
    """h^(l,i) = product over j in N(i), i among them, of W^(l) h^(l-1,j), elementwise; h^(0,i) = x^(i).

    Args:
        adjacency: `(V, V)`.
        weights: W^(1) to W^(L), `(L, D, D)`; inputs are as wide as the layers.
        output: `(D,)`.
    """

    adjacency: Adjacency
    weights: Field
    output: Field

    def __call__(self, inputs: Field, target: int | None = None) -> Field:
        """Vertex prediction at the target, or graph prediction from all vertices' product; `(..., V, D)` to `(...)`."""
        hidden = inputs
        for weight in self.weights:
            sent = np.einsum("...vi,oi->...vo", hidden, weight) % PRIME
            hidden = np.stack([product(sent[..., row > 0, :]) for row in self.adjacency], -2)
        last = product(hidden) if target is None else hidden[..., target, :]
        return last @ self.output % PRIME


def generic(adjacency: Adjacency, depth: int, width: int, rng: np.random.Generator) -> ProductNetwork:
    """Random weights."""
    weights, output = rng.integers(PRIME, size=(depth, width, width)), rng.integers(PRIME, size=width)
    return ProductNetwork(adjacency, weights, output)


def product(vectors: Field) -> Field:
    """Elementwise product of vertices' vectors, `(..., V, D)` to `(..., D)`."""
    return reduce(lambda left, right: left * right % PRIME, np.moveaxis(vectors, -2, 0))

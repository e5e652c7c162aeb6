"""Policies small enough that every output can be listed: expected gradients without sampling.

"Perfect exploration": value, std, gradient and second moment are sums over all outputs, so whatever vanishes
here vanishes in expectation and not for want of samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    """Probabilities over the last axis."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@dataclass(frozen=True)
class Outputs:
    """All n outputs of a policy on one prompt.

    Args:
        probabilities: `(n,)`.
        scores: `(n, d)`, gradient of log pi(y) in the d parameters.
        length: tokens of an output.
        gamma: largest spectral norm of the next-token logits' Jacobian, exactly.
    """

    probabilities: Array
    scores: Array
    length: int
    gamma: float

    def value(self, rewards: Array) -> float:
        """V = E[r]."""
        return float(self.probabilities @ rewards)

    def std(self, rewards: Array) -> float:
        """STD of r."""
        return float(np.sqrt(self.probabilities @ (rewards - self.value(rewards)) ** 2))

    def gradient(self, rewards: Array) -> Array:
        """Gradient of V, E[r S], `(d,)`."""
        return (self.probabilities * rewards) @ self.scores

    @property
    def gram(self) -> Array:
        """`(n, n)` dot products of the outputs' scores."""
        return self.scores @ self.scores.T

    @property
    def trace(self) -> float:
        """The trace of F = E[S S^T]."""
        return float(self.probabilities @ (self.scores**2).sum(1))

    @property
    def eigenvalue(self) -> float:
        """The largest eigenvalue of F."""
        return float(np.linalg.eigvalsh((self.scores * self.probabilities[:, None]).T @ self.scores)[-1])


@dataclass(frozen=True)
class Autoregressive:
    """A linear autoregressive policy: next-token logits W h(prefix), with a fixed feature vector per prefix.

    The parameters are W `(vocabulary, width)`; the Jacobian of the logits is I (x) h^T, so gamma = max |h|.

    Args:
        features: by prefix (a tuple of tokens), `(width,)` each.
        vocabulary: tokens.
        length: tokens of an output.
    """

    features: dict[tuple[int, ...], Array]
    vocabulary: int
    length: int

    @classmethod
    def random(
        cls, vocabulary: int, length: int, width: int, seed: int, scale: float = 1.0
    ) -> Autoregressive:
        """Features drawn from a normal distribution of standard deviation `scale`."""
        draw = np.random.default_rng(seed)
        prefixes = [prefix for size in range(length) for prefix in product(range(vocabulary), repeat=size)]
        return cls({prefix: scale * draw.normal(size=width) for prefix in prefixes}, vocabulary, length)

    @property
    def outputs(self) -> list[tuple[int, ...]]:
        """All outputs, in lexicographic order."""
        return list(product(range(self.vocabulary), repeat=self.length))

    def __call__(self, weights: Array) -> Outputs:
        """Probabilities and scores of all outputs at parameters `weights`."""
        chances = {prefix: softmax(weights @ h) for prefix, h in self.features.items()}
        probabilities, scores = [], []
        for output in self.outputs:
            steps = [(output[:t], token) for t, token in enumerate(output)]
            probabilities.append(np.prod([chances[prefix][token] for prefix, token in steps]))
            one_hot = np.eye(self.vocabulary)
            scores.append(
                sum(
                    np.outer(one_hot[token] - chances[prefix], self.features[prefix]).ravel()
                    for prefix, token in steps
                )
            )
        gamma = max(float(np.linalg.norm(h)) for h in self.features.values())
        return Outputs(np.array(probabilities), np.array(scores), self.length, gamma)


def softmax_outputs(logits: Array) -> Outputs:
    """One token; the parameters are its logits `(n,)`."""
    probabilities = softmax(logits)
    return Outputs(probabilities, np.eye(len(logits)) - probabilities, 1, 1.0)

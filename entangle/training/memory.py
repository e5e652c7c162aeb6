"""What the memory of earlier batches' gradients does to a fresh batch: products across batches, without a pass.

A batch's own block is dominated by its own terms and says nothing of the set. Products with what *earlier* batches left
behind are free of them. With s_w and s_l the mean chosen and mean rejected score of batch t, M_w and M_l the averages
over earlier batches of the two halves of the loss's gradient, mean d_w S_w and mean d_l S_l, and P the optimiser's
preconditioner as the last step left it,

    E_t = [[<s_w, P M_w>, <s_w, P M_l>], [<s_l, P M_w>, <s_l, P M_l>]]

is what either half of the memory does to the mean log-probs of fresh pairs, per unit of learning rate. Given the
memory, E_t is unbiased over fresh pairs: neither M nor P has seen batch t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from entangle.scores.summing import weighted_sums
from entangle.scores.terms import Term
from entangle.training.optimizer_steps import groups_of, momentum_of, preconditioner

LIMIT = 2**31
"""Bytes that a memory may take: 16 for each trained parameter."""

DECAY = 0.9
"""Of the memory where the optimiser has no momentum of its own."""

Preconditioner = Callable[[str], Tensor | None]
"""P of a parameter by its name, in its shape; None: the plain dot product."""


class BatchMemory:
    """Moving averages of the gradient's halves over earlier steps, and their products with the coming step's scores.

    Fed by `BatchRecorder`, a parameter of a micro-batch at a time; `close` ends a step. Where several processes share a
    step each has a memory of its own batches: the mean of their E_t is as unbiased. The memory is of one epoch:
    `forget` at its end, since pairs that come again would bring their own terms. Pairs of different batches that share
    a prompt count as any others.

    Args:
        parameters: the trained ones, by name.
        decay: b of the averages, M <- b M + (1 - b) G; the optimiser's own momentum.
        preconditioner: P as the optimiser holds it.
        means: keep averages of the mean scores too, C_w and C_l, as third and fourth direction.

    Attributes:
        coming: by parameter `(D, a, b)` float32, what the micro-batches since the last `close` add to the averages.
        averages: by parameter `(D, a, b)` float32, what earlier steps have left; `ahead` divides by `weight`.
        weight: sum of the averages' weights.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decay: float,
        preconditioner: Preconditioner,
        *,
        means: bool = False,
    ) -> None:
        self.decay, self.means = decay, means
        self.coming: dict[str, Tensor] = {}
        self._parameters, self._preconditioner = parameters, preconditioner
        self.averages: dict[str, Tensor] = {}
        self.weight = 0.0
        self._pairs = 0
        self._effects: list[Tensor] = []

    @property
    def directions(self) -> int:
        """D."""
        return 4 if self.means else 2

    def forget(self) -> None:
        """An epoch begins: what comes now has met the memory before."""
        self.averages, self.weight = {}, 0.0

    def count(self, pairs: int) -> None:
        """A micro-batch's pairs of which both scores are known: those that its `add` weighs."""
        self._pairs += pairs

    def add(self, name: str, terms: Sequence[Term], weights: Tensor) -> None:
        """A parameter of a micro-batch.

        Args:
            name: the parameter.
            terms: its scores `(2n rows)`, chosen rows first, summed over terms.
            weights: `(2, 2n)`: 1 for rows of known pairs and 0 else; d_w of chosen and d_l of rejected rows, as the
                step applies them.
        """
        n = weights.shape[1] // 2
        sides = [
            sum(weighted_sums(term[rows], weights[:, rows]) for term in terms)
            for rows in (slice(n), slice(n, 2 * n))
        ]
        scores, halves = torch.stack(sides, 1)  # pyright: ignore[reportArgumentType]
        if name in self.averages:
            ahead = self.ahead(name)
            products = (scores[:, None] * ahead).sum((2, 3), dtype=torch.float64)
            self._effects.append(products)
        part = torch.cat([halves, scores]) if self.means else halves
        self.coming[name] = self.coming[name] + part if name in self.coming else part

    def ahead(self, name: str) -> Tensor:
        """P M of a parameter, `(D, a, b)`: where each direction of the memory leads per unit of learning rate."""
        average, metric = self.averages[name] / self.weight, self._preconditioner(name)
        return average if metric is None else average * metric.reshape(average.shape[1:]).to(average)

    def close(self) -> tuple[int, list[list[float]]] | None:
        """End a step: its pairs and its E, `(2, D)`; None if nothing is known. Its halves join the memory."""
        pairs, effects = self._pairs, self._effects
        found = None
        if pairs and effects:
            found = pairs, (torch.stack(effects).sum(0) / pairs).tolist()
        for name, part in self.coming.items():
            if self.means and pairs:
                part[2:] /= pairs
            before = self.averages.get(name)
            fresh = (1 - self.decay) * part
            self.averages[name] = fresh if before is None else before.mul_(self.decay).add_(fresh)
        if self.coming:
            self.weight = self.decay * self.weight + 1 - self.decay
        self.coming, self._effects, self._pairs = {}, [], 0
        return found


def batch_memory(model: nn.Module, optimizer: Optimizer, *, means: bool = False) -> BatchMemory | None:
    """A memory that decays as the optimiser's momentum does, under its preconditioner; None above `LIMIT`.

    Args:
        model: in training.
        optimizer: torch's own; another than Adam or AdamW: the plain dot product.
        means: see `BatchMemory`.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if 16 * sum(p.numel() for p in parameters.values()) > LIMIT:
        return None
    groups = groups_of(optimizer)

    def metric(name: str) -> Tensor | None:
        p = parameters[name]
        return preconditioner(optimizer, p, groups[p])

    return BatchMemory(parameters, momentum_of(optimizer) or DECAY, metric, means=means)

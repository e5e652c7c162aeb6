"""What one pass adds to the sums of scores (see `sums`): the part that the engines talk to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from entangle.scores.terms import OneHot, Outer, Score, Term

LEFT_OUT = -1
"""The group of a pair that isn't to be summed."""

Weights = Callable[[Tensor], Tensor]
"""From the log-probs of a pass, `(2n,)` nats, chosen rows first, to `(L, 2n)`: weights of L further directions."""


class Totals(Protocol):
    """What a pass adds to (see `entangle.scores.sums.GroupSums`)."""

    def sum_of(self, name: str) -> Tensor:
        """Sums of one parameter's scores, to be added to."""
        ...

    def own_of(self, module: str) -> Tensor:
        """Own terms of one module, to be added to."""
        ...

    def count(self, prompt: int, group: int, pairs: int) -> None:
        """Count a pass's pairs of one prompt.

        Args:
            prompt: its number.
            group: its group.
            pairs: how many.
        """
        ...


class PassSums:
    """Where the pairs of one pass go; made by `GroupSums.of_pass`, filled by `Engine.pairs`.

    A pair any number of whose score isn't finite is left out of every sum. That may show after a part of its score was
    added; `finish` then says what is to be run again and taken off.

    Args:
        total: the sums that are filled.
        groups: `(n,)` int64, group of every pair.
        prompts: `(n,)`, what tells prompts apart.
        weights: of the directions after the second.
        sign: -1 takes off what 1 adds.

    Attributes:
        twins: pairs of one prompt, where it has several: `(k,)` int64 each.
    """

    def __init__(
        self,
        total: Totals,
        groups: Tensor,
        prompts: Sequence[int],
        weights: Weights | None,
        sign: float = 1.0,
    ) -> None:
        self._total, self._groups, self._prompts, self._further, self._sign = (
            total,
            groups,
            prompts,
            weights,
            sign,
        )
        self._is_whole = groups != LEFT_OUT
        self._weights: Tensor | None = None
        by_prompt: dict[int, list[int]] = defaultdict(list)
        for pair in self._is_whole.nonzero()[:, 0].tolist():
            by_prompt[prompts[pair]].append(pair)
        self._by_prompt = [torch.tensor(pairs) for pairs in by_prompt.values()]
        self.twins = [pairs for pairs in self._by_prompt if len(pairs) > 1]
        self._twin_grams: dict[tuple[str, int], Tensor] = {}
        if weights is None:
            self.know(torch.zeros(2 * len(groups)))

    @property
    def is_known(self) -> bool:
        """Whether the weights of every direction are known."""
        return self._weights is not None

    def know(self, logps: Tensor) -> None:
        """Be told the log-probs of the pass, `(2n,)`, from which weights may follow; before any score."""
        n = len(self._groups)
        rows = torch.arange(2 * n)
        weights = torch.stack([rows < n, rows >= n]).double()
        if self._further is not None:
            logps = logps.detach().double().cpu()
            weights = torch.cat([weights, self._further(logps).double().cpu()])
        self._leave_out(~(weights.isfinite().all(0) & logps.cpu().isfinite()).view(2, n).all(0))
        self._weights = weights

    def add(
        self, name: str, value: Tensor, is_finite: Tensor, *, start: int = 0, pairs: Tensor | None = None
    ) -> None:
        """Add written-out scores of a parameter.

        Args:
            name: the parameter.
            value: `(2m, r, b)`: of its matrix `(a, b)` the r rows from `start`, of m pairs, chosen ones first.
            is_finite: `(m,)` bool, whether a pair's numbers are.
            start: the first row.
            pairs: `(m,)`, which pairs of the pass; None: all.
        """
        m, width = len(is_finite), value[0].numel()
        pairs = torch.arange(len(self._groups)) if pairs is None else pairs
        flat, first = value.reshape(2 * m, width), start * value.shape[2]
        into = self._total.sum_of(name).flatten(2)[:, :, first : first + width]
        for group, own in self._by_group(pairs, is_finite):
            rows = flat if len(own) == m else flat[torch.cat([own, own + m]).to(flat.device)]
            weights = self._weights_of(pairs[own]).to(rows)
            into[group].addmm_(weights, rows.to(into.dtype), alpha=self._sign)

    def add_factored(self, name: str, score: Score, is_finite: Tensor) -> None:
        """Add all scores of a parameter, as the factors that they are: by group and direction a weight gradient.

        Args:
            name: of the parameter.
            score: its scores as terms.
            is_finite: `(pairs,)` bool: pairs that count.
        """
        pairs = torch.arange(len(self._groups))
        into = self._total.sum_of(name)
        into = into.view(*into.shape[:2], *score.shape)
        for group, own in self._by_group(pairs, is_finite):
            everything = len(own) == len(pairs)
            members = [
                member if everything else tuple(term[own.to(score.device)] for term in member)
                for member in score.members
            ]
            for direction, weights in enumerate(self._weights_of(own).view(-1, 2, len(own))):
                for member, weight in zip(members, weights, strict=True):
                    for term in member if weight.any() else ():
                        add_term(into[group, direction], term, weight * self._sign)

    def add_twins(self, module: str, number: int, gram: Tensor) -> None:
        """Take note of the products of `twins[number]` in one parameter, `(2k, 2k)`, chosen rows first.

        Args:
            module: the module that the parameter belongs to.
            number: position in `twins`.
            gram: `(2k, 2k)`, 1/parameter^2.
        """
        self._twin_grams[module, number] = self._twin_grams.get((module, number), 0.0) + gram.double().cpu()

    def finish(self, blocks: Mapping[str, Tensor]) -> PassSums | None:
        """Count the pairs and their own terms; what is to be run again to take off broken pairs, or None.

        Args:
            blocks: by module (A, B, c, ...) of every pair, `(5, n)`.
        """
        for block in blocks.values():
            self._leave_out(~block.cpu().isfinite().all(0))
        pairs = self._is_whole.nonzero()[:, 0]
        for module, block in blocks.items():
            sq_chosen, sq_rejected, inner = block.cpu()[:3, pairs]
            square = torch.stack([sq_chosen, inner, inner, sq_rejected], 1).view(-1, 2, 2)
            weights = self._weights_of(pairs).view(-1, 2, len(pairs)).permute(2, 0, 1)  # (n, D, 2)
            own = self._total.own_of(module)
            own.index_add_(0, self._groups[pairs], weights @ square @ weights.transpose(1, 2))
            for number, twins in enumerate(self.twins):
                if (gram := self._twin_grams.get((module, number))) is None:  # no pass used the module
                    continue
                whole = self._is_whole[twins]
                others = gram.view(2, len(twins), 2, len(twins))[:, whole][..., whole].clone()
                others.diagonal(dim1=1, dim2=3).zero_()  # a pair's products with itself are counted above
                weights = self._weights_of(twins[whole])
                own[int(self._groups[twins[0]])] += weights @ others.flatten(2).flatten(0, 1) @ weights.T
        for prompt in self._by_prompt:
            if count := int(self._is_whole[prompt].sum()):
                self._total.count(self._prompts[int(prompt[0])], int(self._groups[prompt[0]]), count)
        broken = (self._groups != LEFT_OUT) & ~self._is_whole
        if not broken.any():
            return None
        undo = PassSums(
            self._total,
            torch.where(broken, self._groups, LEFT_OUT),
            self._prompts,
            self._further,
            -self._sign,
        )
        undo.twins = []
        return undo

    def _leave_out(self, broken: Tensor) -> None:
        self._is_whole &= ~broken

    def _by_group(self, pairs: Tensor, is_finite: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(group, positions in `pairs`) of what is to be added; pairs that prove broken are left out from here on."""
        is_finite = is_finite.cpu()
        self._leave_out(torch.zeros_like(self._is_whole).index_put_((pairs,), ~is_finite))
        usable = (self._is_whole[pairs]).nonzero()[:, 0]
        groups = self._groups[pairs[usable]]
        return ((group, usable[groups == group]) for group in groups.unique().tolist())

    def _weights_of(self, pairs: Tensor) -> Tensor:
        """`(D, 2m)`."""
        if self._weights is None:
            raise RuntimeError(
                "The weights of the further directions aren't known before the pass's log-probs."
            )
        return self._weights[:, torch.cat([pairs, pairs + len(self._groups)])]


@dataclass(frozen=True)
class Sink:
    """Where the scores of one parameter go.

    Args:
        sums: those of the pass.
        name: the parameter.
    """

    sums: PassSums
    name: str

    def add(self, value: Tensor, is_finite: Tensor, start: int) -> None:
        """See `PassSums.add`.

        Args:
            value: what is added, a row per pair.
            is_finite: `(pairs,)` bool: pairs that count.
            start: the first row of the parameter that it is of.
        """
        self.sums.add(self.name, value, is_finite, start=start)

    def add_factored(self, score: Score, is_finite: Tensor) -> None:
        """See `PassSums.add_factored`.

        Args:
            score: scores as terms.
            is_finite: `(pairs,)` bool: pairs that count.
        """
        self.sums.add_factored(self.name, score, is_finite)


def weighted_sums(term: Term, weights: Tensor) -> Tensor:
    """sum_i weights_ki term_i for every k: `(K, a, b)` float32.

    Args:
        term: `(m rows)`.
        weights: `(K, m)`.
    """
    if not isinstance(term, Outer):
        value = term.value.flatten(1).float()
        return (weights.to(value) @ value).view(len(weights), *term.value.shape[1:])
    total = torch.zeros(len(weights), term.left.shape[-1], term.right.shape[-1], device=term.device)
    for into, weight in zip(total, weights, strict=True):
        add_term(into, term, weight.to(into))
    return total


def add_term(into: Tensor, term: Term, weight: Tensor) -> None:
    """Add sum_i weight_i term_i to `into` `(a, b)`, in place.

    Args:
        into: the sum.
        term: m rows.
        weight: `(m,)`.
    """
    if not isinstance(term, Outer):
        into.add_(torch.tensordot(weight.to(into), term.value.to(into), 1).view_as(into))
        return
    left, right, (a, b) = term.left, term.right, into.shape
    weight = weight[:, None, None]
    if isinstance(left, OneHot):
        assert isinstance(right, Tensor)
        into.index_add_(0, left.index.flatten(), (right * weight.to(right)).to(into).reshape(-1, b))
    elif isinstance(right, OneHot):
        into.index_add_(1, right.index.flatten(), (left * weight.to(left)).to(into).reshape(-1, a).T)
    else:
        scaled = left if bool((weight == 1).all()) else left * weight.to(left)
        into.addmm_(scaled.reshape(-1, a).T.to(into), right.reshape(-1, b).to(into))

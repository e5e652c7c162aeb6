"""Dot products of factored scores without writing them out (the "ghost" form).

One side of the outer products is taken as the kernel side, with vectors u_s, the other with vectors v_s:

    <sum_s u_s v_s^T, sum_t u'_t v'_t^T> = sum_st (u_s . u'_t) (v_s . v'_t) = sum_s v_s . (K v')_s

Positions that responses share (the prompt's activations) enter the kernel K once, and the difference of two
scores is formed in v, before any product: gaps keep their digits. Cost per prompt for S positions and K
responses: S^2 (dim u + K dim v), whatever the size of the matrix; without dim u where a layer reads the same
input as the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entangle.scores.terms import Factor, OneHot, Outer, Score, slice_elements

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Ghost:
    """Scores as sum over parts j and positions s of u_js v_js^T.

    Args:
        kernels: u of every part, `(n, S_j, dim u)`; shared by all members.
        values: by member and part, v `(n, S_j, dim v)`; None where the member has no such part.
    """

    kernels: tuple[Factor, ...]
    values: tuple[tuple[Tensor | None, ...], ...]

    @classmethod
    def from_score(cls, score: Score, side: Side) -> Ghost | None:
        """With `side` as the kernel side; None if the other side isn't a plain tensor everywhere."""
        kernels: list[Factor] = []
        values: list[dict[int, Tensor]] = []
        for member in score.members:
            values.append({})
            for term in member:
                if not isinstance(term, Outer):
                    return None
                u, v = (term.left, term.right) if side == "left" else (term.right, term.left)
                if isinstance(v, OneHot):
                    return None
                part = next((j for j, other in enumerate(kernels) if _is_same(other, u)), len(kernels))
                if part == len(kernels):
                    kernels.append(u)
                values[-1][part] = values[-1][part] + v if part in values[-1] else v
        parts = range(len(kernels))
        return cls(tuple(kernels), tuple(tuple(member.get(j) for j in parts) for member in values))

    def pair_block(self, kernels: Kernels) -> Tensor:
        """(A, B, c, A - c, B - c) of two members, `(5, n)` float64.

        With b the shorter score and d the longer one minus b, three products say all:

            |b|^2,   <b, longer> = |b|^2 + <b, d>,   |longer|^2 = |b|^2 + 2 <b, d> + |d|^2

        and the gaps are -<b, d> and <b, d> + |d|^2. No term exceeds the result's own scale, so no digit is lost.
        """
        n, device = self.kernels[0].shape[0], self.kernels[0].device
        chosen_size, rejected_size = map(_size, self.values)
        chosen_is_shorter = chosen_size <= rejected_size  # by v alone: the choice decides on rounding only
        mask = chosen_is_shorter[:, None, None]
        kernel = kernels.of(self.kernels)
        step = max(1, slice_elements(device) // (2 * n * kernel.shape[1]))
        total = torch.zeros(3, n, dtype=torch.float64, device=device)
        for start in range(0, self.width, step):
            one, other = (self._columns(member, slice(start, start + step)) for member in self.values)
            base = torch.where(mask, one, other)
            difference = torch.where(mask, other, one) - base
            along_base, along_difference = (kernel.to(base) @ torch.cat([base, difference], -1)).chunk(2, -1)
            pairs = ((base, along_base), (base, along_difference), (difference, along_difference))
            total += torch.stack([(x * y).sum((1, 2)) for x, y in pairs]).double()
        shorter_sq, cross, difference_sq = total
        longer_sq, longer_gap = shorter_sq + 2 * cross + difference_sq, cross + difference_sq
        return torch.stack([
            torch.where(chosen_is_shorter, shorter_sq, longer_sq),
            torch.where(chosen_is_shorter, longer_sq, shorter_sq),
            shorter_sq + cross,
            torch.where(chosen_is_shorter, -cross, longer_gap),
            torch.where(chosen_is_shorter, longer_gap, -cross),
        ])  # fmt: skip

    @property
    def width(self) -> int:
        """Dim v."""
        return next(v.shape[-1] for member in self.values for v in member if v is not None)

    def rolled(self, shift: int) -> Ghost:
        """Prompt i + shift in the place of prompt i."""
        n = self.kernels[0].shape[0]
        order = (torch.arange(n) + shift) % n
        return Ghost(
            tuple(kernel[order] for kernel in self.kernels),
            tuple(tuple(None if v is None else v[order] for v in member) for member in self.values),
        )

    def dots(self, other: Ghost) -> Tensor:
        """<score of member k, score of the other's member l> prompt by prompt: `(K, L, n)` float64."""
        n, device = self.kernels[0].shape[0], self.kernels[0].device
        total = torch.zeros(len(self.values), len(other.values), n, dtype=torch.float64, device=device)
        for i, u in enumerate(self.kernels):
            for j, w in enumerate(other.kernels):
                kernel = _kernel(u, w)  # (n, S_i, S_j)
                for m, theirs in enumerate(other.values):
                    if (value := theirs[j]) is None:
                        continue
                    moved = kernel.to(value) @ value
                    for k, ours in enumerate(self.values):
                        if (mine := ours[i]) is not None:
                            total[k, m] += (mine * moved).sum((1, 2), dtype=torch.float64)
        return total

    def cost(self, members: int) -> int:
        """Multiply-adds per prompt of `dots` with as many members on the other side."""
        positions = sum(kernel.shape[1] for kernel in self.kernels)
        kernel_width = sum(
            kernel.shape[1] * (1 if isinstance(kernel, OneHot) else kernel.shape[2])
            for kernel in self.kernels
        )
        return positions * kernel_width + positions**2 * members * self.width

    def _columns(self, member: Sequence[Tensor | None], columns: slice) -> Tensor:
        """Columns of v at all positions, `(n, S, columns)`; 0 at positions that the member doesn't have."""
        like = next(v for v in member if v is not None)[..., columns]
        return torch.cat([
            like.new_zeros(len(like), u.shape[1], like.shape[2]) if v is None else v[..., columns]
            for u, v in zip(self.kernels, member, strict=True)
        ], 1)  # fmt: skip


class Kernels:
    """K over the positions of all parts, kept for the next layer: q, k and v read one input, gate and up too."""

    def __init__(self) -> None:
        self._parts: tuple[Factor, ...] = ()
        self._kernel = torch.empty(0)

    def of(self, parts: tuple[Factor, ...]) -> Tensor:
        """`(n, S, S)`, the parts one after another."""
        if len(parts) != len(self._parts) or not all(map(_is_same, parts, self._parts)):
            self._parts, self._kernel = parts, _joint_kernel(parts)
        return self._kernel


def cheapest_ghost(score: Score, members: int) -> Ghost | None:
    """The cheaper choice of the kernel side, or None if the score has no ghost form."""
    sides: Sequence[Side] = ("left", "right")
    ghosts = [ghost for side in sides if (ghost := Ghost.from_score(score, side)) is not None]
    return min(ghosts, key=lambda ghost: ghost.cost(members), default=None)


def _kernel(a: Factor, b: Factor) -> Tensor:
    """Inner products of all positions, prompt by prompt: `(n, S, S')`."""
    if isinstance(a, OneHot):
        if isinstance(b, OneHot):
            return (a.index[:, :, None] == b.index[:, None, :]).float()
        return _kernel(b, a).transpose(1, 2)
    if isinstance(b, OneHot):
        return a.gather(2, b.index[:, None, :].expand(-1, a.shape[1], -1))
    return a @ b.transpose(1, 2)


def _joint_kernel(parts: Sequence[Factor]) -> Tensor:
    """Inner products of all positions of all parts, `(n, S, S)`; symmetric, so half of its blocks are computed."""
    blocks = [[_kernel(u, w) for w in parts[i:]] for i, u in enumerate(parts)]
    return torch.cat([
        torch.cat([blocks[j][i - j].transpose(1, 2) if j < i else blocks[i][j - i] for j in range(len(parts))], 2)
        for i in range(len(parts))
    ], 1)  # fmt: skip


def _size(member: Sequence[Tensor | None]) -> Tensor:
    """|v|^2 by prompt, `(n,)`."""
    return torch.stack([v.square().sum((1, 2)) for v in member if v is not None]).sum(0)


def _is_same(a: Factor, b: Factor) -> bool:
    """Whether two factors are one tensor, not merely equal."""
    if isinstance(a, OneHot) or isinstance(b, OneHot):
        return isinstance(a, OneHot) and isinstance(b, OneHot) and _is_same(a.index, b.index)
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())

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
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from entangle.scores.terms import Factor, OneHot, Outer, Score, slice_elements

Side = Literal["left", "right"]

BLOCK = 96
"""Positions that a block of a kernel has at most."""


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
        """With `side` as the kernel side; None if the other side isn't a plain tensor everywhere.

        Args:
            score: a parameter's scores as terms.
            side: the side of the factors of which the kernel is taken.
        """
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
        rows = kernels.of(self.kernels)
        positions = rows[0].shape[2]
        prompts = max(1, slice_elements(device) // (positions * self.width))
        step = max(1, slice_elements(device) // (positions * min(prompts, n)))
        products = torch.zeros(n, 2, 2, dtype=torch.float64, device=device)
        for first, start in product(range(0, n, prompts), range(0, self.width, step)):
            part = slice(first, first + prompts)
            values = self._base_and_difference(part, slice(start, start + step), chosen_is_shorter[part])
            for row in rows:
                after = values[:, -row.shape[2] :]
                products[part] += _two_by_two(after[:, : row.shape[1]], row[part].to(values) @ after)
        shorter_sq, difference_sq = products[:, 0, 0], products[:, 1, 1]
        cross = (products[:, 0, 1] + products[:, 1, 0]) / 2
        cross = torch.where(chosen_is_shorter, cross, -cross)  # the difference was rejected - chosen
        longer_sq, longer_gap = shorter_sq + 2 * cross + difference_sq, cross + difference_sq
        return torch.stack(
            [
                torch.where(chosen_is_shorter, shorter_sq, longer_sq),
                torch.where(chosen_is_shorter, longer_sq, shorter_sq),
                shorter_sq + cross,
                torch.where(chosen_is_shorter, -cross, longer_gap),
                torch.where(chosen_is_shorter, longer_gap, -cross),
            ]
        )

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

    @property
    def pair_cost(self) -> int:
        """Multiply-adds per prompt of `pair_block`: those of `dots`, less what the symmetry of K saves."""
        positions = sum(kernel.shape[1] for kernel in self.kernels)
        return round(self.cost(2) * min(1.0, (1 + BLOCK / positions) / 2))

    def _base_and_difference(self, prompts: slice, columns: slice, chosen_is_shorter: Tensor) -> Tensor:
        """Columns of two members' v: the shorter score's, then rejected - chosen, `(n, S, 2 c)`."""
        like = next(v for v in self.values[0] if v is not None)[prompts, :, columns]
        n, width, zero = len(like), like.shape[2], like.new_zeros(())
        out = like.new_empty(n, sum(u.shape[1] for u in self.kernels), 2 * width)
        is_chosen = chosen_is_shorter[:, None, None]
        parts = out.split([u.shape[1] for u in self.kernels], 1)
        for part, *members in zip(parts, *self.values, strict=True):
            chosen, rejected = (zero if v is None else v[prompts, :, columns] for v in members)
            torch.where(is_chosen, chosen, rejected, out=part[..., :width])
            torch.sub(rejected, chosen, out=part[..., width:])
        return out


class Kernels:
    """K over the positions of all parts, kept for the next layer: q, k and v read one input, gate and up too."""

    def __init__(self) -> None:
        self._parts: tuple[Factor, ...] = ()
        self._rows: list[Tensor] = []

    def of(self, parts: tuple[Factor, ...]) -> list[Tensor]:
        """K's rows by blocks of positions, `(n, block, positions from the block on)`, see `_block_rows`."""
        if len(parts) != len(self._parts) or not all(map(_is_same, parts, self._parts)):
            self._parts, self._rows = parts, _block_rows(parts)
        return self._rows


def cheapest_ghost(score: Score, members: int) -> Ghost | None:
    """The cheaper choice of the kernel side, or None if the score has no ghost form.

    Args:
        score: a parameter's scores as terms.
        members: rows per prompt.
    """
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


def _block_rows(parts: Sequence[Factor]) -> list[Tensor]:
    """A block triangular U with v^T U v = v^T K v for all v: K's blocks on the diagonal, twice those above it.

    K is symmetric, so what stands below the diagonal needn't be computed, nor multiplied by.
    """
    rows, parts = [], _joined(parts)
    for j, u in enumerate(parts):
        for start in range(0, u.shape[1], BLOCK):
            block = u[:, start : start + BLOCK]
            row = torch.cat([_kernel(block, w) for w in (u[:, start:], *parts[j + 1 :])], 2)
            row[:, :, block.shape[1] :] *= 2
            rows.append(row)
    return rows


def _joined(parts: Sequence[Factor]) -> Sequence[Factor]:
    """The parts as one where they are of one kind: fewer and larger products."""
    plain = [part for part in parts if isinstance(part, Tensor)]
    hot = [part for part in parts if isinstance(part, OneHot)]
    if plain and hot:
        return parts
    return (
        [torch.cat(plain, 1)] if plain else [OneHot(torch.cat([part.index for part in hot], 1), hot[0].size)]
    )


def _two_by_two(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the halves (by columns) of x with those of y `(n, S, 2 c)`: `(n, 2, 2)` float64."""
    n, positions, width = x.shape
    halves = (z.reshape(n * positions, 2, width // 2) for z in (x, y))
    return torch.einsum("sac,sbc->sab", *halves).view(n, positions, 2, 2).sum(1, dtype=torch.float64)


def _size(member: Sequence[Tensor | None]) -> Tensor:
    """|v|^2 by prompt, `(n,)`."""
    return torch.stack(
        [torch.linalg.vector_norm(v, dim=(1, 2)).square() for v in member if v is not None]
    ).sum(0)


def _is_same(a: Factor, b: Factor) -> bool:
    """Whether two factors are one tensor, not merely equal."""
    if isinstance(a, OneHot) or isinstance(b, OneHot):
        return isinstance(a, OneHot) and isinstance(b, OneHot) and _is_same(a.index, b.index)
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())

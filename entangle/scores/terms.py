"""Scores of one parameter for many rows, held as sums of outer products.

A parameter counts as a matrix (a, b); a row's score in it is a sum of terms, each either an outer product
over the row's positions s, sum_s left_s right_s^T (`Outer`), or written out (`Dense`). Linear layers,
embeddings (left is one-hot), LoRA factors and tied weights (two terms) are all of this form, so whatever is
asked of scores is written once, here and in `reduce`, for all of them. Two ways to take dot products:

    written out  form (rows, a, b), in slices of a, and multiply: S a b per row
    ghost        <sum_s l_s r_s^T, sum_t l'_t r'_t^T> = sum_st (l_s . l'_t) (r_s . r'_t): S S' (a + b)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SLICE_ELEMENTS = 2**24
"""Most elements that a written-out slice of scores has, over all rows."""


@dataclass(frozen=True)
class OneHot:
    """A factor whose vectors are unit vectors e_index of length `size`; `index` is `(rows, S)` int64."""

    index: Tensor
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """`(rows, S, size)`."""
        return (*self.index.shape, self.size)

    def __getitem__(self, rows: slice | Tensor) -> OneHot:
        """Some of the rows."""
        return OneHot(self.index[rows], self.size)


Factor = Tensor | OneHot


@dataclass(frozen=True)
class Outer:
    """sum_s left_s right_s^T for every row: `left` `(rows, S, a)`, `right` `(rows, S, b)`."""

    left: Factor
    right: Factor

    def __getitem__(self, rows: slice | Tensor) -> Outer:
        """Some of the rows."""
        return Outer(self.left[rows], self.right[rows])

    @property
    def positions(self) -> int:
        """S."""
        return self.left.shape[1]

    def as_matrices(self, shape: tuple[int, int]) -> Outer:
        """This term, checked to be of the parameter's matrix shape."""
        if (self.left.shape[-1], self.right.shape[-1]) != shape:
            raise ValueError(
                f"A rule gave factors {self.left.shape} and {self.right.shape} for a matrix {shape}."
            )
        return self

    @property
    def is_dense(self) -> bool:
        """Neither factor is one-hot."""
        return isinstance(self.left, Tensor) and isinstance(self.right, Tensor)

    def write_out(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the matrix, `(rows, stop - start, b)`."""
        if isinstance(self.left, OneHot):
            if isinstance(self.right, OneHot):
                raise TypeError("An outer product of two one-hot factors isn't a score.")
            return _scatter(self.left.index - start, self.right, stop - start)
        left = self.left[..., start:stop]
        if isinstance(self.right, OneHot):
            return _scatter(self.right.index, left, self.right.size).transpose(1, 2)
        return left.transpose(1, 2) @ self.right

    def product(self, direction: Tensor) -> Tensor:
        """<score, direction> with direction `(a, b)`: `(rows,)` float64."""
        if isinstance(self.left, OneHot):
            moved = direction[self.left.index]  # (rows, S, b)
        else:
            moved = self.left @ direction.to(self.left)
        if isinstance(self.right, OneHot):
            return moved.gather(-1, self.right.index[..., None]).sum((1, 2), dtype=torch.float64)
        return (moved.to(self.right) * self.right).sum((1, 2), dtype=torch.float64)


@dataclass(frozen=True)
class Dense:
    """Scores written out: `value` `(rows, ...)`, of the parameter's shape or (a, b)."""

    value: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Dense:
        """Some of the rows."""
        return Dense(self.value[rows])

    def as_matrices(self, shape: tuple[int, int]) -> Dense:
        """This term as `(rows, a, b)`."""
        return Dense(self.value.reshape(len(self.value), *shape))

    def write_out(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the matrix, `(rows, stop - start, b)`."""
        return self.value[:, start:stop]

    def product(self, direction: Tensor) -> Tensor:
        """<score, direction> with direction `(a, b)`: `(rows,)` float64."""
        return (self.value * direction.to(self.value)).sum((1, 2), dtype=torch.float64)


Term = Outer | Dense


@dataclass(frozen=True)
class Score:
    """One parameter's scores for all rows: the sum of `terms`, as matrices of `shape` (a, b)."""

    terms: tuple[Term, ...]
    shape: tuple[int, int]

    def __getitem__(self, rows: slice | Tensor) -> Score:
        """Some of the rows."""
        return Score(tuple(term[rows] for term in self.terms), self.shape)

    def __len__(self) -> int:
        first = self.terms[0]
        return len(first.value) if isinstance(first, Dense) else first.left.shape[0]

    def slices(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, scores `(rows, stop - start, b)`) over all of a, a bounded amount at a time."""
        a, b = self.shape
        step = max(1, min(a, SLICE_ELEMENTS // (len(self) * b)))
        for start in range(0, a, step):
            stop = min(start + step, a)
            value = self.terms[0].write_out(start, stop)
            for term in self.terms[1:]:
                value = value + term.write_out(start, stop)
            yield start, stop, value

    def product(self, direction: Tensor) -> Tensor:
        """<score, direction> for every row, `(rows,)` float64; direction `(a, b)`."""
        return torch.stack([term.product(direction) for term in self.terms]).sum(0)


def ghost_dots(a: Sequence[Outer], b: Sequence[Outer]) -> Tensor:
    """<score a_i, score b_i> row by row without writing scores out, `(rows,)` float64.

    The kernels are taken in float64: then a difference of two results loses nothing but what the factors
    themselves carry, so gaps may be formed from them.
    """
    total = 0
    for x in a:
        for y in b:
            kernel = _kernel(x.left, y.left) * _kernel(x.right, y.right)
            total = total + kernel.sum((1, 2))
    return torch.as_tensor(total)


def ghost_cost(a: Sequence[Outer], b: Sequence[Outer], shape: tuple[int, int]) -> int:
    """Multiply-adds of one row of `ghost_dots`; a float64 one counts as two."""
    return 2 * sum(x.positions * y.positions for x in a for y in b) * sum(shape)


def _kernel(a: Factor, b: Factor) -> Tensor:
    """Inner products of all positions, row by row: `(rows, S, S')` float64."""
    if isinstance(a, OneHot) and isinstance(b, OneHot):
        return (a.index[:, :, None] == b.index[:, None, :]).double()
    if isinstance(a, OneHot):
        return _kernel(b, a).transpose(1, 2)
    if isinstance(b, OneHot):
        return a.gather(2, b.index[:, None, :].expand(-1, a.shape[1], -1)).double()
    return a.double() @ b.double().transpose(1, 2)


def _scatter(index: Tensor, value: Tensor, size: int) -> Tensor:
    """Sum `value` `(rows, S, k)` into `(rows, size, k)` at `index` `(rows, S)`; the rest is dropped."""
    rows, _, width = value.shape
    flat = index + size * torch.arange(rows, device=index.device)[:, None]
    inside = (index >= 0) & (index < size)
    out = value.new_zeros(rows * size, width)
    return out.index_add_(0, flat[inside], value[inside]).view(rows, size, width)

"""Scores of one parameter for many rows, held as sums of outer products.

A parameter counts as a matrix (a, b); a row's score in it is a sum of terms, each either an outer product
over the row's positions s, sum_s left_s right_s^T (`Outer`), or written out (`Dense`). Linear layers,
embeddings (left is one-hot), LoRA factors and tied weights (two terms) are all of this form, so whatever is
asked of scores is written once, over `Score`, for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SLICE_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""Most elements that a written-out slice of scores has, over all rows: what the device's cache likes."""


def module_name(parameter: str) -> str:
    """The module that a parameter is reported under: its name without the last part."""
    return parameter.rpartition(".")[0] or parameter


def slice_elements(device: torch.device) -> int:
    """`SLICE_ELEMENTS` of a device; an accelerator's where its kind isn't listed."""
    return SLICE_ELEMENTS.get(device.type, SLICE_ELEMENTS["cuda"])


@dataclass(frozen=True)
class OneHot:
    """A factor whose vectors are unit vectors e_index of length `size`; `index` is `(rows, S)` int64."""

    index: Tensor
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """`(rows, S, size)`."""
        return (*self.index.shape, self.size)

    @property
    def device(self) -> torch.device:
        """Where the indices are."""
        return self.index.device

    def __getitem__(self, rows: slice | Tensor | tuple[slice, slice]) -> OneHot:
        """Some of the rows, or of the rows and positions."""
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

    def __len__(self) -> int:
        return self.left.shape[0]

    @property
    def positions(self) -> int:
        """S."""
        return self.left.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.left.device

    def as_matrices(self, shape: tuple[int, int]) -> Outer:
        """This term, checked to be of the parameter's matrix shape."""
        if (self.left.shape[-1], self.right.shape[-1]) != shape:
            raise ValueError(
                f"A rule gave factors {self.left.shape} and {self.right.shape} for a matrix {shape}."
            )
        return self

    def compact(self) -> Outer | Dense:
        """Written out if that is far smaller than the factors (LoRA), so that these needn't be kept."""
        a, b = self.left.shape[-1], self.right.shape[-1]
        is_plain = isinstance(self.left, Tensor) and isinstance(self.right, Tensor)
        small = is_plain and 4 * a * b < self.positions * (a + b)
        return Dense(self.write_out(0, a)) if small else self

    def write_out(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the matrix, `(rows, stop - start, b)`.

        Args:
            start: the first row.
            stop: the row after the last.
        """
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

    def __len__(self) -> int:
        return len(self.value)

    @property
    def device(self) -> torch.device:
        """Where the value is."""
        return self.value.device

    def as_matrices(self, shape: tuple[int, int]) -> Dense:
        """This term as `(rows, a, b)`."""
        return Dense(self.value.reshape(len(self.value), *shape))

    def compact(self) -> Dense:
        """This term."""
        return self

    def write_out(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the matrix, `(rows, stop - start, b)`.

        Args:
            start: the first row.
            stop: the row after the last.
        """
        return self.value[:, start:stop]

    def product(self, direction: Tensor) -> Tensor:
        """<score, direction> with direction `(a, b)`: `(rows,)` float64."""
        return (self.value * direction.to(self.value)).sum((1, 2), dtype=torch.float64)


Term = Outer | Dense


@dataclass(frozen=True)
class Score:
    """One parameter's scores for K responses to each of n prompts, as matrices of `shape` (a, b).

    `members[k]` are the terms of the k-th response to every prompt, n rows each; a score is their sum. Terms
    of a prompt's responses may share a factor (the prompt's activations): then it is the very same tensor.
    """

    members: tuple[tuple[Term, ...], ...]
    shape: tuple[int, int]

    @property
    def prompts(self) -> int:
        """The number of prompts, n."""
        return len(self.members[0][0])

    @property
    def device(self) -> torch.device:
        """Where the terms are."""
        return self.members[0][0].device

    def __len__(self) -> int:
        return len(self.members) * self.prompts

    def of(self, prompts: Tensor) -> Score:
        """The responses to some of the prompts."""
        rows = prompts.to(self.device)
        return Score(tuple(tuple(term[rows] for term in member) for member in self.members), self.shape)

    def first_row(self, member: int = 0) -> Score:
        """The first row of a member alone."""
        return Score((tuple(term[:1] for term in self.members[member]),), self.shape)

    def slices(self, at_least: int = 0) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, scores `(rows, stop - start, b)`) over all of a, a bounded amount at a time.

        That is what the device's cache likes, or `at_least` elements.
        """
        a, b = self.shape
        step = max(1, min(a, max(at_least, slice_elements(self.device)) // (len(self) * b)))
        for start in range(0, a, step):
            stop = min(start + step, a)
            yield start, stop, torch.cat([_sum_of(member, start, stop) for member in self.members])

    def product(self, direction: Tensor) -> Tensor:
        """<score, direction> for every row, `(rows,)` float64; direction `(a, b)`."""
        return torch.cat(
            [torch.stack([term.product(direction) for term in member]).sum(0) for member in self.members]
        )


def _sum_of(terms: tuple[Term, ...], start: int, stop: int) -> Tensor:
    value = terms[0].write_out(start, stop)
    for term in terms[1:]:
        value = value + term.write_out(start, stop)
    return value


def _scatter(index: Tensor, value: Tensor, size: int) -> Tensor:
    """Sum `value` `(rows, S, k)` into `(rows, size, k)` at `index` `(rows, S)`; the rest is dropped."""
    rows, _, width = value.shape
    flat = index + size * torch.arange(rows, device=index.device)[:, None]
    inside = (index >= 0) & (index < size)
    out = value.new_zeros(rows * size, width)
    return out.index_add_(0, flat[inside], value[inside]).view(rows, size, width)

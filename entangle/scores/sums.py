"""Sums of scores over groups of pairs, gathered in the very pass that measures the pairs.

What a set of pairs does is decided by the products of its mean scores (`entangle.analysis.sets`). They need only

    T_d[g] = sum over the pairs i of group g of (weight_di S_wi + weight'_di S_li)

Direction 0 has weights (1, 0): all chosen scores; direction 1 has (0, 1): all rejected ones. Further directions carry
weights of their own for every pair, such as a loss's incentives (d_wi, -d_li): its gradient. Sums add up over passes,
shards and processes; their Gram matrix, which doesn't, is taken once they are all together.

Beside them stand each group's own terms, the sum of <S_pd, P S_pe> over its prompts p, S_pd a prompt's part of T_d:
taken off a group's product with itself, they leave products of different prompts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from entangle.errors import RunError
from entangle.scores.reduce import dots
from entangle.scores.summing import LEFT_OUT, PassSums, Weights
from entangle.scores.terms import module_name


@dataclass(frozen=True)
class SumGram:
    """Products of group sums over some parameters, for G groups and D directions.

    Args:
        products: `(G, D, G, D)` float64, <T_d[g], P T_e[h]>.
        own: `(G, D, D)` float64, sum over a group's prompts of <S_pd, P S_pe>; NaN where a prompt's pairs came in
            several passes, so that their products with each other were never met.
        pairs: `(G,)` int64, pairs in each group.
        squares: `(G,)` int64, sum over a group's prompts of the square of their number of pairs.
        prompts: `(G,)` int64, prompts in each group.
    """

    products: Tensor
    own: Tensor
    pairs: Tensor
    squares: Tensor
    prompts: Tensor


class Counted(NamedTuple):
    """What sums hold beside the sums themselves: see `GroupSums`."""

    own: dict[str, Tensor]
    pairs: Tensor
    squares: Tensor
    is_torn: Tensor
    prompts: dict[int, int]


class GroupSums:
    """Sums of scores by group and direction: filled through `of_pass`, joined by `merge`, read by `gram`.

    A sum takes 4 bytes (8 in float64) times groups, directions and parameters: `memory`.

    Args:
        parameters: the probed parameters by name.
        groups: G.
        directions: D; 2, and one for every further direction.
        shards: numbers of the shards whose pairs are in here; for the caller to keep.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: int,
        *,
        directions: int = 2,
        shards: Sequence[int] = (),
    ) -> None:
        self.parameters, self.directions, self.shards = dict(parameters), directions, set(shards)
        self._sums: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._pairs, self._squares = torch.zeros(2, groups, dtype=torch.int64)
        self._is_torn = torch.zeros(groups, dtype=torch.bool)
        self._prompts: dict[int, int] = {}

    @property
    def groups(self) -> int:
        """G."""
        return len(self._pairs)

    @property
    def pairs(self) -> int:
        """Pairs that were summed."""
        return int(self._pairs.sum())

    @property
    def prompts(self) -> int:
        """Prompts that these have."""
        return len(self._prompts)

    def of_pass(self, groups: Tensor, prompts: Sequence[str], weights: Weights | None = None) -> PassSums:
        """Where the n pairs of a pass go: hand it to `Engine.pairs`.

        Args:
            groups: `(n,)` int64; `LEFT_OUT` (-1) for a pair that isn't to be summed.
            prompts: `(n,)`, what tells prompts apart. All pairs of a prompt belong in one group, and in one pass if
                their products with each other are to be known.
            weights: of the directions after the second, from the pass's log-probs.

        Raises:
            ValueError: a group doesn't exist, a prompt is in two groups, or weights are missing or not asked for.
        """
        if (
            not len(groups) == len(prompts)
            or not LEFT_OUT <= int(groups.min()) <= int(groups.max()) < self.groups
        ):
            raise ValueError(
                f"Expected a prompt and a group from -1 to {self.groups - 1} for every pair; got {len(prompts)} "
                f"prompts and groups {groups.tolist()}."
            )
        if (weights is None) != (self.directions == 2):
            raise ValueError(f"Expected weights for {self.directions - 2} further directions; got {weights}.")
        numbers = [_number_of(prompt) for prompt in prompts]
        known = dict(self._prompts)
        for number, prompt, group in zip(numbers, prompts, groups.tolist(), strict=True):
            if group != LEFT_OUT and known.setdefault(number, group) != group:
                raise ValueError(
                    f"Expected all pairs of a prompt in one group; those of {prompt!r} are in two."
                )
        return PassSums(self, groups.cpu(), numbers, weights)

    def add(self, prompt: str, group: int, parts: Mapping[str, Tensor]) -> None:
        """Add one prompt's whole part of every direction, written out: it counts as one pair.

        For scores whose sums were taken elsewhere, such as means over a prompt's answers.

        Args:
            prompt: what tells prompts apart; it must be added once.
            group: its group.
            parts: `(D, parameter's size)` by parameter.
        """
        for name, part in parts.items():
            into = self.sum_of(name)[group]
            into += part.to(into).view_as(into)
            self.own_of(module_name(name))[group] += dots(part, part).cpu()
        self.count(_number_of(prompt), group, 1)

    def merge(self, other: GroupSums) -> None:
        """Add what was summed elsewhere: by another process, or before a run was broken off.

        Raises:
            ValueError: other groups or directions, or a shard that is in here already.
        """
        mine, theirs = ((len(s._pairs), s.directions) for s in (self, other))
        if mine != theirs or self.shards & other.shards:
            raise ValueError(
                f"Expected sums of {mine} groups and directions over other shards than {sorted(self.shards)}; got "
                f"{theirs} over {sorted(other.shards)}."
            )
        for name, value in other._sums.items():
            self.sum_of(name).add_(value)
        for module, value in other._own.items():
            self.own_of(module).add_(value)
        self._pairs += other._pairs
        self._squares += other._squares
        self._is_torn |= other._is_torn
        for prompt, group in other._prompts.items():
            self._meet(prompt, group)
        self.shards |= other.shards

    def share(
        self, total: Callable[[Tensor], Tensor], gathered: Callable[[list[Counted]], list[Counted]]
    ) -> None:
        """Add what all processes summed, each over pairs of its own; each must call.

        Args:
            total: the sum of a tensor over processes.
            gathered: the lists of all processes, one behind the other.
        """
        own = Counted(self._own, self._pairs, self._squares, self._is_torn, self._prompts)
        whole = GroupSums({}, self.groups, directions=self.directions)
        for part in gathered([own]):
            other = GroupSums({}, self.groups, directions=self.directions)
            other._own, other._pairs, other._squares, other._is_torn, other._prompts = part
            whole.merge(other)
        self._own, self._pairs, self._squares = whole._own, whole._pairs, whole._squares
        self._is_torn, self._prompts = whole._is_torn, whole._prompts
        self._sums = {name: total(self.sum_of(name)) for name in self.parameters}

    def gram(self, metric: Mapping[str, Tensor] | None = None) -> SumGram:
        """Products over all parameters; `metric` is the one that the passes had."""
        modules = list(self.module_grams(metric).values())
        products, own = (
            torch.stack([getattr(m, part) for m in modules]).sum(0) for part in ("products", "own")
        )
        return replace(modules[0], products=products, own=own)

    def module_grams(self, metric: Mapping[str, Tensor] | None = None) -> dict[str, SumGram]:
        """Products over the parameters of each module alone: they add up to `gram`."""
        shape = (self.groups, self.directions)
        products = {
            module_name(name): torch.zeros(*shape, *shape, dtype=torch.float64) for name in self.parameters
        }
        for name, value in self._sums.items():
            flat = value.reshape(self.groups * self.directions, -1)
            weighted = flat if metric is None else flat * metric[name].to(flat).reshape(1, -1)
            products[module_name(name)] += dots(weighted, flat).cpu().view(*shape, *shape)
        prompts = torch.tensor(list(self._prompts.values()), dtype=torch.int64).bincount(
            minlength=self.groups
        )
        unknown = torch.where(self._is_torn, torch.nan, 0.0)[:, None, None]
        return {
            module: SumGram(value, self.own_of(module) + unknown, self._pairs, self._squares, prompts)
            for module, value in products.items()
        }

    def sum_of(self, name: str) -> Tensor:
        """T of one parameter, to be added to: `(G, D, *shape)`, in float32 at least, on the parameter's device."""
        if name not in self._sums:
            parameter = self.parameters[name]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            shape = (self.groups, self.directions, *parameter.shape)
            self._sums[name] = torch.zeros(shape, dtype=dtype, device=parameter.device)
        return self._sums[name]

    def own_of(self, module: str) -> Tensor:
        """Own terms of one module, to be added to: `(G, D, D)` float64."""
        shape = (self.groups, self.directions, self.directions)
        return self._own.setdefault(module, torch.zeros(shape, dtype=torch.float64))

    def count(self, prompt: int, group: int, pairs: int) -> None:
        """Count a pass's pairs of one prompt.

        Args:
            prompt: number of the prompt.
            group: number of the group.
            pairs: how many.
        """
        self._pairs[group] += pairs
        self._squares[group] += pairs**2
        self._meet(prompt, group)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, whole or not at all."""
        tensors = {f"sum/{name}": value.cpu() for name, value in self._sums.items()}
        tensors |= {f"own/{module}": value for module, value in self._own.items()}
        tensors |= {
            "pairs": self._pairs.clone(),
            "squares": self._squares.clone(),
            "is_torn": self._is_torn,
            "shards": torch.tensor(sorted(self.shards), dtype=torch.int64),
            "prompts": torch.tensor(list(self._prompts.items()), dtype=torch.int64).view(-1, 2),
        }
        unfinished = Path(f"{path}.unfinished")
        save_file(tensors, unfinished, {"directions": str(self.directions)})
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | Path, parameters: Mapping[str, nn.Parameter]) -> GroupSums:
        """What `save` wrote, on the devices of these parameters.

        Args:
            path: the file.
            parameters: the probed ones, by name.

        Raises:
            RunError: it holds sums of other parameters.
        """
        read = load_file(path)
        for name, value in _under("sum/", read).items():
            if name not in parameters or value.shape[2:] != parameters[name].shape:
                raise RunError(
                    f"{path} holds sums of other parameters than the run's ({name}); start the run anew."
                )
        directions = next((value.shape[1] for value in _under("own/", read).values()), 2)
        found = cls(parameters, len(read["pairs"]), directions=directions, shards=read["shards"].tolist())
        found._sums = {
            name: value.to(parameters[name].device) for name, value in _under("sum/", read).items()
        }
        found._own = _under("own/", read)
        found._pairs, found._squares, found._is_torn = read["pairs"], read["squares"], read["is_torn"]
        found._prompts = dict(read["prompts"].tolist())
        return found

    def _meet(self, prompt: int, group: int) -> None:
        """Remember a prompt. Met before, its pairs have products with each other that nobody took."""
        self._is_torn[group] |= prompt in self._prompts
        self._prompts[prompt] = group


def memory(parameters: Mapping[str, nn.Parameter], groups: int, directions: int = 2) -> int:
    """Bytes that `GroupSums` takes, in memory and in its file.

    Args:
        parameters: the probed ones, by name.
        groups: number of groups.
        directions: sums kept of each.
    """
    return groups * directions * sum(p.numel() * max(p.element_size(), 4) for p in parameters.values())


def _number_of(prompt: str) -> int:
    """63 bits of a prompt's hash."""
    return int.from_bytes(sha256(prompt.encode()).digest()[:8], "big") >> 1


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

"""Rotary factors that depend on the longest row of a call, and which rows may therefore be evaluated together.

transformers picks the factors of `longrope` (Phi) and `dynamic` (NTK) anew in every forward pass, from the largest
position in it: a row's log-probs then depend on the rows beside it, and a prompt that is evaluated once gets other
factors than the response after it. What a row's numbers mean here is fixed by the row alone, at its full length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LengthFactors:
    """How one rotary module's factors follow from a length.

    Args:
        kind: `longrope` (two sets of factors) or `dynamic` (a set for every length).
        original: the longest row, in tokens, that has the factors of short rows.
    """

    kind: str
    original: int

    def groups(self, lengths: Tensor) -> Tensor:
        """A number per row, `(rows,)` int64, equal for rows that have the same factors.

        Args:
            lengths: `(rows,)` int64, tokens.
        """
        if self.kind == "longrope":
            return (lengths > self.original).long()
        return lengths.clamp(min=self.original)


def length_factors(model: nn.Module) -> set[LengthFactors]:
    """The ways in which a model's rotary factors depend on length; empty for nearly all models.

    Args:
        model: the model.
    """
    return {
        LengthFactors(kind, original) for _, _, kind, original in _dependent(model) if original is not None
    }


def alike(model: nn.Module, lengths: Tensor) -> list[Tensor]:
    """Row numbers in groups whose rows have the same rotary factors, so that each group may share a forward pass.

    Args:
        model: the model.
        lengths: `(rows,)` int64, tokens of each row.
    """
    rules = length_factors(model)
    everything = torch.arange(len(lengths), device=lengths.device)
    if not rules:
        return [everything]
    keys = torch.stack([rule.groups(lengths) for rule in rules], 1)
    group = keys.unique(dim=0, return_inverse=True)[1]
    return [everything[group == number] for number in group.unique()]


def forget_lengths(model: nn.Module) -> None:
    """Reset factors that grew with a longer row of an earlier call: `dynamic` ones are kept until a short row comes.

    Args:
        model: the model.
    """
    for module, layer, kind, _ in _dependent(model):
        if kind == "dynamic":
            factors: Tensor = next(module.buffers())
            where = {} if layer is None else {"layer_type": layer}
            first = torch.zeros(1, 1, dtype=torch.long, device=factors.device)
            module(torch.zeros(1, device=factors.device), first, **where)


def _dependent(model: nn.Module) -> Iterator[tuple[nn.Module, str | None, str, int | None]]:
    """(module, layer type, kind, original length) of every rotary embedding whose factors depend on length."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind == "longrope":
                yield module, layer, kind, _long_from(module, layer)
            elif isinstance(kind, str) and "dynamic" in kind:
                yield module, layer, "dynamic", int(module.original_max_seq_len)  # pyright: ignore


def _long_from(module: Any, layer: str | None) -> int | None:
    """The longest row with short factors, where the installed transformers keeps it."""
    config = module.config
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parameters = parameters.get(layer, parameters)
    own = parameters.get("original_max_position_embeddings")
    return own or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings

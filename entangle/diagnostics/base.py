"""The registry: every diagnostic by name, with its columns, formula, source and cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from entangle.data import TokenizedPair
from entangle.diagnostics.reading import Reading
from entangle.errors import ConfigError
from entangle.models import Policy
from entangle.scores.rows import RowBatch

Cost = Literal["tokens", "forward", "reference", "backward"]
"""What it takes: the tokens alone, a forward pass, one of the reference too, or backward passes per pair."""


@dataclass(frozen=True)
class Diagnostic:
    """Numbers per pair.

    Args:
        name: what it is asked for by.
        columns: names of the numbers it gives.
        description: what they say, and which way they point.
        formula: how they come about.
        source: where they are from.
        cost: what it takes.
        measure: a reading of B pairs -> its columns, `(B,)` float64 each, on the CPU.
    """

    name: str
    columns: tuple[str, ...]
    description: str
    formula: str
    source: str
    cost: Cost
    measure: Callable[[Reading], dict[str, Tensor]]


DIAGNOSTICS: dict[str, Diagnostic] = {}
"""Every diagnostic by name."""


Measure = Callable[[Reading], dict[str, Tensor]]
"""From a reading of B pairs to its columns, `(B,)` float64 each, on the CPU."""


def diagnostic(
    name: str, *columns: str, description: str, formula: str, cost: Cost, source: str = ""
) -> Callable[[Measure], Measure]:
    """Register a function of a `Reading` as a diagnostic; its file in this folder is all that it takes.

    Args:
        name: what it is asked for by.
        columns: names of the numbers it gives; the name itself by default.
        description: what they say, and which way they point.
        formula: how they come about.
        cost: what it takes.
        source: where they are from.

    Raises:
        ValueError: its name or one of its columns is taken.
    """

    def register(measure: Measure) -> Measure:
        added = Diagnostic(name, columns or (name,), description, formula, source, cost, measure)
        taken = {column for other in DIAGNOSTICS.values() for column in other.columns} | set(DIAGNOSTICS)
        if clashing := {name, *added.columns} & taken:
            raise ValueError(
                f"A diagnostic with the name or column {', '.join(sorted(clashing))} exists already."
            )
        DIAGNOSTICS[name] = added
        return measure

    return register


def resolve(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once and checked; `all` stands for every diagnostic.

    Raises:
        ConfigError: there is no diagnostic of a name.
    """
    wanted = tuple(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in DIAGNOSTICS and name != "all"]
    if unknown:
        raise ConfigError(
            f"Unknown diagnostic {', '.join(map(repr, unknown))}. Known: {', '.join(DIAGNOSTICS)}, and all."
        )
    return tuple(DIAGNOSTICS) if "all" in wanted else wanted


def columns_of(names: Iterable[str]) -> tuple[str, ...]:
    """The columns that these diagnostics give."""
    return tuple(column for name in resolve(names) for column in DIAGNOSTICS[name].columns)


def compute(
    names: Iterable[str], policy: Policy, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()
) -> dict[str, Tensor]:
    """Diagnostics of a batch of pairs, `(B,)` float64 by column, on the CPU.

    Law: a pair's numbers depend neither on the other pairs nor on the side or amount of padding.

    Args:
        names: which ones; `all` for every one.
        policy: the policy; its model is left as it was found.
        batch: the pairs.
        pairs: what the batch was collated from; needed where the reference is columns of the data.

    Raises:
        ConfigError: there is no diagnostic of a name.
        ModelError: hidden states are asked for and the model's head can't be watched.
    """
    reading = Reading(policy, batch, pairs)
    found: dict[str, Tensor] = {}
    for name in resolve(names):
        found |= DIAGNOSTICS[name].measure(reading)
    return found

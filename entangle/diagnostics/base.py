"""The registry: every diagnostic by name, with its columns, formula, source and cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from entangle.data import TokenizedPair
from entangle.diagnostics import ches, confidence, edit_distance, hidden, length, overlap, rewards, squeezing
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


def register_diagnostic(diagnostic: Diagnostic) -> None:
    """Make a diagnostic known by its name.

    Raises:
        ValueError: its name or one of its columns is taken.
    """
    taken = {column for other in DIAGNOSTICS.values() for column in other.columns} | set(DIAGNOSTICS)
    clashing = {diagnostic.name, *diagnostic.columns} & taken
    if clashing:
        raise ValueError(
            f"A diagnostic with the name or column {', '.join(sorted(clashing))} exists already."
        )
    DIAGNOSTICS[diagnostic.name] = diagnostic


for _diagnostic in (
    Diagnostic(
        "ches", ("ches", "ches_norm"),
        "Alignment of the two responses' hidden states; the higher, the likelier the chosen log-prob falls.",
        "<H_w, H_l> - |H_w|^2; normalised <H_w, H_l>/(n_w n_l) - |H_w|^2/n_w^2",
        "arXiv 2410.08847", "forward", ches.ches,
    ),
    Diagnostic(
        "hidden_inner", ("hidden_inner",),
        "Inner product of the last hidden states of both responses; a baseline of CHES.",
        "<h_w, h_l> at the position that predicts a response's last token",
        "arXiv 2410.08847", "forward", hidden.hidden_inner,
    ),
    Diagnostic(
        "edit_distance", ("edit_distance",),
        "How different the responses are as token sequences: 0 equal, 1 nothing in common.",
        "Levenshtein(y_w, y_l) / max(n_w, n_l)",
        "arXiv 2402.13228, 2410.08847", "tokens", edit_distance.edit_distance,
    ),
    Diagnostic(
        "length_ratio", ("length_ratio",),
        "Tokens of the rejected response per token of the chosen one.",
        "n_l / n_w",
        "", "tokens", length.length_ratio,
    ),
    Diagnostic(
        "overlap", ("shared_prefix", "shared_suffix"),
        "Tokens that both responses begin with, and end with after that.",
        "longest common prefix; longest common suffix of the rests",
        "arXiv 2410.13828", "tokens", overlap.overlap,
    ),
    Diagnostic(
        "reward_gap", ("reward_gap",),
        "Implicit-reward gap over beta: how far the policy has already moved the pair apart.",
        "ln pi/pi_ref (y_w|x) - ln pi/pi_ref (y_l|x), nats",
        "arXiv 2305.18290; as a selector 2508.04149", "reference", rewards.reward_gap,
    ),
    Diagnostic(
        "confidence", ("confidence_chosen", "confidence_rejected", "entropy_chosen", "entropy_rejected"),
        "How sure the policy is: mean probability per token (geometric), and mean next-token entropy in nats.",
        "exp(ln pi(y|x) / n); (1/n) sum_t H(pi(.|x, y_<t))",
        "", "forward", confidence.confidence,
    ),
    Diagnostic(
        "squeezing", ("squeezing_chosen", "squeezing_rejected"),
        "What a step on the pair does to the tokens that are the likeliest already: nats per unit of eta d.",
        "sum_t <grad ln max_v pi(v|x, y_<t), g_w - g_l>",
        "arXiv 2407.10490", "backward", squeezing.squeezing,
    ),
):  # fmt: skip
    register_diagnostic(_diagnostic)


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

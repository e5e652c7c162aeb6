"""Pairs that a trainer's own tokenised training set lends, whoever tokenised it."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from entangle.data import TokenizedPair
from entangle.training.trainer import TrainingError

OF_TRL = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Columns of TRL since 0.29, axolotl's included."""

OF_LABELS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
"""Columns of LLaMA-Factory and ms-swift: whole rows, and labels that are -100 on the prompt."""

Tokens = tuple[list[int], list[int], list[int]]
"""Prompt, chosen and rejected."""


def training_pairs(data: Any, count: int, max_length: int | None = None) -> list[TokenizedPair]:
    """`count` pairs of a tokenised training set, evenly spread; their index is their row.

    The tokens are those that are trained on, so a template of the trainer's own is in them.

    Args:
        data: a training set with columns `OF_TRL` or `OF_LABELS`.
        count: pairs at most.
        max_length: tokens of a row where the trainer cuts rows when it collates them; None: they are cut.

    Raises:
        TrainingError: it isn't a training set of tokenised pairs, or a row of it isn't a pair.
    """
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or not len(data):
        raise _not_pairs(count)
    count = min(count, len(data))
    return [_pair(index, data[index], max_length) for index in (i * len(data) // count for i in range(count))]


def _not_pairs(count: int) -> TrainingError:
    return TrainingError(
        f"pairs={count} asks for pairs of the training set, which must be a list of tokenised pairs, with the columns "
        f"{', '.join(OF_TRL)} (TRL) or {', '.join(OF_LABELS)} (LLaMA-Factory, ms-swift). Give the pairs themselves."
    )


def _pair(index: int, row: Any, max_length: int | None) -> TokenizedPair:
    prompt, *responses = _tokens(index, row)
    chosen, rejected = ((prompt + response)[:max_length][len(prompt) :] for response in responses)
    return TokenizedPair(
        index,
        prompt[:max_length],
        chosen,
        rejected,
        prompt_hash=blake2b(repr(prompt).encode(), digest_size=8).hexdigest(),
        identical=chosen == rejected,
        empty=min(len(chosen), len(rejected)) <= (0 if prompt else 1),
        **{name: row[name] for name in ("ref_chosen_logps", "ref_rejected_logps") if name in row},
    )


def _tokens(index: int, row: Any) -> Tokens:
    if not isinstance(row, Mapping):
        raise _not_pairs(1)
    if set(OF_TRL) <= set(row):
        prompt, chosen, rejected = (list(row[column]) for column in OF_TRL)
        return prompt, chosen, rejected
    if set(OF_LABELS) <= set(row):
        prompt, chosen = _split(index, row["chosen_input_ids"], row["chosen_labels"])
        other, rejected = _split(index, row["rejected_input_ids"], row["rejected_labels"])
        if prompt != other:
            raise TrainingError(
                f"Row {index} of the training set has other prompt tokens before its chosen response than before its "
                "rejected one, so it isn't one pair. Give the pairs themselves: pairs=..."
            )
        return prompt, chosen, rejected
    raise _not_pairs(1)


def _split(index: int, ids: Any, labels: Any) -> tuple[list[int], list[int]]:
    """Tokens without and with a label; those with one must be the end of the row, and its very tokens."""
    ids, labels = list(ids), list(labels)
    start = next((i for i, label in enumerate(labels) if label != -100), len(labels))
    if ids[start:] != labels[start:]:
        raise TrainingError(
            f"Row {index} of the training set is scored in several parts (labels of -100 amid the response), which a "
            "pair here can't be. Give pairs of one response each: pairs=..."
        )
    return ids[:start], ids[start:]

"""Whatever stands for preference pairs: a data set by its name, rows in memory, or the pairs themselves."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, cast

from datasets import Dataset, DatasetDict

from entangle import embedded
from entangle.config import EMBEDDED
from entangle.data.notes import notes_on_pairs
from entangle.data.pair import PreferencePair
from entangle.data.pairs import PairSet, read_pairs
from entangle.errors import DataError

Pairs = str | Path | Dataset | DatasetDict | Sequence[Mapping[str, Any]] | Sequence[PreferencePair]
"""What stands for preference pairs wherever these are asked for."""


def pairs_of(given: Pairs, **options: Any) -> PairSet:
    """The pairs that something stands for, with notes on them.

    A further column that holds values of several kinds is text in all of them, so that it fits one column of a table.

    Args:
        given: `embedded` for the pairs that ship with the package, a hub id, a file, a folder, a `datasets.Dataset`, a
            list of dicts, or a list of pairs, whose indices tell them apart.
        options: see `entangle.data.read_pairs`; for pairs that are pairs already they say nothing.

    Raises:
        DataError: it is none of these, or `read_pairs` refuses it.
    """
    if _are_pairs(given):
        pairs = _numbered(given)
        found = PairSet(pairs, notes=tuple(notes_on_pairs(pairs, is_split=False)))
    else:
        found = read_pairs(cast(Any, embedded.PAIRS if given == EMBEDDED else given), **options)
    return dataclasses.replace(found, pairs=with_uniform_extras(found.pairs))


def load_pairs(given: Pairs, **options: Any) -> list[PreferencePair]:
    """The pairs alone; see `pairs_of`.

    Args:
        given: what stands for them.
        options: see `entangle.data.read_pairs`.

    Examples:
        >>> rows = [{"question": "2 + 2 =", "chosen": " 4", "rejected": " 5", "kind": "sum"}]
        >>> load_pairs(rows, columns={"prompt": "question"})[0].extra
        {'kind': 'sum'}
    """
    return pairs_of(given, **options).pairs


def _are_pairs(given: Pairs) -> TypeGuard[Sequence[PreferencePair]]:
    """Whether these are pairs already; no pair at all isn't."""
    if not isinstance(given, list | tuple) or not given:
        return False
    return all(isinstance(pair, PreferencePair) for pair in given)


def _numbered(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs, in the order of their indices; refused where two have one."""
    ordered = sorted(pairs, key=lambda pair: pair.index)
    twice = [a.index for a, b in zip(ordered, ordered[1:], strict=False) if a.index == b.index]
    if twice:
        raise DataError(
            f"Expected pairs whose indices differ; {twice[0]} comes more than once. Number them anew: "
            "dataclasses.replace(pair, index=i)."
        )
    return ordered


def with_uniform_extras(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The same pairs; an extra column with values of more than one kind (number, text, truth) is text throughout."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        for name, value in pair.extra.items():
            kinds[name].add(_kind(value))
    mixed = {name for name, found in kinds.items() if len(found) > 1}
    if not mixed:
        return list(pairs)
    return [
        dataclasses.replace(pair, extra={k: str(v) if k in mixed else v for k, v in pair.extra.items()})
        for pair in pairs
    ]


def _kind(value: Any) -> str:
    return (
        "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
    )

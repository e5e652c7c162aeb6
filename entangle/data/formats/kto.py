"""Unpaired data (KTO's): answers with a label each, paired here where a prompt has both kinds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from entangle.data.formats.base import Format, Row, register, rest
from entangle.errors import DataError


@register
class Kto(Format):
    """`prompt`, `completion`, `label`: one answer a row."""

    name = "kto"
    columns = ("prompt", "completion")
    reads = (
        "rows of one `prompt`: its k-th `completion` with `label` true is chosen, its k-th with false rejected; the "
        "rest is left out"
    )
    is_automatic = False

    def matches(self, sample: Row) -> bool:
        """By its columns."""
        return {"prompt", "completion", "label"} <= set(sample)

    def expand(self, rows: Sequence[Row]) -> list[tuple[int, Row]]:
        """One pair for the k-th liked and the k-th disliked answer of every prompt, under the liked one's number."""
        sides: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for index in range(len(rows)):
            row = rows[index]
            key = json.dumps(row.get("prompt"), sort_keys=True, default=str)
            sides[key][0 if _is_liked(row, index) else 1].append(index)
        found = [pair for liked, disliked in sides.values() for pair in zip(liked, disliked, strict=False)]
        return [
            (
                good,
                rest(rows[good], "completion", "label")
                | {"chosen": rows[good].get("completion"), "rejected": rows[bad].get("completion")},
            )
            for good, bad in sorted(found)
        ]

    def convert(self, row: Row, where: str) -> Row:
        """The pair as it was made."""
        return row


def _is_liked(row: Row, index: int) -> bool:
    label = row.get("label")
    if label in (True, 1, "True", "true", "1"):
        return True
    if label in (False, 0, "False", "false", "0", -1):
        return False
    raise DataError(f"Row {index}: 'label' should be true or false; got {label!r}.")

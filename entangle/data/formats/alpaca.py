"""Alpaca as LLaMA-Factory ranks it: instruction and input together are what the user says."""

from __future__ import annotations

from entangle.data.formats.base import Format, Row, assistant, register, rest
from entangle.data.messages import shortened
from entangle.errors import DataError


@register
class Alpaca(Format):
    """`instruction`, `input`, `chosen`, `rejected`, and perhaps `system` and `history`, all texts."""

    name = "alpaca"
    columns = ("instruction", "input", "chosen", "rejected", "system", "history")
    reads = (
        "`instruction` and, on a new line, `input` are the user's turn, after `system` and the turns of `history`; "
        "for a model with a chat template"
    )

    def matches(self, sample: Row) -> bool:
        """Texts under its names, and no prompt."""
        texts = ("instruction", "chosen", "rejected")
        return "prompt" not in sample and all(isinstance(sample.get(name), str) for name in texts)

    def convert(self, row: Row, where: str) -> Row:
        """See `Format`."""
        for name in ("instruction", "chosen", "rejected"):
            if not isinstance(row.get(name), str) or not row[name]:
                raise DataError(f"{where}: {name!r} should be a text; got {shortened(row.get(name))}.")
        turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        for turn in row.get("history") or []:
            if not (
                isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
            ):
                raise DataError(
                    f"{where}: 'history' should be a list of [question, answer]; got {shortened(turn)}."
                )
            turns += [{"role": "user", "content": turn[0]}, *assistant(turn[1])]
        said = "\n".join(filter(None, (row["instruction"], row.get("input"))))
        return rest(row, *self.columns) | {
            "prompt": [*turns, {"role": "user", "content": said}],
            "chosen": assistant(row["chosen"]),
            "rejected": assistant(row["rejected"]),
        }

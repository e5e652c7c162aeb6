"""axolotl's chat_template.default: a history, and one message each as chosen and rejected."""

from __future__ import annotations

from collections.abc import Mapping

from entangle.data.formats.base import Format, Row, register, rest
from entangle.data.messages import first_role, is_messages, shortened
from entangle.errors import DataError


@register
class Axolotl(Format):
    """`messages` (the history), `chosen` and `rejected` (one message each, or a list of the assistant's)."""

    name = "axolotl"
    columns = ("messages", "prompt", "chosen", "rejected")
    reads = "`messages` (or `prompt`) is the prompt; `chosen` and `rejected` are one message each"

    def matches(self, sample: Row) -> bool:
        """A single message as answer; or answers that begin with the assistant beside a history."""
        chosen = sample.get("chosen")
        if isinstance(chosen, Mapping):
            return isinstance(chosen.get("role"), str)
        return (
            "prompt" not in sample
            and is_messages(sample.get("messages"))
            and is_messages(chosen)
            and first_role(chosen) == "assistant"  # pyright: ignore[reportArgumentType]
        )

    def convert(self, row: Row, where: str) -> Row:
        """See `Format`."""
        name = "prompt" if row.get("prompt") else "messages"
        history = row.get(name)
        if isinstance(history, str) and history:
            history = [{"role": "user", "content": history}]
        if not is_messages(history):
            raise DataError(
                f"{where}: {name!r} should be the list of messages before the answer; got {shortened(history)}."
            )
        answers = {
            side: [row[side]] if isinstance(row.get(side), Mapping) else row.get(side)
            for side in ("chosen", "rejected")
        }
        return rest(row, "prompt", "messages", "chosen", "rejected") | {"prompt": history} | answers

"""OpenAI's preference fine-tuning: input.messages, preferred_output, non_preferred_output."""

from __future__ import annotations

from collections.abc import Mapping

from entangle.data.formats.base import Format, Row, register, rest
from entangle.data.messages import is_messages, shortened
from entangle.errors import DataError


@register
class OpenAI(Format):
    """`input` with its `messages` (and `tools`), and two lists of messages."""

    name = "openai"
    columns = ("input", "preferred_output", "non_preferred_output")
    reads = "`input.messages` is the prompt; `preferred_output` is chosen, `non_preferred_output` rejected"

    def matches(self, sample: Row) -> bool:
        """By its three columns."""
        return set(self.columns) <= set(sample)

    def convert(self, row: Row, where: str) -> Row:
        """See `Format`."""
        given = row.get("input")
        if not isinstance(given, Mapping) or not is_messages(given.get("messages")):
            raise DataError(
                f"{where}: 'input' should be an object with 'messages', a list of role/content messages; got "
                f"{shortened(given)}."
            )
        tools = {"tools": given["tools"]} if given.get("tools") else {}
        return (
            rest(row, *self.columns)
            | tools
            | {
                "prompt": given["messages"],
                "chosen": row.get("preferred_output"),
                "rejected": row.get("non_preferred_output"),
            }
        )

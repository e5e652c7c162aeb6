"""ms-swift: a whole conversation whose last answer is the chosen one, and the rejected answer beside it."""

from __future__ import annotations

from entangle.data.formats.base import Format, Row, assistant, register, rest
from entangle.data.messages import is_messages, shortened
from entangle.errors import DataError


@register
class MsSwift(Format):
    """`messages` and `rejected_response` (a text, one message or several) or `rejected_messages`."""

    name = "ms_swift"
    columns = ("messages", "rejected_response", "rejected_messages")
    reads = "`messages` ends with the chosen answer; `rejected_response` (or `rejected_messages`) is the other one"

    def matches(self, sample: Row) -> bool:
        """By its two columns."""
        return "messages" in sample and ("rejected_response" in sample or "rejected_messages" in sample)

    def convert(self, row: Row, where: str) -> Row:
        """See `Format`."""
        messages = row.get("messages")
        if not is_messages(messages) or messages[-1]["role"] != "assistant":  # pyright: ignore
            raise DataError(
                f"{where}: 'messages' should be a conversation that ends with the assistant's (chosen) answer; got "
                f"{shortened(messages)}."
            )
        assert isinstance(messages, list)
        further = rest(row, "messages", "rejected_response", "rejected_messages")
        if row.get("rejected_messages"):
            return further | {"chosen": messages, "rejected": row["rejected_messages"]}
        rejected = row.get("rejected_response")
        if isinstance(rejected, str) and rejected:
            rejected = assistant(rejected)
        elif isinstance(rejected, dict):
            rejected = [rejected]
        if not is_messages(rejected):
            raise DataError(
                f"{where}: 'rejected_response' should be the rejected answer's text; got {shortened(rejected)}."
            )
        return further | {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected}

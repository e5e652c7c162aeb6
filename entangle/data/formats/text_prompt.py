"""A prompt as text beside answers that are one assistant message each."""

from __future__ import annotations

from entangle.data.formats.base import Format, Row, register
from entangle.data.messages import first_role, is_messages


@register
class TextPrompt(Format):
    """`prompt` (a text), `chosen` and `rejected` (lists that begin with the assistant)."""

    name = "text_prompt"
    columns = ("prompt", "chosen", "rejected")
    reads = "`prompt`, a text, is the user's turn before the assistant's messages in `chosen` and `rejected`"

    def matches(self, sample: Row) -> bool:
        """A text before answers that hold no user's turn."""
        answers = [sample.get("chosen"), sample.get("rejected")]
        return isinstance(sample.get("prompt"), str) and all(
            is_messages(answer) and first_role(answer) == "assistant"  # pyright: ignore[reportArgumentType]
            for answer in answers
        )

    def convert(self, row: Row, where: str) -> Row:
        """See `Format`."""
        prompt = row.get("prompt")
        if isinstance(prompt, str) and prompt:
            prompt = [{"role": "user", "content": prompt}]
        return {**row, "prompt": prompt}

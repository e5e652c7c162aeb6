"""ShareGPT as LLaMA-Factory ranks it: messages with `from` and `value`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entangle.data.formats.base import Format, Row, register, rest
from entangle.data.messages import shortened
from entangle.errors import DataError

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


@register
class ShareGpt(Format):
    """`conversations`, `chosen`, `rejected` (and `system`, `tools`), each message with `from` and `value`."""

    name = "sharegpt"
    columns = ("conversations", "chosen", "rejected", "system")
    reads = (
        "messages have `from` (human, gpt, system, observation) and `value`; `conversations`, after `system`, is the "
        "prompt"
    )

    def matches(self, sample: Row) -> bool:
        """By messages with `from` and `value`."""
        return "rejected" in sample and any(
            _is_turn(value[0] if isinstance(value, list) and value else value)
            for value in (sample.get("chosen"), sample.get("conversations"))
        )

    def convert(self, row: Row, where: str) -> Row:
        """See `Format`."""
        answers = {side: _messages(row.get(side), side, where) for side in ("chosen", "rejected")}
        converted = rest(row, *self.columns) | answers
        if "conversations" not in row:
            return converted  # the prompt is what both begin with
        prompt = _messages(row["conversations"], "conversations", where)
        if row.get("system") and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": row["system"]}, *prompt]
        return converted | {"prompt": prompt}


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and "from" in value and "value" in value


def _messages(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    turns = value if isinstance(value, list) else [value]
    if not turns or not all(_is_turn(turn) for turn in turns):
        raise DataError(
            f"{where}: {column!r} should hold messages with 'from' and 'value'; got {shortened(value)}."
        )
    unknown = [turn["from"] for turn in turns if turn["from"] not in _ROLES]
    if unknown:
        raise DataError(
            f"{where}: the role {shortened(unknown[0])} in {column!r} isn't one of {', '.join(_ROLES)}. Write the "
            "message with 'role' and 'content' as the model's chat template takes it."
        )
    return [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]

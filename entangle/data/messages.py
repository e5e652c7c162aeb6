"""Texts and messages of a row, checked: what a chat template and a tokenizer can take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entangle.errors import DataError

Message = Mapping[str, Any]
Text = str | list[Message]


def checked_text(value: Any, column: str, where: str) -> Text:
    """A string, or a list of messages as a chat template takes them.

    Keys of a message whose value is None are left out (Arrow fills them in where another row has the key), and
    parts that are all text are joined. What needs no change comes back as it is.

    Raises:
        DataError: it is neither, is empty, or holds text that can't be encoded.
    """
    check_encodable(value, column, where)
    if isinstance(value, str):
        if not value:
            raise DataError(f"{where}: {column!r} is empty.")
        return value
    if isinstance(value, list) and value:
        return [_message(message, column, where) for message in value]
    came = "an empty list" if isinstance(value, list) else f"{type(value).__name__} ({shortened(value)})"
    raise DataError(f"{where}: {column!r} should be a string or a list of role/content messages; got {came}.")


def check_encodable(value: Any, column: str, where: str) -> None:
    """Refuse half of a character (a lone surrogate, such as half an emoji): no tokenizer can read it.

    Raises:
        DataError: with the place in the text.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {column!r} holds half of a character ({value[error.start]!a} at place {error.start}), "
                "which can't be encoded: a text was cut inside an emoji, or escaped wrongly."
            ) from None
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_encodable(key, column, where)
            check_encodable(inner, column, where)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_encodable(inner, column, where)


def escaped(value: Any) -> Any:
    """A further column's value that can be stored: half a character is written as its escape."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def without_none(value: Any) -> Any:
    """The value without keys that hold None, at any depth; the same object where there is none."""
    if isinstance(value, Mapping):
        kept = {key: without_none(inner) for key, inner in value.items() if inner is not None}
        same = len(kept) == len(value) and all(kept[key] is value[key] for key in kept)
        return value if same else kept
    if isinstance(value, list):
        inner = [without_none(item) for item in value]
        return value if all(a is b for a, b in zip(inner, value, strict=True)) else inner
    return value


def _message(message: Any, column: str, where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(
            f"{where}: the messages in {column!r} should be objects with 'role' and 'content'; "
            f"got {shortened(message)}."
        )
    content = message.get("content")
    joined = joined_parts(content)
    if joined is not None:
        message = {**message, "content": joined}
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise DataError(
            f"{where}: the 'content' of a message in {column!r} should be a string (images and other parts "
            f"aren't supported); got {type(content).__name__} ({shortened(content)})."
        )
    kept = without_none(message)
    # an answer that is nothing but a call keeps its empty content: templates ask for it
    return kept if kept is message or "content" in kept else {"content": None, **kept}


def joined_parts(content: Any) -> str | None:
    """The text of a content that is a list of text parts; None for anything else."""
    if not isinstance(content, list) or not content:
        return None
    texts = [_text_of_part(part) for part in content]
    return None if None in texts else "".join(text for text in texts if text is not None)


def _text_of_part(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        return None
    further = {key for key, value in part.items() if value is not None} - {"type", "text"}
    return part["text"] if part.get("type", "text") == "text" and not further else None


def is_messages(value: Any) -> bool:
    """Whether a value is a list of role/content messages, checked no further."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value)
    )


def first_role(messages: Sequence[Message]) -> str:
    """Role of the first message that isn't the system's."""
    return next((m["role"] for m in messages if m["role"] != "system"), "")


def shortened(value: Any) -> str:
    """A value as an error message shows it: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

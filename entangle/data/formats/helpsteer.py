"""HelpSteer's preferences: two answers, and a number that says which is better."""

from __future__ import annotations

from typing import Any

from entangle.data.formats.base import Format, Row, assistant, register, rest
from entangle.data.messages import is_messages, shortened
from entangle.errors import DataError

_KINDS = (
    ("response1", "response2", "overall_preference"),
    ("response_1", "response_2", "preference_strength"),
)


@register
class HelpSteer(Format):
    """`context` or `prompt`, two answers, and a preference below 0 for the first and above 0 for the second."""

    name = "helpsteer"
    columns = ("context", "prompt", *(name for kind in _KINDS for name in kind[:2]))
    reads = (
        "`context` or `prompt`; of `response1` and `response2` the first is chosen where `overall_preference` is below "
        "0, the second where it is above (or response_1, response_2, preference_strength)"
    )

    def matches(self, sample: Row) -> bool:
        """By the three columns of either kind, and a prompt."""
        return ("context" in sample or "prompt" in sample) and _kind(sample) is not None

    def convert(self, row: Row, where: str) -> Row:
        """See `Format`."""
        kind = _kind(row)
        assert kind is not None  # the columns are those of all rows
        first, second, verdict = kind
        prompt = row.get("context") or row.get("prompt")
        answers: list[Any] = [row.get(first), row.get(second)]
        if is_messages(prompt):
            answers = [assistant(answer) if isinstance(answer, str) else answer for answer in answers]
        try:
            strength = float(row[verdict])
        except (TypeError, ValueError):
            raise DataError(
                f"{where}: {verdict!r} should be a number; got {shortened(row[verdict])}."
            ) from None
        if not strength:
            raise DataError(f"{where} is a tie ({verdict} is 0), so neither answer is the chosen one.")
        chosen, rejected = answers if strength < 0 else answers[::-1]
        used = (first, second, "context", "prompt")
        return rest(row, *used) | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _kind(row: Row) -> tuple[str, str, str] | None:
    return next((kind for kind in _KINDS if set(kind) <= set(row)), None)

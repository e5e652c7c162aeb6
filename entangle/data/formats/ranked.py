"""Ranked answers: several to a prompt, each with a score; the best against the worst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entangle.data.formats.base import Format, Row, assistant, register, rest
from entangle.data.messages import is_messages, shortened
from entangle.errors import DataError

_LISTS = ("responses", "completions", "answers")
_SCORES = ("scores", "score", "rewards", "ratings")
_OWN = ("overall_score", "score", "rating", "reward")


@register
class Ranked(Format):
    """`prompt` (or `instruction`), a list of answers, and a list of scores (or a score in every answer)."""

    name = "ranked"
    columns = ("prompt", "instruction", *_LISTS)
    reads = (
        "of the list `responses` (or `completions`, `answers`) the answer with the highest score in `scores` is "
        "chosen, the one with the lowest rejected"
    )
    is_automatic = False

    def matches(self, sample: Row) -> bool:
        """A list of several answers."""
        return "chosen" not in sample and any(
            isinstance(sample.get(name), list) and not is_messages(sample[name]) for name in _LISTS
        )

    def convert(self, row: Row, where: str) -> Row:
        """See `Format`."""
        name = next((name for name in _LISTS if isinstance(row.get(name), list)), None)
        if name is None:
            raise DataError(f"{where}: expected a list of answers in {', '.join(_LISTS)}; there is none.")
        answers = row[name]
        if all(isinstance(answer, Mapping) for answer in answers):
            texts = [answer.get("response", answer.get("text")) for answer in answers]
            scores: Any = [next((a[own] for own in _OWN if own in a), None) for a in answers]
        else:
            texts, scores = answers, next((row[key] for key in _SCORES if key in row), None)
        prompt = row.get("prompt") or row.get("instruction")
        if is_messages(prompt):
            texts = [assistant(text) if isinstance(text, str) else text for text in texts]
        best, worst = _extremes(scores, len(texts), where)
        used = ("prompt", "instruction", *_LISTS)
        return rest(row, *used) | {"prompt": prompt, "chosen": texts[best], "rejected": texts[worst]}


def _extremes(scores: Any, count: int, where: str) -> tuple[int, int]:
    try:
        values = [float(score) for score in scores]
    except (TypeError, ValueError):
        values = []
    if len(values) != count or count < 2:
        raise DataError(
            f"{where}: expected at least two answers and a number for each (in {', '.join(_SCORES)}); got "
            f"{count} answers and {shortened(scores)}."
        )
    best, worst = values.index(max(values)), values.index(min(values))
    if values[best] == values[worst]:
        raise DataError(f"{where}: all answers have the score {values[best]:g}, so none is the chosen one.")
    return best, worst

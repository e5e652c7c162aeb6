"""What a reader of the numbers should know of the pairs: sentences, with counts and row numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from entangle.data.formats.refusals import PROMPTS
from entangle.data.messages import Message, shortened
from entangle.data.pair import PreferencePair

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Roles that chat templates know."""

_SCORES = re.compile(r"score|rating|reward|quality")


def notes_on_pairs(pairs: Sequence[PreferencePair], *, is_split: bool = False) -> list[str]:
    """Notes on pairs as they stand, before a tokenizer has seen them.

    Args:
        pairs: the pairs.
        is_split: whether their prompts are what chosen and rejected begin with in common.
    """
    notes = [*_split(pairs)] if is_split else []
    for check in (_roles, _user_turns, _answerers, _repeated, _equal, _unused, _scores):
        notes += check(pairs)
    return notes


def listed(rows: Sequence[int]) -> str:
    """Row numbers as a note shows them."""
    shown = ", ".join(map(str, rows[:5]))
    return f"row{'s' * (len(rows) > 1)} {shown}{', ...' * (len(rows) > 5)}"


def counted(rows: Sequence[int], total: int) -> str:
    """How many pairs, of how many, and which."""
    return f"{len(rows)} of {total} pairs ({listed(rows)})"


def _split(pairs: Sequence[PreferencePair]) -> Iterator[str]:
    texts = [pair for pair in pairs if isinstance(pair.prompt, str)]
    if texts:
        shortest = min(texts, key=lambda pair: len(pair.prompt))
        yield (
            "There is no column 'prompt', so a pair's prompt is what its chosen and rejected begin with in common (as "
            f"TRL does it). The shortest is {shortened(shortest.prompt)} (row {shortest.index}): if that is part of "
            "an answer, give the prompts (--columns prompt=NAME)."
        )


def _having(pairs: Sequence[PreferencePair], test: Callable[[PreferencePair], Any]) -> list[int]:
    return [pair.index for pair in pairs if test(pair)]


def _answers(pair: PreferencePair) -> list[list[Message]]:
    return [text for text in (pair.chosen, pair.rejected) if not isinstance(text, str)]


def _roles(pairs: Sequence[PreferencePair]) -> Iterator[str]:
    strange: Counter[str] = Counter()
    for pair in pairs:
        texts = [text for text in (pair.prompt, *_answers(pair)) if not isinstance(text, str)]
        strange.update({message["role"] for text in texts for message in text} - set(ROLES))
    if strange:
        names = ", ".join(f"{shortened(role)} ({count} pairs)" for role, count in strange.most_common(4))
        yield (
            f"Roles other than system, user, assistant and tool: {names}. A chat template may leave such messages "
            "out, or write them unlike the turns that the model knows."
        )


def _user_turns(pairs: Sequence[PreferencePair]) -> Iterator[str]:
    def has_user(pair: PreferencePair) -> bool:
        return any(m["role"].lower() in ("user", "human") for answer in _answers(pair) for m in answer[1:])

    if rows := _having(pairs, has_user):
        yield (
            f"In {counted(rows, len(pairs))} the scored part holds turns of the user: the two conversations part "
            "before their last answer, and all that follows is scored as the answer (as TRL does it)."
        )


def _answerers(pairs: Sequence[PreferencePair]) -> Iterator[str]:
    def is_others(pair: PreferencePair) -> bool:
        return any(answer[0]["role"].lower() not in ("assistant", "model") for answer in _answers(pair))

    def ends_otherwise(pair: PreferencePair) -> bool:
        return any(answer[-1]["role"].lower() not in ("assistant", "model") for answer in _answers(pair))

    if rows := _having(pairs, is_others):
        yield f"In {counted(rows, len(pairs))} an answer doesn't begin with the assistant's turn."
    if rows := _having(pairs, lambda pair: ends_otherwise(pair) and not is_others(pair)):
        yield f"In {counted(rows, len(pairs))} a conversation doesn't end with the assistant, but with another's turn."


def _repeated(pairs: Sequence[PreferencePair]) -> Iterator[str]:
    def is_repeated(pair: PreferencePair) -> bool:
        prompt, answers = pair.prompt, (pair.chosen, pair.rejected)
        if isinstance(prompt, str):
            return all(isinstance(text, str) and text.startswith(prompt) for text in answers)
        return all(list(text[: len(prompt)]) == list(prompt) for text in answers)

    if rows := _having(pairs, is_repeated):
        yield (
            f"In {counted(rows, len(pairs))} both answers begin with the whole prompt, so the model reads it twice. "
            "If chosen and rejected are meant to hold it, drop the column 'prompt'."
        )


def _equal(pairs: Sequence[PreferencePair]) -> Iterator[str]:
    if len(pairs) > 1 and len({pair.prompt_hash for pair in pairs}) == 1:
        yield f"All {len(pairs)} prompts are equal: {shortened(pairs[0].prompt)}."


def _unused(pairs: Sequence[PreferencePair]) -> Iterator[str]:
    for name in PROMPTS:
        rows = _having(
            pairs,
            lambda pair, name=name: _is_outside(pair.extra.get(name), pair),  # pyright: ignore
        )
        if rows:
            yield (
                f"The text column {name!r} isn't used, in {counted(rows, len(pairs))}: if it belongs to the prompt, "
                "the model doesn't see it."
            )


def _is_outside(value: Any, pair: PreferencePair) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    inside = (pair.prompt,) if isinstance(pair.prompt, str) else [str(m.get("content")) for m in pair.prompt]
    return not any(value.strip() in text for text in inside)


def _scores(pairs: Sequence[PreferencePair]) -> Iterator[str]:
    for name, other in _score_columns(pairs):
        known = [
            pair for pair in pairs if _is_number(pair.extra.get(name)) and _is_number(pair.extra.get(other))
        ]
        lower = [pair.index for pair in known if pair.extra[name] < pair.extra[other]]
        ties = [pair.index for pair in known if pair.extra[name] == pair.extra[other]]
        found = []
        if lower:
            found.append(f"the rejected answer has the higher score in {counted(lower, len(known))}")
        if ties:
            found.append(f"both have the same in {counted(ties, len(known))}")
        if found:
            yield f"By {name} and {other} {', and '.join(found)}: there the scores don't bear out the labels."


def _score_columns(pairs: Sequence[PreferencePair]) -> list[tuple[str, str]]:
    names = list(dict.fromkeys(name for pair in pairs for name in pair.extra))
    found = [name for name in names if "chosen" in name.lower() and _SCORES.search(name.lower())]
    swapped = {name: re.sub("chosen", "rejected", name, flags=re.IGNORECASE) for name in found}
    lower = {name.lower(): name for name in names}
    return [(name, lower[other.lower()]) for name, other in swapped.items() if other.lower() in lower]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


# --- after the tokenizer ------------------------------------------------------------------------------------

MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<bos>",
    "<eos>",
    "<s>",
    "</s>",
)
"""Strings that chat templates are made of."""


def notes_on_tokens(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes on what a tokenizer made of pairs (`entangle.data.tokens.facts_of`, one for each pair)."""
    total = len(facts)

    def having(name: str) -> list[int]:
        return [fact["index"] for fact in facts if fact[name]]

    notes = []
    if rows := having("whole_prompt"):
        notes.append(
            f"THE WHOLE PROMPT IS SCORED as part of both answers in {counted(rows, total)}: the chat template renders "
            "prompt + answer unlike the prompt alone from the first tokens on, so log-probs and gradients are mostly "
            "those of the prompt (as in TRL). Use a template that renders the prompt the same in both."
        )
    if rows := [row for row in having("prompt_scored") if row not in set(having("whole_prompt"))]:
        counts = [fact["prompt_scored"] for fact in facts if fact["index"] in set(rows)]
        notes.append(
            f"In {counted(rows, total)} the chat template renders the prompt alone unlike the beginning of prompt + "
            f"answer: its last {median(counts):g} tokens (median; at most {max(counts)}) are left out, and what "
            "stands in their place is scored as part of the answers (as in TRL)."
        )
    if rows := having("two_beginnings"):
        notes.append(
            f"{counted(rows, total)} begin with two beginning-of-sequence tokens: one stands in the text, one is "
            "added by the tokenizer (as in TRL). Leave it out of the text."
        )
    if rows := having("two_ends"):
        notes.append(f"{counted(rows, total)} end with two end-of-sequence tokens (as in TRL).")
    if rows := having("markers"):
        marks = Counter(mark for fact in facts for mark in fact["markers"])
        foreign = {mark for fact in facts for mark in fact["foreign"]}
        shown = ", ".join(mark for mark, _ in marks.most_common(5))
        strange = f"; this tokenizer reads {', '.join(sorted(foreign))} as plain letters" if foreign else ""
        notes.append(f"The texts hold a template's own tokens ({shown}) in {counted(rows, total)}{strange}.")
    if rows := having("lost"):
        notes.append(
            f"In {counted(rows, total)} the answers differ but their tokens don't: the chat template leaves out what "
            "differs."
        )
    return notes

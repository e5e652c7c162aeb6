"""Data that isn't pairs as it stands, or hides its prompt: what it is, and the line that makes pairs of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from entangle.data.formats.base import FORMATS, Row
from entangle.data.messages import is_messages

PROMPTS = (
    "question",
    "instruction",
    "query",
    "input",
    "context",
    "user",
    "problem",
    "history",
    "conversation",
    "conversations",
    "messages",
    "system",
    "system_prompt",
)
"""Names under which people keep a prompt, or a part of it."""

_VERDICTS = ("winner", "choice", "label", "labels", "better_response_id", "preference", "preferred")
_FIRST = (
    "response_a",
    "response_0",
    "answer_0",
    "conversation_a",
    "response_1",
    "response1",
    "human_ref_A",
    "summaries",
)


def refusal(sample: Row) -> str | None:
    """Why rows like this one can't be read as pairs, as the end of a sentence about the data; None: they can be."""
    pairs = "chosen" in sample and "rejected" in sample
    return _of_pairs(sample) if pairs else _of_others(sample)


def _of_pairs(sample: Row) -> str | None:
    prompt, chosen, rejected = (sample.get(name) for name in ("prompt", "chosen", "rejected"))
    written = [name for name in ("prompt", "chosen", "rejected") if is_written_messages(sample.get(name))]
    if written:
        return (
            f"holds messages written as text (JSON) in {' and '.join(written)}, which would be read letter by letter. "
            "Parse them first, in Python: data.map(lambda row: {name: json.loads(row[name]) for name in "
            f"{tuple(written)!r}}}), and keep their list of messages."
        )
    if is_messages(prompt) and isinstance(chosen, str) and isinstance(rejected, str):
        return _mixed("prompt")
    if "prompt" in sample:
        return None
    history = next((name for name in PROMPTS if is_messages(sample.get(name))), None)
    if history and isinstance(chosen, str):
        return _mixed(history)
    if isinstance(chosen, str) and isinstance(rejected, str):
        own = [name for name in PROMPTS if isinstance(sample.get(name), str) and sample[name]]
        outside = [name for name in own if sample[name] not in chosen]
        if outside:
            return (
                f"has no column 'prompt', but {outside[0]!r}, which isn't part of the answers: the prompt would be "
                f"left out, and what both answers begin with be taken for it. Name it: --columns prompt={outside[0]}. "
                "If it isn't the prompt, drop the column."
            )
    return None


def _of_others(sample: Row) -> str | None:
    names = set(sample)
    if FORMATS["kto"].matches(sample):
        return (
            "is unpaired data: one answer a row, with a label. Pairs can be made of rows with the same prompt: "
            "--format kto takes the k-th liked and the k-th disliked answer of every prompt."
        )
    output = sample.get("output")
    if isinstance(output, list) and len(output) == 2 and all(isinstance(text, str) for text in output):
        return (
            "keeps both answers in the list 'output', as LLaMA-Factory's older alpaca form does (the better one "
            "first). Make columns of it: jq '[.[] | {instruction, input, chosen: .output[0], rejected: .output[1]}]'."
        )
    if FORMATS["ranked"].matches(sample):
        return (
            "holds lists of answers to one prompt. --format ranked takes the one with the highest score as chosen and "
            "the one with the lowest as rejected."
        )
    if names & {"input_ids", "prompt_ids", "chosen_ids", "prompt_input_ids", "chosen_input_ids"}:
        return "is tokenised already. Give the texts: they are tokenised with the model's own tokenizer."
    first = next((name for name in _FIRST if name in names), None)
    verdict = next((name for name in _VERDICTS if name in names), None)
    if first and verdict:
        return (
            f"holds two answers ({first!r} and another) and a verdict ({verdict!r}). Make columns of them, in Python: "
            "data.map(lambda row: {'chosen': A if FIRST_IS_BETTER else B, 'rejected': B if FIRST_IS_BETTER else A})."
        )
    if "completion" in names or names <= {"messages", "prompt", "text", "response", "system", "tools", "id"}:
        return (
            "has one answer to a prompt and no rejected one, so it can be fine-tuned on but isn't a set of pairs. "
            "Pairs need the columns chosen and rejected (another name: --columns chosen=NAME rejected=NAME)."
        )
    return None


def _mixed(prompt: str) -> str:
    return (
        f"has a conversation in {prompt!r} and answers that are text, so the two don't fit together. Wrap every "
        "answer as one assistant message, in Python: data.map(lambda row: "
        "{side: [{'role': 'assistant', 'content': row[side]}] for side in ('chosen', 'rejected')})"
        + ("" if prompt == "prompt" else f", and name the prompt: --columns prompt={prompt}")
        + "."
    )


def is_written_messages(value: Any) -> bool:
    """Whether a text is a conversation written as JSON (or as Python prints one)."""
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return False
    if value.startswith(("[{'role'", "[{'content'", "[{'from'", "{'role'", "{'messages'")):
        return True
    try:
        parsed = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return False
    inner = parsed.get("messages", [parsed]) if isinstance(parsed, Mapping) else parsed
    return is_messages(inner) or (
        isinstance(inner, list) and bool(inner) and isinstance(inner[0], Mapping) and "from" in inner[0]
    )

"""Preference pairs: rows of a data set under TRL's column names, checked one by one."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from entangle.config.hashing import sha256_of
from entangle.data.sources import Rows, read_rows, shortened
from entangle.errors import DataError

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Text = str | list[Message]

COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "tools",
    "chat_template_kwargs",
)
"""The columns that have a meaning, under TRL's names; every other scalar column is kept as `extra`."""


@dataclass(frozen=True)
class PreferencePair:
    """One prompt with a chosen and a rejected response, as the source has them.

    Args:
        index: row in the data set (in the named split), whatever subset was taken.
        prompt: a string, or a list of `{"role", "content"}` messages.
        chosen: the preferred response, of the same kind as the prompt.
        rejected: the other response.
        ref_chosen_logps: log pi_ref(chosen | prompt), summed, nats; None unless the data carries it.
        ref_rejected_logps: the same for the rejected response.
        extra: further scalar columns by name.
        template_options: what TRL hands to the chat template besides the messages (`tools` and the like).
    """

    index: int
    prompt: Text
    chosen: Text
    rejected: Text
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_conversational(self) -> bool:
        """Whether the texts are lists of messages."""
        return not isinstance(self.prompt, str)

    @property
    def prompt_hash(self) -> str:
        """First 16 hex digits of the sha256 of the prompt: equal prompts have equal hashes, in every run."""
        return sha256_of([_canonical(self.prompt).encode()])[:16]


def load_pairs(
    dataset_name: str | Path | Dataset | DatasetDict | Sequence[Mapping[str, Any]],
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int | None = None,
    skip_invalid: bool = False,
) -> list[PreferencePair]:
    """The pairs of a data set, in its order and with its row numbers.

    Args:
        dataset_name: a hub id; a .json, .jsonl, .csv or .parquet file; a folder of such files; a folder
            written by `save_to_disk`; a `datasets.Dataset` (or dict of them); or a list of dicts.
        split: which split of the hub data set, folder or dict; a single file or table has no splits.
        config: configuration of a hub data set.
        columns: our column names to theirs, e.g. `{"chosen": "better"}`. Without a `prompt` column the prompt
            is what chosen and rejected begin with in common (TRL's `extract_prompt`).
        limit: at most this many pairs.
        seed: which ones: a random subset that depends on nothing but the seed, the limit and the number of
            rows. Without it, the first ones.
        skip_invalid: leave out rows that can't be used, and log how many, instead of refusing the data.

    Raises:
        DataError: the source isn't there, can't be read, has no rows, lacks a column, or a row can't be used.

    Examples:
        >>> rows = [{"question": "2 + 2 =", "chosen": " 4", "rejected": " 5", "kind": "sum"}]
        >>> load_pairs(rows, columns={"prompt": "question"})[0].extra
        {'kind': 'sum'}
    """
    source = dataset_name if isinstance(dataset_name, str | Path) else "the given data"
    rows = read_rows(dataset_name, split, config)
    if not len(rows):
        raise DataError(f"Expected at least one pair in {source}; it has no rows.")
    names = _column_names(rows, columns or {}, str(source))
    pairs: list[PreferencePair] = []
    invalid: dict[int, DataError] = {}
    for index in _subset(len(rows), limit, seed):
        try:
            pairs.append(_pair(index, rows[index], names, str(source)))
        except DataError as error:
            invalid[index] = error
    if invalid:
        _report(invalid, str(source), skip_invalid and bool(pairs))
    return pairs


def hash_pairs(pairs: Sequence[PreferencePair]) -> str:
    """The sha256 of all that a probe reads of the pairs: equal iff it would see the same data."""
    return sha256_of(_canonical(_read_of(pair)).encode() for pair in pairs)


def _read_of(pair: PreferencePair) -> list[Any]:
    """What a probe reads of a pair."""
    logps = [pair.ref_chosen_logps, pair.ref_rejected_logps]
    return [pair.index, pair.prompt, pair.chosen, pair.rejected, *logps, dict(pair.template_options)]


def _canonical(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _subset(count: int, limit: int | None, seed: int | None) -> Sequence[int]:
    if limit is None:
        return range(count)
    if limit < 1:
        raise DataError(f"Expected a limit of at least 1 pair; got {limit}. Leave it out to take every pair.")
    if seed is None or limit >= count:
        return range(min(limit, count))
    return sorted(random.Random(seed).sample(range(count), limit))


def _report(invalid: Mapping[int, DataError], source: str, skip: bool) -> None:
    first, error = next(iter(invalid.items()))
    others = list(invalid)[1:]
    more = ""
    if others:
        shown = ", ".join(map(str, others[:10])) + (", ..." if len(others) > 10 else "")
        more = f" So can't {len(others)} more row{'s' * (len(others) > 1)}: {shown}."
    if skip:
        logger.warning("Left out %d of the rows of %s. The first: %s%s", len(invalid), source, error, more)
        return
    raise DataError(f"{error}{more} Mend or remove what is listed, or skip it (skip_invalid).") from invalid[
        first
    ]


def _column_names(rows: Rows, renamed: Mapping[str, str], source: str) -> dict[str, str]:
    """Our names -> theirs, of the columns that are there."""
    unknown = sorted(set(renamed) - set(COLUMNS))
    if unknown:
        raise DataError(f"columns has the unknown name {unknown[0]!r}; it can map: {', '.join(COLUMNS)}.")
    there = (
        rows.column_names
        if isinstance(rows, Dataset)
        else list(dict.fromkeys(k for row in rows for k in row))
    )
    for ours in dict.fromkeys(["chosen", "rejected", *renamed]):
        theirs = renamed.get(ours, ours)
        if theirs not in there:
            raise DataError(
                f"Expected a column {theirs!r} in {source}; its columns are: {', '.join(map(str, there))}. "
                f"Say which one it is: --columns {ours}=NAME, or columns={{{ours!r}: NAME}} in Python."
            )
    names = {ours: renamed.get(ours, ours) for ours in COLUMNS}
    return {ours: theirs for ours, theirs in names.items() if theirs in there}


def _pair(index: int, row: Mapping[str, Any], names: Mapping[str, str], source: str) -> PreferencePair:
    where = f"Row {index} of {source}"
    texts = {
        ours: _text(row.get(names[ours]), names[ours], where)
        for ours in ("prompt", "chosen", "rejected")
        if ours in names
    }
    chosen, rejected = texts["chosen"], texts["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(
            f"{where}: {names['chosen']!r} and {names['rejected']!r} should both be strings or both be lists "
            f"of messages; got {type(chosen).__name__} and {type(rejected).__name__}."
        )
    # TRL's convention: a plain prompt beside whole conversations is a copy of what these begin with
    if "prompt" in texts and isinstance(texts["prompt"], str) == isinstance(chosen, str):
        prompt = texts["prompt"]
    else:
        prompt, chosen, rejected = split_prompt(chosen, rejected)
    if not prompt:
        what = (
            f"{names['prompt']!r} is empty" if "prompt" in texts else "chosen and rejected begin differently"
        )
        raise DataError(f"{where} has no prompt: {what}.")
    ref_chosen, ref_rejected = _reference(row, names, where)
    return PreferencePair(
        index=index,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        extra={k: v for k, v in row.items() if k not in names.values() and isinstance(v, str | int | float)},
        template_options=_template_options(row, names, where),
    )


def split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) from two texts that begin alike: characters of strings, messages of lists.

    The prompt is the longest common prefix, and as in TRL (`extract_prompt`) a space before the difference
    stays with the responses, and a text that begins the other one keeps its last character or message as
    response.

    Examples:
        >>> split_prompt("The sky is blue", "The sky is green")
        ('The sky is', ' blue', ' green')
    """
    shortest = min(len(chosen), len(rejected))
    cut = next((i for i in range(shortest) if chosen[i] != rejected[i]), None)
    if cut is None:
        cut = max(shortest - 1, 0)
    elif cut and chosen[cut - 1] == " ":
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _text(value: Any, column: str, where: str) -> Text:
    if isinstance(value, str):
        if not value and column:
            raise DataError(f"{where}: {column!r} is empty.")
        return value
    if isinstance(value, list) and value:
        for message in value:
            _check_message(message, column, where)
        return value
    came = "an empty list" if isinstance(value, list) else f"{type(value).__name__} ({shortened(value)})"
    raise DataError(f"{where}: {column!r} should be a string or a list of role/content messages; got {came}.")


def _check_message(message: Any, column: str, where: str) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(
            f"{where}: the messages in {column!r} should be objects with 'role' and 'content'; "
            f"got {shortened(message)}."
        )
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise DataError(
            f"{where}: the 'content' of a message in {column!r} should be a string (images and other parts "
            f"aren't supported); got {type(content).__name__} ({shortened(content)})."
        )


def _reference(
    row: Mapping[str, Any], names: Mapping[str, str], where: str
) -> tuple[float | None, float | None]:
    values: list[float | None] = []
    for ours in ("ref_chosen_logps", "ref_rejected_logps"):
        value = row.get(names[ours]) if ours in names else None
        try:
            values.append(None if value is None or value == "" else float(value))
        except (TypeError, ValueError):
            raise DataError(f"{where}: {names[ours]!r} should be a number; got {shortened(value)}.") from None
    if (values[0] is None) != (values[1] is None):
        raise DataError(
            f"{where} has only one of the reference log-probs ref_chosen_logps and ref_rejected_logps; give "
            "both."
        )
    return values[0], values[1]


def _template_options(row: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "tools" in names and (tools := row.get(names["tools"])):
        try:
            options["tools"] = json.loads(tools) if isinstance(tools, str) else tools
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: {names['tools']!r} should be a list or its JSON; {error}.") from None
    if "chat_template_kwargs" in names:
        options |= row.get(names["chat_template_kwargs"]) or {}
    if "chat_template" in options:
        raise DataError(
            f"{where} brings a chat template, which is a program; it has to come from the tokenizer."
        )
    return options

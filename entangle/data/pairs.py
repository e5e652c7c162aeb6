"""Preference pairs: rows of a data set under TRL's column names, checked one by one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from datasets import Dataset, DatasetDict

from entangle.config.hashing import sha256_of
from entangle.data.formats import FORMATS, Row, choose_format
from entangle.data.invalid import report_invalid
from entangle.data.messages import (
    Message,
    Text,
    check_encodable,
    checked_text,
    escaped,
    shortened,
    without_none,
)
from entangle.data.notes import notes_on_pairs
from entangle.data.pair import PreferencePair, canonical
from entangle.data.sources import Rows, columns_of, read_rows
from entangle.errors import DataError

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
class PairSet:
    """The pairs of a data set, and what a reader of their numbers should know of it.

    Args:
        pairs: in the data set's order, with its row numbers.
        format: the format that the rows were read as (`entangle.data.formats`).
        notes: sentences for people.
    """

    pairs: list[PreferencePair]
    format: str = "trl"
    notes: tuple[str, ...] = ()


def read_pairs(
    dataset_name: str | Path | Dataset | DatasetDict | Sequence[Mapping[str, Any]],
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int | None = None,
    skip_invalid: bool = False,
    format: str = "auto",
) -> PairSet:
    """The pairs of a data set, in its order and with its row numbers, and notes on them.

    Args:
        dataset_name: a hub id; a .json, .jsonl, .csv, .parquet or .arrow file; a folder of such files; a folder
            written by `save_to_disk`; a `datasets.Dataset` (or dict of them); or a list of dicts.
        split: which split of the hub data set, folder or dict; a single file or table has no splits.
        config: configuration of a hub data set.
        columns: our column names to theirs, e.g. `{"chosen": "better"}`; a format's own names may be ours too.
            Without a `prompt` column the prompt is what chosen and rejected begin with in common (TRL's
            `extract_prompt`).
        limit: at most this many pairs.
        seed: which ones: a random subset that depends on nothing but the seed, the limit and the number of
            rows. Without it, the first ones.
        skip_invalid: leave out rows that can't be used, and log how many, instead of refusing the data.
        format: what the rows are read as, a name of `entangle.data.formats.FORMATS`; `auto`: by their columns.

    Raises:
        DataError: the source isn't there, can't be read, has no rows, lacks a column, or a row can't be used.
    """
    source = str(dataset_name) if isinstance(dataset_name, str | Path) else "the given data"
    renamed = dict(columns or {})
    _check_names(renamed)
    rows = read_rows(dataset_name, split, config, texts=renamed.values())
    if not len(rows):
        raise DataError(f"Expected at least one pair in {source}; it has no rows.")
    _check_there(rows, renamed, source)
    view = _Renamed(rows, renamed)
    form = choose_format(format, view, source)
    if form.name == "trl":
        _check_columns(view.columns, renamed, source)
    made = form.expand(view)
    numbered = view if made is None else [row for _, row in made]
    if not len(numbered):
        raise DataError(
            f"Expected pairs in {source}; read as {form.name}, its rows make none ({form.reads})."
        )
    is_explicit = form.name == "trl" and "prompt" in view.columns
    pairs: list[PreferencePair] = []
    invalid: dict[int, DataError] = {}
    for place in _subset(len(numbered), limit, seed):
        index = place if made is None else made[place][0]
        where = f"Row {index} of {source}"
        try:
            row = form.convert(numbered[place], where)
            if is_explicit:
                _check_is_there(row, "prompt", renamed, where)  # others have one: never one of its own making
            pairs.append(_pair(index, row, renamed, where))
        except DataError as error:
            invalid[index] = error
    if invalid:
        report_invalid(invalid, source, skip=skip_invalid and bool(pairs))
    notes = [] if form.name == "trl" else [f"{source} is read as {form.name}: {form.reads}."]
    if made is not None:
        notes.append(f"{len(view)} rows make {len(made)} pairs.")
    return PairSet(
        pairs, form.name, (*notes, *notes_on_pairs(pairs, is_split=form.name == "trl" and not is_explicit))
    )


class _Renamed(Sequence[Row]):
    """Rows under our names: columns that are named otherwise are renamed as they are read."""

    def __init__(self, rows: Rows, renamed: Mapping[str, str]) -> None:
        self.rows = rows
        self.ours = {theirs: ours for ours, theirs in renamed.items()}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Names of all columns, ours where they are renamed."""
        return list(dict.fromkeys(self.ours.get(name, name) for name in columns_of(self.rows)))

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        if not self.ours:
            return row
        # a column that already has the name given to another one steps aside
        kept = {key: value for key, value in row.items() if key not in self.ours.values() or key in self.ours}
        return {self.ours.get(key, key): value for key, value in kept.items()}


def _check_names(renamed: Mapping[str, str]) -> None:
    known = dict.fromkeys([*COLUMNS, *(name for form in FORMATS.values() for name in form.columns)])
    unknown = sorted(set(renamed) - set(known))
    if unknown:
        raise DataError(f"columns has the unknown name {unknown[0]!r}; it can map: {', '.join(known)}.")
    twice = sorted({name for name in renamed.values() if list(renamed.values()).count(name) > 1})
    if twice:
        raise DataError(f"columns gives {twice[0]!r} two names; every column of the data can stand for one.")


def _check_there(rows: Rows, renamed: Mapping[str, str], source: str) -> None:
    there = columns_of(rows)
    for ours, theirs in renamed.items():
        if theirs not in there:
            _lacks(ours, theirs, there, source)


def _check_columns(columns: Sequence[str], renamed: Mapping[str, str], source: str) -> None:
    for ours in ("chosen", "rejected"):
        if ours not in columns:
            _lacks(ours, renamed.get(ours, ours), columns, source)


def _lacks(ours: str, theirs: str, there: Iterable[str], source: str) -> NoReturn:
    raise DataError(
        f"Expected a column {theirs!r} in {source}; its columns are: {', '.join(map(str, there))}. "
        f"Say which one it is: --columns {ours}=NAME, or columns={{{ours!r}: NAME}} in Python."
    )


def hash_pairs(pairs: Sequence[PreferencePair]) -> str:
    """The sha256 of all that a probe reads of the pairs: equal iff it would see the same data."""
    return sha256_of(canonical(_read_of(pair)).encode() for pair in pairs)


def _read_of(pair: PreferencePair) -> list[Any]:
    """What a probe reads of a pair."""
    logps = [pair.ref_chosen_logps, pair.ref_rejected_logps]
    return [pair.index, pair.prompt, pair.chosen, pair.rejected, *logps, dict(pair.template_options)]


def _subset(count: int, limit: int | None, seed: int | None) -> Sequence[int]:
    if limit is None:
        return range(count)
    if limit < 1:
        raise DataError(f"Expected a limit of at least 1 pair; got {limit}. Leave it out to take every pair.")
    if seed is None or limit >= count:
        return range(min(limit, count))
    return sorted(random.Random(seed).sample(range(count), limit))


def _pair(index: int, row: Row, renamed: Mapping[str, str], where: str) -> PreferencePair:
    def called(ours: str) -> str:
        return renamed.get(ours, ours)

    for side in ("chosen", "rejected"):
        _check_is_there(row, side, renamed, where)
    chosen, rejected = (checked_text(row[side], called(side), where) for side in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(
            f"{where}: {called('chosen')!r} and {called('rejected')!r} should both be strings or both be lists "
            f"of messages; got {type(chosen).__name__} and {type(rejected).__name__}."
        )
    if row.get("images"):
        raise DataError(f"{where} has images; only text is supported (images and other parts aren't).")
    given = checked_text(row["prompt"], called("prompt"), where) if "prompt" in row else None
    prompt, chosen, rejected = _with_prompt(given, chosen, rejected, where)
    ref_chosen, ref_rejected = _reference(row, renamed, where)
    return PreferencePair(
        index=index,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        extra={escaped(k): escaped(v) for k, v in row.items() if k not in COLUMNS and _is_scalar(v)},
        template_options=_template_options(row, called, where),
    )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _with_prompt(given: Text | None, chosen: Text, rejected: Text, where: str) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected): the prompt that the row has, or the one inside its answers.

    A plain prompt beside whole conversations is, by TRL's convention, a copy of what these begin with.

    Raises:
        DataError: there is none, or the one given would be lost.
    """
    if given is None or (isinstance(given, str) and not isinstance(chosen, str)):
        prompt, chosen, rejected = split_prompt(chosen, rejected)
        if not prompt:
            raise DataError(f"{where} has no prompt: chosen and rejected begin differently.")
        if isinstance(given, str) and not any(given.strip() in str(m["content"]) for m in _messages(prompt)):
            raise DataError(
                f"{where}: the prompt {shortened(given)} isn't in the messages that chosen and rejected both begin "
                "with, so it would be left out. Give the prompt as messages, or drop the column."
            )
        return prompt, chosen, rejected
    if isinstance(given, str) != isinstance(chosen, str):
        raise DataError(
            f"{where}: the prompt is a conversation and the answers are text. Wrap every answer as one assistant "
            "message: [{'role': 'assistant', 'content': TEXT}]."
        )
    return given, chosen, rejected


def _messages(text: Text) -> list[Message]:
    return [] if isinstance(text, str) else text


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


def _check_is_there(row: Row, ours: str, renamed: Mapping[str, str], where: str) -> None:
    """Refuse a row without a column that the others have."""
    if ours not in row:
        checked_text(None, renamed.get(ours, ours), where)


def _reference(row: Row, renamed: Mapping[str, str], where: str) -> tuple[float | None, float | None]:
    values: list[float | None] = []
    for ours in ("ref_chosen_logps", "ref_rejected_logps"):
        value = row.get(ours)
        try:
            values.append(None if value is None or value == "" else float(value))
        except (TypeError, ValueError):
            raise DataError(
                f"{where}: {renamed.get(ours, ours)!r} should be a number; got {shortened(value)}."
            ) from None
    if (values[0] is None) != (values[1] is None):
        raise DataError(
            f"{where} has only one of the reference log-probs ref_chosen_logps and ref_rejected_logps; give "
            "both."
        )
    return values[0], values[1]


def _template_options(row: Row, called: Callable[[str], str], where: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if tools := row.get("tools"):
        options["tools"] = _tools(tools, called("tools"), where)
    further = row.get("chat_template_kwargs") or {}
    if not isinstance(further, Mapping):
        raise DataError(
            f"{where}: {called('chat_template_kwargs')!r} should be an object; got {shortened(further)}."
        )
    options |= {key: value for key, value in further.items() if value is not None}
    if "chat_template" in options:
        raise DataError(
            f"{where} brings a chat template, which is a program; it has to come from the tokenizer."
        )
    check_encodable(options, "tools", where)
    return {key: value for key, value in options.items() if value != []}


def _tools(given: Any, column: str, where: str) -> Any:
    try:
        tools = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: {column!r} should be a list or its JSON; {error}.") from None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(
            f"{where}: {column!r} should be a list of tools, each an object (or that list's JSON); got "
            f"{shortened(tools)}."
        )
    return without_none(tools)

"""Answers that were drawn before, from a file: a trainer's record, or a row per answer or per prompt.

TRL's table of completions, verl's dumps (`rollout_data_dir`: a file per step, with input, output, score) and OpenRLHF's
lines (input, output, reward) are read as they are.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from entangle.analysis.statistics import Array
from entangle.data import DataError, PreferencePair, tokenize_pair
from entangle.data.formats.refusals import is_written_messages
from entangle.data.messages import Text, check_encodable, checked_text, shortened
from entangle.data.sources import read_rows
from entangle.rewards.history import reward_history
from entangle.rewards.rollouts import Prompt, Rollout

COLUMNS = ("prompt", "completion", "completions", "reward", "rewards", "step")
"""Columns that have a meaning; `--columns` names them where a file calls them otherwise."""

ALIASES = {
    "prompt": ("input", "question", "query"),
    "completion": ("output", "outputs", "response", "responses"),
    "reward": ("score", "scores"),
}
"""Names that other tools give to these columns, tried where ours isn't there and nothing was named; a reward's only
beside another one of them."""

_REWARD = re.compile(r"reward|score|correct|accuracy", re.IGNORECASE)
_NO_REWARD = {"step", "advantage", "advantages", "index", "prompt_index", "epoch", "length", "kl"}


@dataclass(frozen=True)
class Recorded:
    """The answers of a file, by prompt, and what is to be known of them.

    Args:
        rollouts: one for every prompt.
        notes: sentences for people.
        history: of a file with several steps a row per step, see `entangle.rewards.history`; empty without.
    """

    rollouts: list[Rollout]
    notes: tuple[str, ...] = ()
    history: pd.DataFrame = field(default_factory=pd.DataFrame)


@dataclass
class _Group:
    """The answers to one prompt as they are gathered."""

    prompt: Prompt
    texts: list[Text] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    parts: dict[str, list[float | None]] = field(default_factory=dict)

    def only(self, places: Sequence[int]) -> _Group:
        """The same with the answers at these places alone."""
        return _Group(
            self.prompt,
            [self.texts[k] for k in places],
            [self.rewards[k] for k in places],
            [self.rows[k] for k in places],
            {name: [values[k] for k in places] for name, values in self.parts.items()},
        )


def load_rollouts(
    path: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None, limit: int | None = None
) -> list[Rollout]:
    """The rollouts alone, with a missing reward as NaN; see `read_recorded`.

    Args:
        path: a file of any format that `entangle.data` reads.
        tokenizer: the policy's.
        max_length: tokens of prompt and answer at most; None: all.
        limit: prompts at most.
    """
    return read_recorded(path, tokenizer, max_length=max_length, limit=limit).rollouts


def read_recorded(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    reward: str = "",
    needs_rewards: bool = False,
    step: float | None = None,
    further: Sequence[str] = (),
) -> Recorded:
    """Answers that were drawn before, from a file.

    Its columns are `prompt, completions[, rewards]` (lists) with a row per prompt, or `prompt, completion[,
    reward]` with a row per answer; rows of one prompt needn't stand together. Answers are tokenised as a
    preference pair's responses are, end-of-sequence token included, and cut at the right to `max_length`
    tokens with their prompt. An answer that is text is the assistant's turn where its prompt is a conversation. Of
    several steps of a training (a column `step`, or a folder of files named by their step) one step's answers are
    taken, since others come from other policies; the rewards of all are summed up by step.

    Args:
        path: the file, or a folder with a file per step.
        tokenizer: the policy's.
        max_length: tokens of prompt and answer at most; None cuts nothing.
        limit: at most so many prompts.
        columns: our column names to the file's (see `COLUMNS`).
        reward: the column that holds the rewards, or several joined by `+`, which are added.
        needs_rewards: whether the file's own rewards are used: then an answer without one (None, NaN) is left out and
            counted, and so is a prompt with fewer than two answers left.
        step: the step whose answers are taken; None: the last one.
        further: columns with the rewards of further functions, which are kept apart.

    Raises:
        DataError: the file can't be read, lacks a column, or lists don't match.
    """
    notes: list[str] = []
    rows = _read(path, columns or {}, notes)
    _check_renamed(columns or {}, rows, path)
    steps = _by_step(rows)
    taken = _one_step(steps, step, path, notes)
    chosen = _reward_columns(rows[0], reward, needs_rewards, path, notes)
    parts = [*(chosen if len(chosen) > 1 else ()), *further]
    _check_there(parts, rows[0], path)
    groups = _grouped(taken, chosen, path, parts)[:limit]
    if needs_rewards:
        groups = _rewarded(groups, path, notes)
    history = (
        reward_history(_rewards_by_step(steps, chosen, path)) if len(steps) > 1 and chosen else pd.DataFrame()
    )
    return Recorded([_rollout(tokenizer, group, max_length) for group in groups], tuple(notes), history)


def _read(path: str, columns: Mapping[str, str], notes: list[str]) -> list[dict[str, Any]]:
    """The rows with our names for their columns."""
    rows = _of_steps(Path(path)) or [dict(row) for row in _listed(read_rows(path, "train", None))]
    if not rows:
        raise DataError(f"Expected at least one row in {path}; it has none.")
    known = dict(columns) | _aliases(rows[0], columns, notes)
    return [_renamed(row, known) for row in rows]


def _listed(found: Any) -> list[Mapping[str, Any]]:
    return [found[i] for i in range(len(found))]


def _of_steps(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder whose files are named by their step; none of another path."""
    files = [file for file in folder.glob("*.jsonl") if file.stem.isdigit()] if folder.is_dir() else []
    return [
        {"step": int(file.stem)} | dict(row)
        for file in sorted(files)
        for row in _listed(read_rows(str(file), "train", None))
    ]


def _aliases(row: Mapping[str, Any], columns: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    """Our names to those of another tool, where ours are neither there nor given."""
    taken, found = {*row, *columns}, dict[str, str]()
    for ours, names in ALIASES.items():
        alias = next((name for name in names if name in row), None)
        if alias is None or taken & {ours, f"{ours}s"} or (ours == "reward" and not found):
            continue
        found[f"{ours}s" if ours != "prompt" and _is_several(row[alias]) else ours] = alias
    if found:
        named = ", ".join(f"{ours} is the column {theirs!r}" for ours, theirs in found.items())
        notes.append(f"Columns are taken by another tool's names: {named}.")
    if found.get("prompt") == "input" and "gts" in row:
        notes.append(
            "verl writes prompts and answers without special tokens: the tokens before an answer may not be quite "
            "those that it was drawn after, and an end-of-sequence token is put after each answer."
        )
    return found


def _is_several(value: Any) -> bool:
    """Whether a column holds the answers to a prompt, or their rewards: a list that isn't a conversation."""
    return isinstance(value, list) and not any(isinstance(item, Mapping) for item in value)


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    ours = {theirs: name for name, theirs in columns.items()}
    return {ours.get(key, key): value for key, value in row.items() if key in ours or key not in columns}


def _check_renamed(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]], path: str) -> None:
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise DataError(
                f"--columns can't name {ours!r} of a rollouts file; it can name: {', '.join(COLUMNS)}."
            )
        if not any(ours in row for row in rows):
            raise DataError(f"Expected a column {theirs!r} in {path}; its columns are: {', '.join(rows[0])}.")


def _by_step(rows: Sequence[dict[str, Any]]) -> dict[float | None, list[tuple[int, dict[str, Any]]]]:
    """Numbered rows by step, in the order of steps; all under None where there are no two steps."""
    found: dict[float | None, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for index, row in enumerate(rows):
        step = row.get("step")
        found[step if isinstance(step, int | float) and step == step else None].append((index, row))
    known = sorted(step for step in found if step is not None)
    return {step: found[step] for step in known} if len(known) > 1 else {None: list(enumerate(rows))}


def _one_step(
    steps: Mapping[float | None, list[tuple[int, dict[str, Any]]]],
    asked: float | None,
    path: str,
    notes: list[str],
) -> list[tuple[int, dict[str, Any]]]:
    """The rows of the step that was asked for, or of the last one."""
    if None in steps:
        if asked is not None:
            raise DataError(
                f"{path} doesn't hold several steps of a training, so step {asked:g} can't be chosen."
            )
        return steps[None]
    known = [step for step in steps if step is not None]
    if asked is not None and asked not in steps:
        raise DataError(f"{path} has no step {asked:g}; its steps are {', '.join(f'{s:g}' for s in known)}.")
    taken = known[-1] if asked is None else asked
    shown = ", ".join(f"{step:g} ({len(steps[step])} rows)" for step in known[:6])
    notes.append(
        f"The answers are of {len(known)} steps of a training, each of another policy: {shown}"
        f"{', ...' if len(known) > 6 else ''}. Those of step {taken:g} are scored (--rollouts_step takes another one)."
    )
    return steps[taken]


def _rewards_by_step(
    steps: Mapping[float | None, list[tuple[int, dict[str, Any]]]], chosen: list[str], path: str
) -> dict[float, dict[str, Array]]:
    """By step and prompt the rewards that are there."""
    found: dict[float, dict[str, Array]] = {}
    for step, rows in steps.items():
        assert step is not None
        found[step] = {
            group.prompt.hash: np.array([r for r in group.rewards if r is not None], dtype=np.float64)
            for group in _grouped(rows, chosen, path)
        }
    return found


def _reward_columns(
    row: Mapping[str, Any], asked: str, needs_rewards: bool, path: str, notes: list[str]
) -> list[str]:
    """The columns whose sum is the reward; none where there is none."""
    if asked:
        names = [name.strip() for name in asked.split("+")]
        _check_there(names, row, path)
        return names
    own = next((name for name in ("rewards", "reward") if name in row), None)
    if own is not None:
        return [own]
    if not needs_rewards:
        return []
    found = [name for name, value in row.items() if name not in _NO_REWARD and _may_reward(name, value, row)]
    if len(found) == 1:
        notes.append(f"The rewards are those of the column {found[0]!r}.")
        return found
    if found:
        raise DataError(
            f"{path} has no column 'reward', but the rewards of {len(found)} functions: {', '.join(found)}. Say which "
            f"counts: --reward file:column={found[0]}, or their sum: --reward file:column={'+'.join(found)}."
        )
    raise DataError(
        "Expected rewards beside the answers (a column 'rewards', or 'reward' with a row per answer); there are none "
        f"in {path}, whose columns are: {', '.join(row)}. Name the column (--columns reward=NAME), or a reward that is "
        "computed, for instance --reward rouge_l."
    )


def _check_there(names: Sequence[str], row: Mapping[str, Any], path: str) -> None:
    for name in names:
        if name not in row:
            raise DataError(
                f"Expected a reward column {name!r} in {path}; its columns are: {', '.join(row)}."
            )


def _may_reward(name: str, value: Any, row: Mapping[str, Any]) -> bool:
    """Whether a column looks like a reward: a number under such a name, or any number in a trainer's record."""
    values = value if isinstance(value, list) else [value]
    numbers = all(item is None or isinstance(item, int | float) for item in values)
    return (
        bool(values) and numbers and (_REWARD.search(name) is not None or {"step", "advantage"} <= set(row))
    )


def _grouped(
    rows: Sequence[tuple[int, Mapping[str, Any]]], chosen: list[str], path: str, parts: Sequence[str] = ()
) -> list[_Group]:
    several = "completions" in rows[0][1]
    name = "completions" if several else "completion"
    groups: dict[str, _Group] = {}
    for index, row in rows:
        where = f"Row {index} of {path}"
        if "prompt" not in row or name not in row:
            raise DataError(
                f"{where}: expected the columns prompt and completions (a list), or prompt and completion; got "
                f"{', '.join(row)}. Where they are named otherwise: --columns prompt=NAME completion=NAME."
            )
        if is_written_messages(row["prompt"]):
            raise DataError(
                f"{where}: its prompt is a conversation written as text. Parse it first: json.loads(row['prompt'])."
            )
        prompt_text = checked_text(row["prompt"], "prompt", where)
        texts, rewards = _answers(row, name, chosen, where)
        if chosen and rewards is None:
            raise DataError(f"{where}: some answers of its prompt have a reward and some have none.")
        used = ("prompt", name, *chosen, *parts)
        prompt = Prompt(index, prompt_text, {k: v for k, v in row.items() if k not in used})
        group = groups.setdefault(prompt.hash, _Group(prompt))
        group.texts += [_answer(text, prompt_text, where) for text in texts]
        group.rewards += rewards or []
        group.rows += [index] * len(texts)
        for part in parts:
            group.parts.setdefault(part, []).extend(
                _answers(row, name, [part], where)[1] or [None] * len(texts)
            )
    return list(groups.values())


def _answers(
    row: Mapping[str, Any], name: str, chosen: Sequence[str], where: str
) -> tuple[list[Any], list[float | None] | None]:
    """A row's answers and their rewards; no rewards where a column of them is missing."""
    texts = row[name] if name == "completions" else [row[name]]
    given = [row.get(column) for column in chosen if column in row]
    lists = given if name == "completions" else [[value] for value in given]
    if not isinstance(texts, list) or any(
        not isinstance(values, list) or len(values) != len(texts) for values in lists
    ):
        raise DataError(f"{where}: completions and rewards should be lists of one length.")
    if not chosen or len(given) < len(chosen):
        return texts, None
    return texts, [_sum(values, where) for values in zip(*lists, strict=True)]


def _sum(values: Sequence[Any], where: str) -> float | None:
    """The rewards that functions gave to one answer, added; None where none gave one."""
    try:
        numbers = [float(value) for value in values if value is not None]
    except (TypeError, ValueError):
        raise DataError(f"{where}: rewards should be numbers; got {shortened(list(values))}.") from None
    known = [number for number in numbers if number == number]
    if any(abs(number) == float("inf") for number in known):
        raise DataError(f"{where}: a reward is infinite; give a number, or none.")
    return sum(known) if known else None


def _answer(text: Any, prompt: Text, where: str) -> Text:
    if isinstance(text, str):
        check_encodable(text, "completion", where)
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    if isinstance(text, Mapping):
        text = [text]
    checked = checked_text(text, "completion", where)
    if isinstance(prompt, str):
        raise DataError(
            f"{where}: the answer is a list of messages, but its prompt is a text. Give both alike."
        )
    return checked


def _rewarded(groups: Sequence[_Group], path: str, notes: list[str]) -> list[_Group]:
    """The prompts that have at least two answers with a reward, with these answers alone."""
    kept: list[_Group] = []
    missing, bare, single = 0, [], []
    for group in groups:
        places = [k for k, reward in enumerate(group.rewards) if reward is not None]
        missing += len(group.texts) - len(places)
        if len(places) < 2:
            (single if places else bare).append(group.rows[0])
            continue
        kept.append(group.only(places))
    if missing:
        notes.append(f"{missing} answers have no reward (None or NaN) and are left out.")
    if bare:
        notes.append(
            f"No answer has a reward for {len(bare)} prompts, which are left out (rows {_shown(bare)})."
        )
    if single:
        notes.append(
            f"{len(single)} prompts are left out: with one answer there is no spread (rows {_shown(single)})."
        )
    if not kept:
        raise DataError(f"No prompt of {path} has two answers with a reward. {' '.join(notes)}")
    return kept


def _shown(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")


def _rollout(tokenizer: PreTrainedTokenizerBase, group: _Group, max_length: int | None) -> Rollout:
    prompt = group.prompt
    pairs = [
        tokenize_pair(tokenizer, PreferencePair(row, prompt.text, text, text), max_length)
        for row, text in zip(group.rows, group.texts, strict=True)
    ]
    rewards = np.array([np.nan if reward is None else reward for reward in group.rewards], dtype=float)
    return Rollout(
        prompt=prompt,
        completions=tuple(
            text if isinstance(text, str) else str(text[-1].get("content") or "") for text in group.texts
        ),
        prompt_ids=tuple(pair.prompt_ids for pair in pairs),
        answer_ids=tuple(pair.chosen_ids for pair in pairs),
        finished=tuple(not pair.truncated for pair in pairs),
        rewards=rewards if len(rewards) else None,
        parts={
            name: np.array([np.nan if value is None else value for value in values], dtype=float)
            for name, values in group.parts.items()
        },
    )

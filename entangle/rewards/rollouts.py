"""Rollouts: K answers to each prompt, sampled from the policy or read from a file, as rows of tokens.

    data set -> Prompt -> sample_answers -> Rollout       rollouts file -> Rollout -> RowBatch

A sampled answer's tokens are kept as they were drawn, so its log-prob is that of what was sampled: an answer
that reached the length limit has no end-of-sequence token and is scored as far as it goes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from entangle.analysis.statistics import Array
from entangle.config.hashing import sha256_of
from entangle.data import DataError, PreferencePair, TokenizedPair
from entangle.data.pairs import Text
from entangle.data.sources import read_rows
from entangle.models import Policy
from entangle.scores.logps import causal_lm, evaluating
from entangle.scores.rows import RowBatch

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Only temperature 1 without top-k and top-p draws from the policy itself.

    Args:
        num_generations: K, answers per prompt.
        max_completion_length: tokens of an answer at most.
        temperature: logits are divided by it.
        top_k: draw among this many most probable tokens; 0: all.
        top_p: draw among the most probable tokens that together have this probability.
        seed: of the draws.
    """

    num_generations: int = 16
    max_completion_length: int = 48
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether answers come from the policy's own distribution."""
        return self.temperature == 1 and self.top_k == 0 and self.top_p == 1


@dataclass(frozen=True)
class Prompt:
    """A prompt and the columns that came with it.

    Args:
        index: row in the data set (of its first appearance).
        text: a string or a list of messages.
        columns: every other column of its row.
    """

    index: int
    text: Text
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """First 16 hex digits of a sha256, as `PreferencePair.prompt_hash`."""
        return PreferencePair(self.index, self.text, "", "").prompt_hash


@dataclass(frozen=True)
class Rollout:
    """K answers to a prompt.

    Args:
        prompt: the prompt.
        completions: K texts.
        prompt_ids: tokens before each answer (the same for all, unless a token merges over the boundary).
        answer_ids: scored tokens of each answer.
        finished: whether each ends with an end-of-sequence token.
        rewards: `(K,)`, if the answers came with them.
        parts: `(K,)` by column, where the answers came with the rewards of several functions; NaN for none.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    prompt_ids: tuple[list[int], ...]
    answer_ids: tuple[list[int], ...]
    finished: tuple[bool, ...]
    rewards: Array | None = None
    parts: Mapping[str, Array] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether an answer has no token that can be scored."""
        return any(not a or not p for p, a in zip(self.prompt_ids, self.answer_ids, strict=True))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(p) + len(a) for p, a in zip(self.prompt_ids, self.answer_ids, strict=True))

    def collate(self, pad_id: int, pair: TokenizedPair | None = None) -> RowBatch:
        """The answers as K right-padded rows; with a pair, its chosen and its rejected as two further rows.

        Args:
            pad_id: the token that fills up rows.
            pair: the prompt's preference pair.
        """
        prompts, answers = list(self.prompt_ids), list(self.answer_ids)
        if pair is not None:
            prompts += [pair.prompt_ids] * 2
            answers += [pair.chosen_ids, pair.rejected_ids]
        rows = [p + a for p, a in zip(prompts, answers, strict=True)]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
        attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = torch.tensor(row)
            attention[k, : len(row)] = 1
            completion[k, len(prompts[k]) : len(row)] = 1
        shared = torch.tensor([min(map(len, prompts))])
        return RowBatch(ids, attention, completion, shared, group_size=len(rows))


# --- prompts ------------------------------------------------------------------------------------------------


def load_prompts(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    column: str = "prompt",
    limit: int | None = None,
    seed: int | None = None,
) -> list[Prompt]:
    """The distinct prompts of a data set, in its order; each with the columns of its first row.

    Args:
        source: as for `entangle.data.load_pairs`; only a prompt column is needed.
        split: split of a hub data set or folder.
        config: configuration of a hub data set.
        column: name of the prompt column.
        limit: at most this many prompts.
        seed: which ones: a random subset; without it the first ones.

    Raises:
        DataError: the source can't be read, or has no such column.
    """
    rows = _rows(source, split, config)
    first: dict[str, Prompt] = {}
    for index, row in enumerate(rows):
        if not _is_text(row.get(column)):
            raise DataError(
                f"Row {index} of {source} has no prompt: expected a text or a list of messages in the column "
                f"{column!r}; its columns are {', '.join(row)}. Name it with --columns prompt=NAME."
            )
        prompt = Prompt(index, row[column], {k: v for k, v in row.items() if k != column})
        first.setdefault(prompt.hash, prompt)
    return _some(list(first.values()), limit, seed)


def prompts_of(
    pairs: Sequence[PreferencePair], limit: int | None = None, seed: int | None = None
) -> dict[int, tuple[Prompt, PreferencePair]]:
    """The distinct prompts of preference pairs, each with its first pair, by the pair's index.

    A prompt's columns are its pair's chosen, rejected and further columns, so a reward finds its reference.
    `limit` and `seed` choose as in `load_prompts`.

    Args:
        pairs: preference pairs.
        limit: prompts at most.
        seed: which ones, as in `load_prompts`.
    """
    first: dict[str, PreferencePair] = {}
    for pair in pairs:
        first.setdefault(pair.prompt_hash, pair)
    chosen = _some(list(first.values()), limit, seed)
    columns = [{**pair.extra, "chosen": pair.chosen, "rejected": pair.rejected} for pair in chosen]
    return {p.index: (Prompt(p.index, p.prompt, c), p) for p, c in zip(chosen, columns, strict=True)}


def _some(items: list[Item], limit: int | None, seed: int | None) -> list[Item]:
    """At most `limit` of the items, in their order: a random subset by the seed, without one the first ones."""
    if limit is None or limit >= len(items):
        return items
    if seed is None:
        return items[:limit]
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """The sha256 over indices, prompts and columns: equal iff a run would see the same data."""
    contents = ([prompt.index, prompt.text, dict(prompt.columns)] for prompt in prompts)
    return sha256_of(json.dumps(content, sort_keys=True, default=str).encode() for content in contents)


def _rows(source: str, split: str, config: str | None) -> list[Mapping[str, Any]]:
    found = read_rows(source, split, config)
    rows = [found[i] for i in range(len(found))]
    if not rows:
        raise DataError(f"Expected at least one row in {source}; it has none.")
    return rows


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return (
        isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)
    )


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens that an answer is drawn after: the text's, or the chat template's with its generation prompt.

    Args:
        tokenizer: the policy's.
        prompt: a text or a conversation.

    Raises:
        DataError: a conversation meets a tokenizer without a chat template.
    """
    if isinstance(prompt.text, str):
        ids = list(tokenizer(text=prompt.text, verbose=False)["input_ids"])  # pyright: ignore[reportArgumentType]
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    if tokenizer.chat_template is None:
        raise DataError(f"Row {prompt.index} is a conversation, but the tokenizer has no chat template.")
    messages = [dict(message) for message in prompt.text]
    encoded: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    return list(encoded["input_ids"])


# --- sampling -----------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_answers(policy: Policy, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
    """Draw `num_generations` answers to every prompt in one batched call of `generate`.

    Law: the same policy, prompts (in this order) and `sampling` give the same answers, whatever was drawn
    before; the process's random state is left as it was.

    Args:
        policy: the policy; its model is left as it was found.
        prompts: drawn for together.
        sampling: how.
    """
    tokens = [prompt_tokens(policy.tokenizer, prompt) for prompt in prompts]
    width = max(map(len, tokens))
    ids = torch.full((len(tokens), width), policy.pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for row, prompt_ids in enumerate(tokens):
        ids[row, width - len(prompt_ids) :] = torch.tensor(prompt_ids)
        attention[row, width - len(prompt_ids) :] = 1
    ends = end_tokens(policy)
    settings = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_completion_length,
        num_return_sequences=sampling.num_generations,
        eos_token_id=sorted(ends) or None,
        pad_token_id=policy.pad_id,
        use_cache=True,
    )
    drawn = _generate(policy, ids, attention, settings, _seed(sampling.seed, prompts[0].index))[
        :, width:
    ].tolist()
    count = sampling.num_generations
    return [
        _sampled(policy.tokenizer, prompt, tokens[i], drawn[i * count : (i + 1) * count], ends)
        for i, prompt in enumerate(prompts)
    ]


def _generate(
    policy: Policy, ids: torch.Tensor, attention: torch.Tensor, settings: GenerationConfig, seed: int
) -> torch.Tensor:
    """`generate` with these settings and none of the checkpoint's own (repetition penalties and the like)."""
    model: Any = causal_lm(policy.model)
    device = policy.device
    before = model.generation_config
    devices = [device] if device.type == "cuda" else []
    try:
        model.generation_config = settings
        with evaluating(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return model.generate(
                input_ids=ids.to(device), attention_mask=attention.to(device), generation_config=settings
            ).cpu()
    finally:
        model.generation_config = before


def _seed(seed: int, index: int) -> int:
    return int(sha256_of([f"{seed}:{index}".encode()])[:12], 16)


def end_tokens(policy: Policy) -> set[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's generation settings."""
    model: Any = causal_lm(policy.model)
    settings = getattr(model, "generation_config", None)
    given = getattr(settings, "eos_token_id", None)
    found = [policy.tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])]
    return {token for token in found if isinstance(token, int)}


def _sampled(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    prompt_ids: list[int],
    drawn: list[list[int]],
    ends: set[int],
) -> Rollout:
    answers = [_until_end(row, ends) for row in drawn]
    return Rollout(
        prompt=prompt,
        completions=tuple(str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers),
        prompt_ids=(prompt_ids,) * len(answers),
        answer_ids=tuple(answers),
        finished=tuple(bool(answer) and answer[-1] in ends for answer in answers),
    )


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    end = next((t for t, token in enumerate(ids) if token in ends), None)
    return ids if end is None else ids[: end + 1]

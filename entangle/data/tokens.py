"""Pairs as token ids and as padded rows, token for token as TRL 1.16's DPOTrainer makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from entangle.data.invalid import report_invalid
from entangle.data.messages import Message
from entangle.data.notes import MARKERS, notes_on_tokens
from entangle.data.pairs import PreferencePair
from entangle.errors import DataError
from entangle.scores.rows import RowBatch

Ids = list[int]


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as token ids: the rows are `prompt_ids + chosen_ids` and `prompt_ids + rejected_ids`.

    Args:
        index: row in the data set.
        prompt_ids: tokens that both rows begin with and that aren't scored.
        chosen_ids: the scored tokens of the chosen row, after truncation.
        rejected_ids: the same for the rejected row; each row is truncated on its own.
        prompt_hash: see `PreferencePair.prompt_hash`.
        truncated: a row was longer than `max_length`.
        identical: both rows hold the same tokens, so their scores are equal and no loss can tell them apart.
        empty: a row has no scored token (a token without a token before it can't be scored).
        prompt_scored: tokens at the prompt's end that are left out, since prompt + response is rendered otherwise there
            and scored from there on; 0 where the prompt's text begins both rows, even if a token merges over its end.
        dropped: the prompt alone fills `max_length`, so TRL doesn't train on the pair. Implies `truncated`
            three.
        ref_chosen_logps: see `PreferencePair`.
        ref_rejected_logps: see `PreferencePair`.
        extra: see `PreferencePair`.
    """

    index: int
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_hash: str = ""
    truncated: bool = False
    identical: bool = False
    empty: bool = False
    dropped: bool = False
    prompt_scored: int = 0
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, max_length: int | None = 1024
) -> TokenizedPair:
    """A pair as token ids, as TRL 1.16's DPOTrainer makes them.

    1. Plain text: the end-of-sequence token is appended to a response that doesn't end with its text already
       (a tokenizer that appends one itself gives two, as in TRL). Conversations: the chat template closes the
       turn.
    2. Prompt, prompt + chosen and prompt + rejected are each tokenised whole, with the tokenizer's own
       special tokens.
    3. The scored part begins where prompt and prompt + response first differ, at the earlier of the two
       responses' places: a token that merges over the boundary is scored in both rows.
    4. Rows are cut on the right to `max_length` tokens, each on its own. `max_length=None` cuts nothing.

    Raises:
        DataError: a conversation meets a tokenizer without a chat template, or one that refuses its messages.
    """
    try:
        prompt_ids, chosen_row, rejected_row = _tokenize(tokenizer, pair)
    except (UnicodeError, TypeError) as error:
        raise DataError(f"Row {pair.index}: the tokenizer can't encode its text: {error}.") from error
    shared = min(_common_prefix(prompt_ids, chosen_row), _common_prefix(prompt_ids, rejected_row))
    chosen_kept, rejected_kept = chosen_row[:max_length], rejected_row[:max_length]
    chosen_ids, rejected_ids = chosen_kept[shared:], rejected_kept[shared:]
    unscored = 0 if shared else 1  # nothing stands before the first token of a row, so nothing predicts it
    return TokenizedPair(
        index=pair.index,
        prompt_ids=prompt_ids[:shared][:max_length],
        chosen_ids=chosen_ids,
        rejected_ids=rejected_ids,
        prompt_hash=pair.prompt_hash,
        truncated=len(chosen_kept) < len(chosen_row) or len(rejected_kept) < len(rejected_row),
        identical=bool(chosen_ids) and chosen_ids == rejected_ids,
        empty=min(len(chosen_ids), len(rejected_ids)) <= unscored,
        dropped=max_length is not None and shared >= max_length,
        prompt_scored=_unlike(tokenizer, prompt_ids, (chosen_row, rejected_row), shared),
        ref_chosen_logps=pair.ref_chosen_logps,
        ref_rejected_logps=pair.ref_rejected_logps,
        extra=pair.extra,
    )


@dataclass(frozen=True)
class TokenizedPairs:
    """Pairs of a data set with their tokens, one for one, and what is to be known of them.

    Args:
        pairs: those that could be tokenised.
        tokens: their tokens.
        notes: sentences for people.
    """

    pairs: list[PreferencePair]
    tokens: list[TokenizedPair]
    notes: tuple[str, ...] = ()


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    max_length: int | None = 1024,
    *,
    vocabulary: int | None = None,
    skip_invalid: bool = False,
) -> TokenizedPairs:
    """Pairs as token ids (see `tokenize_pair`), with notes; a pair that can't be tokenised is refused by its row.

    Args:
        tokenizer: the model's tokenizer.
        pairs: the pairs.
        max_length: tokens of a row at most; None cuts nothing.
        vocabulary: tokens that the model has embeddings for; None isn't checked.
        skip_invalid: leave such pairs out, and log how many, instead of refusing the data.

    Raises:
        DataError: the chat template refuses a conversation, a text can't be encoded, or a token has no embedding.
    """
    kept: list[PreferencePair] = []
    tokens: list[TokenizedPair] = []
    invalid: dict[int, DataError] = {}
    for pair in pairs:
        try:
            done = tokenize_pair(tokenizer, pair, max_length)
            _check_vocabulary(tokenizer, done, vocabulary)
        except DataError as error:
            invalid[pair.index] = error
            continue
        kept.append(pair)
        tokens.append(done)
    if invalid:
        report_invalid(invalid, "the data", skip=skip_invalid and bool(kept))
    facts = [facts_of(tokenizer, pair, done) for pair, done in zip(kept, tokens, strict=True)]
    return TokenizedPairs(kept, tokens, tuple(notes_on_tokens(facts)))


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, pair: TokenizedPair, vocabulary: int | None
) -> None:
    largest = max((*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids), default=0)
    if vocabulary is not None and largest >= vocabulary:
        raise DataError(
            f"Row {pair.index}: its token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) has no embedding: "
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {vocabulary}. Resize the model "
            "(resize_token_embeddings) as its training did, or take the tokenizer that it was trained with."
        )


def facts_of(tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, done: TokenizedPair) -> dict[str, Any]:
    """What `notes_on_tokens` counts of one pair."""
    row = done.prompt_ids + done.chosen_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = _texts_of(pair)
    encoder: Any = tokenizer
    known = encoder.get_added_vocab()
    markers = [mark for mark in dict.fromkeys((*MARKERS, *known)) if any(mark in text for text in texts)]
    shared = len(done.prompt_ids)
    special = set(tokenizer.all_special_ids)
    return {
        "index": done.index,
        "prompt_scored": done.prompt_scored,
        "whole_prompt": done.prompt_scored > 0
        and (done.prompt_scored > shared or all(token in special for token in done.prompt_ids)),
        "two_beginnings": bos is not None and row[:2] == [bos, bos],
        "two_ends": eos is not None
        and any(answer[-2:] == [eos, eos] for answer in (done.chosen_ids, done.rejected_ids)),
        "markers": markers,
        "foreign": [mark for mark in markers if mark not in known],
        "lost": done.identical and not done.truncated and pair.chosen != pair.rejected,
    }


def _texts_of(pair: PreferencePair) -> list[str]:
    texts: list[str] = []
    for text in (pair.prompt, pair.chosen, pair.rejected):
        texts += [text] if isinstance(text, str) else [str(message.get("content") or "") for message in text]
    return texts


def _tokenize(tokenizer: PreTrainedTokenizerBase, pair: PreferencePair) -> tuple[Ids, Ids, Ids]:
    """Tokens of prompt, prompt + chosen and prompt + rejected."""
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return (
            _tokenize_text(tokenizer, prompt),
            _tokenize_text(tokenizer, prompt + _ended(chosen, tokenizer)),
            _tokenize_text(tokenizer, prompt + _ended(rejected, tokenizer)),
        )
    assert isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list)
    return (
        _tokenize_chat(tokenizer, prompt, pair, add_generation_prompt=True),
        _tokenize_chat(tokenizer, prompt + chosen, pair),
        _tokenize_chat(tokenizer, prompt + rejected, pair),
    )


def _tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    # verbose would warn of texts longer than the model, before they are cut
    encoded: Any = tokenizer(text=text, verbose=False)
    return list(encoded["input_ids"])


def _ended(response: str, tokenizer: PreTrainedTokenizerBase) -> str:
    eos: Any = tokenizer.eos_token
    return response if eos is None or response.endswith(eos) else response + eos


def _tokenize_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    pair: PreferencePair,
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    if tokenizer.chat_template is None:
        raise DataError(
            f"Row {pair.index} is a conversation, but the tokenizer of "
            f"{tokenizer.name_or_path or 'the model'} has no chat template. Use the instruction-tuned "
            "model's tokenizer, or data with plain strings."
        )
    options = {"tools": None, **pair.template_options}
    if add_generation_prompt:
        options["add_generation_prompt"] = True
    try:
        encoded: Any = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=True, return_dict=True, **options
        )
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        raise DataError(
            f"Row {pair.index}: the tokenizer's chat template refuses the conversation "
            f"(roles: {', '.join(m['role'] for m in messages)}): {error}{_hint(messages, error)}"
        ) from error
    return list(encoded["input_ids"])


def _unlike(tokenizer: PreTrainedTokenizerBase, prompt: Ids, rows: Sequence[Ids], shared: int) -> int:
    """Tokens of the prompt after the shared ones, if its text isn't a beginning of both rows' texts."""
    left = len(prompt) - shared
    if not left:
        return 0
    text = str(tokenizer.decode(prompt, clean_up_tokenization_spaces=False))
    begun = (tokenizer.decode(row[: len(prompt) + 8], clean_up_tokenization_spaces=False) for row in rows)
    return 0 if all(str(row).startswith(text) for row in begun) else left


def _hint(messages: Sequence[Message], error: Exception) -> str:
    """What may be wrong with a tool call that a template stumbles over."""
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
    if not any(isinstance(f, Mapping) and isinstance(f.get("arguments"), str) for f in functions):
        return ""
    return (
        ". The arguments of a tool call are text here, and this template wants them as an object: "
        "json.loads(call['function']['arguments'])"
    )


def _common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    shortest = min(len(ids), len(others))
    return next((i for i in range(shortest) if ids[i] != others[i]), shortest)


def collate(pairs: Sequence[TokenizedPair], pad_id: int, padding_side: str = "right") -> RowBatch:
    """Pairs as one padded batch of `2 * len(pairs)` rows: every chosen one, then every rejected one.

    Masks say what is a token and what is scored; `pad_id` is only a filler and may be any token's id.

    Raises:
        DataError: no pairs, an unknown padding side, or a pair that TRL drops (it has nothing to score).
    """
    if padding_side not in ("left", "right"):
        raise DataError(f"padding_side should be 'left' or 'right'; got {padding_side!r}.")
    dropped = [pair.index for pair in pairs if pair.dropped]
    if dropped or not pairs:
        raise DataError(
            f"Expected pairs that have something to score; got "
            f"{f'dropped rows {dropped}' if dropped else 'none'}. Leave out the pairs whose `dropped` is "
            "set, or raise max_length."
        )
    responses = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    prompts = [pair.prompt_ids for pair in pairs] * 2
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    input_ids = torch.full((len(responses), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        length = len(prompt) + len(response)
        start = 0 if padding_side == "right" else width - length
        input_ids[row, start : start + length] = torch.tensor(prompt + response)
        attention_mask[row, start : start + length] = 1
        completion_mask[row, start + len(prompt) : start + length] = 1
    return RowBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        completion_mask=completion_mask,
        prompt_length=torch.tensor([len(pair.prompt_ids) for pair in pairs]),
    )

"""Sampling from the policy, and answers from a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from entangle.config import ModelOptions
from entangle.data import DataError, PreferencePair, tokenize_pair
from entangle.models import Policy, load_policy
from entangle.rewards.recorded import load_rollouts
from entangle.rewards.rollouts import (
    Prompt,
    Sampling,
    load_prompts,
    prompt_tokens,
    sample_answers,
)
from tests.tiny import END, gpt2_tokenizer, llama_tokenizer, save_policy

PROMPTS = [Prompt(0, "what is the sum?"), Prompt(1, "TL;DR:"), Prompt(5, "she said that the cat sat on")]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(ModelOptions(save_policy(tmp_path_factory.mktemp("policy"))))


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_answers_depend_on_nothing_but_the_options(policy):
    sampling = Sampling(num_generations=3, max_completion_length=6, seed=7)
    first = sample_answers(policy, PROMPTS, sampling)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert sample_answers(policy, PROMPTS, sampling) == first
    assert torch.equal(torch.get_rng_state(), state)
    other = sample_answers(policy, PROMPTS, Sampling(num_generations=3, max_completion_length=6, seed=8))
    assert [r.answer_ids for r in other] != [r.answer_ids for r in first]
    assert [len(r.completions) for r in first] == [3, 3, 3]


def test_answers_are_the_policys_whatever_its_own_settings(policy):
    """First-token frequencies of 6000 draws against the softmax: within 5 standard errors for every token.

    The checkpoint asks for top-k 2 and forbids half of the tokens, which would show at once.
    """
    settings = policy.model.generation_config
    settings.top_k, settings.suppress_tokens, settings.do_sample = 2, list(range(100, 300)), True
    sampling = Sampling(num_generations=6000, max_completion_length=1)
    (rollout,) = sample_answers(policy, PROMPTS[:1], sampling)
    assert policy.model.generation_config is settings
    ids = torch.tensor([prompt_tokens(policy.tokenizer, PROMPTS[0])])
    chances = policy.model(input_ids=ids).logits[0, -1].double().softmax(-1).detach().numpy()
    drawn = np.array([answer[0] for answer in rollout.answer_ids])
    found = np.bincount(drawn, minlength=len(chances)) / len(drawn)
    assert (np.abs(found - chances) <= 5 * np.sqrt(chances * (1 - chances) / len(drawn)) + 1e-9).all()
    assert len(np.unique(drawn)) > 50


def test_padding_of_the_batch_changes_no_answer(policy):
    """With top-k 1 nothing is random: prompts of unlike lengths in one batch answer as they do alone."""
    greedy = Sampling(num_generations=1, max_completion_length=8, top_k=1)
    together = [r.answer_ids for r in sample_answers(policy, PROMPTS, greedy)]
    assert together == [sample_answers(policy, [prompt], greedy)[0].answer_ids for prompt in PROMPTS]


def test_an_answer_ends_with_its_end_token_or_at_the_limit(policy):
    end = policy.tokenizer.eos_token_id
    (rollout,) = sample_answers(policy, PROMPTS[:1], Sampling(num_generations=300, max_completion_length=12))
    assert 0 < sum(rollout.finished) < 300
    for ids, is_finished, text in zip(rollout.answer_ids, rollout.finished, rollout.completions, strict=True):
        assert is_finished == (ids[-1] == end)
        assert ids.count(end) == int(is_finished) and (is_finished or len(ids) == 12)
        assert END not in text


def test_rows_hold_prompt_and_answer(policy):
    (rollout,) = sample_answers(policy, PROMPTS[1:2], Sampling(num_generations=5, max_completion_length=7))
    batch = rollout.collate(pad_id=0)
    assert batch.group_size == 5 and batch.lengths.tolist() == [len(ids) for ids in rollout.answer_ids]
    for k, ids in enumerate(rollout.answer_ids):
        assert batch.input_ids[k][batch.completion_mask[k].bool()].tolist() == ids
        assert batch.input_ids[k][batch.attention_mask[k].bool()].tolist() == rollout.prompt_ids[k] + ids


def test_a_tokenizers_own_end_token_isnt_part_of_the_prompt():
    assert prompt_tokens(gpt2_tokenizer(adds_end=True), PROMPTS[0]) == prompt_tokens(
        gpt2_tokenizer(), PROMPTS[0]
    )
    assert prompt_tokens(llama_tokenizer(), PROMPTS[0])[0] == llama_tokenizer().bos_token_id


def test_conversations_get_the_generation_prompt():
    tokenizer = gpt2_tokenizer(chat=True)
    prompt = Prompt(0, [{"role": "user", "content": "what is the sum?"}])
    assert tokenizer.decode(prompt_tokens(tokenizer, prompt)).endswith("<assistant>")
    with pytest.raises(DataError, match="no chat template"):
        prompt_tokens(gpt2_tokenizer(), prompt)


def test_prompts_are_distinct_and_keep_their_columns(tmp_path):
    rows = [{"question": q, "note": i} for i, q in enumerate(("a", "b", "a", "c", "d"))]
    path = write(tmp_path / "p.jsonl", rows)
    prompts = load_prompts(path, column="question")
    assert [(p.index, p.text, dict(p.columns)) for p in prompts[:3]] == [
        (0, "a", {"note": 0}),
        (1, "b", {"note": 1}),
        (3, "c", {"note": 3}),
    ]
    assert [p.index for p in load_prompts(path, column="question", limit=2)] == [0, 1]
    drawn = load_prompts(path, column="question", limit=3, seed=1)
    assert drawn == load_prompts(path, column="question", limit=3, seed=1) and len(drawn) == 3
    with pytest.raises(DataError, match="--columns prompt=NAME"):
        load_prompts(path)


def test_both_forms_of_a_rollouts_file_are_one(tmp_path):
    whole = [
        {"prompt": "what is", "completions": [" the sum", " four"], "rewards": [1, None]},
        {"prompt": "she said", "completions": [" that", " they"], "rewards": [0.5, 0.25]},
    ]
    parts = [
        {"prompt": row["prompt"], "completion": row["completions"][k], "reward": row["rewards"][k]}
        for k in range(2)
        for row in whole
    ]
    tokenizer = gpt2_tokenizer()
    first = load_rollouts(write(tmp_path / "a.jsonl", whole), tokenizer)
    second = load_rollouts(write(tmp_path / "b.jsonl", parts), tokenizer)
    for a, b in zip(first, second, strict=True):
        assert (a.prompt.text, a.completions, a.answer_ids) == (b.prompt.text, b.completions, b.answer_ids)
        np.testing.assert_array_equal(a.rewards, b.rewards)
    np.testing.assert_array_equal(first[0].rewards, [1.0, np.nan])


def test_answers_from_a_file_are_tokenised_as_responses_of_pairs(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "what is", "completions": [" the sum", " four"]}])
    (rollout,) = load_rollouts(path, gpt2_tokenizer())
    pair = tokenize_pair(gpt2_tokenizer(), PreferencePair(0, "what is", " the sum", " four"))
    assert rollout.answer_ids == (pair.chosen_ids, pair.rejected_ids) and rollout.finished == (True, True)
    (cut,) = load_rollouts(path, gpt2_tokenizer(), max_length=len(pair.prompt_ids) + 2)
    assert cut.answer_ids[0] == pair.chosen_ids[:2] and not cut.finished[0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "answer": "b"}], "Row 0 of .*: expected the columns"),
        ([{"prompt": "a", "completions": ["b"], "rewards": [1, 2]}], "lists of one length"),
        (
            [{"prompt": "a", "completion": "b", "reward": 1}, {"prompt": "a", "completion": "c"}],
            "some have none",
        ),
    ],
)
def test_broken_rollouts_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_rollouts(write(tmp_path / "a.jsonl", rows), gpt2_tokenizer())

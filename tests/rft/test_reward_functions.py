"""Rewards of answers: values worked out by hand, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification

from entangle.rewards.functions import (
    REWARD_FUNCTIONS,
    AnswerSet,
    Function,
    Length,
    RewardError,
    RougeL,
    build_reward_function,
)
from tests import tiny

ANSWERS = AnswerSet(
    "Sum it up:", ("the cat sat", "a dog ran.", ""), {"chosen": "the cat sat down", "size": 3}
)


def test_rouge_l_by_hand():
    """LCS of 3 words: precision 3/3, recall 3/4, F1 = 6/7; no common word: 0."""
    pytest.importorskip("rouge_score")
    np.testing.assert_allclose(build_reward_function("rouge_l")(ANSWERS), [6 / 7, 0, 0], atol=1e-12)


def test_chrf_is_one_for_the_reference_itself():
    pytest.importorskip("sacrebleu")
    rewards = build_reward_function("chrf")(
        AnswerSet("p", ("the cat sat down", "the cat sat", "xyz"), ANSWERS.columns)
    )
    assert rewards[0] == pytest.approx(1) and 0.5 < rewards[1] < 1 and rewards[2] == 0


def test_rules():
    assert build_reward_function("length:least=1,most=2")(ANSWERS).tolist() == [0, 0, 0]
    assert build_reward_function("length:most=3")(ANSWERS).tolist() == [1, 1, 0]  # both ends are allowed
    assert build_reward_function("length:least=3,most=9")(ANSWERS).tolist() == [1, 1, 0]
    assert build_reward_function("format")(ANSWERS).tolist() == [0, 1, 0]
    assert build_reward_function({"name": "format", "pattern": "^the"})(ANSWERS).tolist() == [1, 0, 0]
    assert Length.support.is_binary and RougeL.support.is_known


def test_implicit_reward_is_the_scaled_log_ratio():
    answers = AnswerSet("p", ("a", "b"), logps=np.array([-1.0, -3.0]), ref_logps=np.array([-2.0, -2.5]))
    np.testing.assert_allclose(build_reward_function("implicit:beta=0.5")(answers), [0.5, -0.25])
    with pytest.raises(RewardError, match="needs a reference"):
        build_reward_function("implicit")(AnswerSet("p", ("a",), logps=np.zeros(1)))


def test_rewards_of_a_file():
    assert build_reward_function("file")(AnswerSet("p", ("a",), rewards=np.array([2.0]))).tolist() == [2.0]
    with pytest.raises(RewardError, match="column 'rewards'"):
        build_reward_function("file")(ANSWERS)


def count_words(prompts, completions, size, chosen):
    """As TRL calls it: lists with an entry per answer, columns by name."""
    assert prompts == ["Sum it up:"] * 3 and size == [3] * 3 and len(chosen) == 3
    return [len(text.split()) or None for text in completions]


def test_a_function_is_called_as_trl_does():
    reward_function = build_reward_function("tests.rft.test_reward_functions:count_words")
    assert isinstance(reward_function, Function)
    np.testing.assert_array_equal(reward_function(ANSWERS), [3, 3, np.nan])


def roles(prompts, completions, **columns):
    return [float(completion[0]["role"] == "assistant") for completion in completions]


def test_a_function_sees_conversations_as_conversations():
    chat = AnswerSet([{"role": "user", "content": "hi"}], ("a", "b"))
    assert build_reward_function("tests.rft.test_reward_functions:roles")(chat).tolist() == [1, 1]


def too_few(prompts, completions, **columns):
    return [0.0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_reward_model_gives_its_single_output(tmp_path, side):
    """The same rewards in one batch and one at a time, and as the model gives them on the joined text."""
    tokenizer = tiny.gpt2_tokenizer(pad=True)
    tokenizer.padding_side = side
    config = tiny.llama().config
    config.num_labels, config.pad_token_id = 1, None
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    spec = {"name": "reward_model", "model": str(tmp_path)}
    together = build_reward_function(spec)(ANSWERS)
    np.testing.assert_allclose(build_reward_function(spec | {"batch_size": 1})(ANSWERS), together, atol=1e-5)
    ids = torch.tensor([tokenizer(ANSWERS.prompt + ANSWERS.completions[1])["input_ids"]])
    assert together[1] == pytest.approx(float(model(input_ids=ids).logits.detach()), abs=1e-5)
    cut = build_reward_function(spec | {"max_length": 4})(ANSWERS)  # the answer's end is what stays
    assert cut[1] == pytest.approx(float(model(input_ids=ids[:, -4:]).logits.detach()), abs=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rouge", "Unknown reward 'rouge'.*rouge_l"),
        ("rouge_l:size=3", "Unknown option 'size' of reward 'rouge_l'. It has: reference, stem"),
        ("length:x", "module:function"),
        ("length:least=5,most=2", "least <= most"),
        ("format:pattern=(", "regular expression"),
        ("reward_model", "needs a model"),
        ("reward_model:model=no/such/model", "Can't load the reward model"),
        ("no_such_module:f", "Can't find the reward function"),
        ("tests.rft.test_reward_functions:too_few", "should return 3 rewards"),
        ("rouge_l:reference=summary", "needs a reference text in the column 'summary'.*chosen, size"),
    ],
)
def test_what_cant_be_used_is_refused_with_advice(spec, message):
    with pytest.raises(RewardError, match=message):
        build_reward_function(spec)(ANSWERS)


def test_every_reward_function_is_known_by_its_name():
    assert set(REWARD_FUNCTIONS) == {
        "rouge_l",
        "chrf",
        "length",
        "format",
        "reward_model",
        "implicit",
        "file",
        "function",
    }

"""Answers from a file as people have them: trainers' records, abstaining rewards, other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from entangle.data import DataError
from entangle.rewards.functions import FromFile, build_reward_function
from entangle.rewards.recorded import read_recorded
from tests.conftest import SHARED
from tests.tiny import gpt2_tokenizer

ASKED = [{"role": "user", "content": "what is the sum?"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def record(*rewards: str) -> list[dict[str, Any]]:
    """A trainer's table: two steps, two prompts, three answers each."""
    return [
        {
            "step": step,
            "prompt": [{"role": "user", "content": asked}],
            "completion": said(f"{word} {step}"),
            **{name: float((k + len(name)) % 3) for name in rewards},
            "advantage": 0.5,
        }
        for step in (4, 8)
        for asked in ("what is the sum?", "is it there?")
        for k, word in enumerate(("four", "the mat", "cats"))
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: str, **options: Any) -> Any:
    return read_recorded(path, gpt2_tokenizer(chat=True), **options)


def test_text_answers_to_a_conversation_are_the_assistants(tmp_path):
    texts = [{"prompt": ASKED, "completions": ["four", "the mat"], "rewards": [1, 0]}]
    messages = [{"prompt": ASKED, "completions": [said("four"), said("the mat")], "rewards": [1, 0]}]
    found = [
        read(write(tmp_path / f"{n}.jsonl", rows)).rollouts[0] for n, rows in enumerate((texts, messages))
    ]
    assert found[0].answer_ids == found[1].answer_ids and found[0].completions == ("four", "the mat")
    assert found[0].prompt_ids == found[1].prompt_ids


def test_only_the_last_step_of_a_record_is_taken_and_said(tmp_path):
    found = read(write(tmp_path / "a.parquet", record("accuracy_reward")), needs_rewards=True)
    assert [rollout.completions for rollout in found.rollouts] == [("four 8", "the mat 8", "cats 8")] * 2
    assert "of 2 steps" in found.notes[0] and "4 (6 rows), 8 (6 rows)" in found.notes[0]
    assert "'accuracy_reward'" in found.notes[1]  # the only one there is


def test_several_reward_functions_are_named_and_chosen(tmp_path):
    path = write(tmp_path / "a.parquet", record("accuracy_reward", "tone"))
    with pytest.raises(
        DataError, match=r"2 functions: accuracy_reward, tone.*file:column=accuracy_reward\+tone"
    ):
        read(path, needs_rewards=True)
    rows = record("accuracy_reward", "tone")[6:9]
    one = read(path, needs_rewards=True, reward="tone").rollouts[0]
    np.testing.assert_array_equal(one.rewards, [row["tone"] for row in rows])
    both = read(path, needs_rewards=True, reward="accuracy_reward+tone").rollouts[0]
    np.testing.assert_array_equal(both.rewards, [row["tone"] + row["accuracy_reward"] for row in rows])
    assert read(path).rollouts[0].rewards is None  # another reward is computed: none of these is needed
    reward = build_reward_function("file:column=tone")
    assert isinstance(reward, FromFile) and reward.column == "tone"
    with pytest.raises(DataError, match="Expected a reward column 'tune'.*accuracy_reward, tone"):
        read(path, reward="tune")


def test_answers_without_a_reward_are_left_out_and_counted(tmp_path):
    rows = [
        {"prompt": "a", "completions": ["b", "c", "d", ""], "rewards": [1, None, float("nan"), 0]},
        {"prompt": "e", "completions": ["b", "c"], "rewards": [None, None]},
        {"prompt": "f", "completions": ["b", "c"], "rewards": [None, 2]},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    found = read_recorded(path, gpt2_tokenizer(), needs_rewards=True)
    (kept,) = found.rollouts
    assert kept.completions == ("b", "") and kept.rewards.tolist() == [1.0, 0.0]
    told = " ".join(found.notes)
    assert "5 answers have no reward" in told and "for 1 prompts" in told and "(rows 1)" in told
    assert "no spread (rows 2)" in told
    with pytest.raises(DataError, match="No prompt of .* has two answers"):
        read_recorded(write(tmp_path / "b.jsonl", rows[1:]), gpt2_tokenizer(), needs_rewards=True)


def test_columns_are_never_ignored(tmp_path):
    rows = [{"question": "a", "answer": text, "mark": k} for k, text in enumerate(("b", "c"))]
    path = write(tmp_path / "a.jsonl", rows)
    names = {"prompt": "question", "completion": "answer", "reward": "mark"}
    (found,) = read_recorded(path, gpt2_tokenizer(), columns=names).rollouts
    assert found.completions == ("b", "c") and found.rewards.tolist() == [0.0, 1.0]
    with pytest.raises(DataError, match="can't name 'chosen' of a rollouts file"):
        read_recorded(path, gpt2_tokenizer(), columns={"chosen": "answer"})
    with pytest.raises(DataError, match="Expected a column 'quest'"):
        read_recorded(path, gpt2_tokenizer(), columns={"prompt": "quest"})


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "completions": ["b"], "rewards": ["high"]}, "Row 0 .*should be numbers"),
        ({"prompt": "a", "completions": ["b"], "rewards": [float("inf")]}, "Row 0 .*infinite"),
        ({"prompt": "a", "completion": said("b"), "reward": 1}, "Row 0 .*its prompt is a text"),
        ({"prompt": "[{'role': 'user'}]", "completion": "b", "reward": 1}, "written as text.*json.loads"),
        ({"prompt": "a", "completion": "b\ud83d", "reward": 1}, "Row 0 .*half of a character"),
        ({"prompt": None, "completion": "b", "reward": 1}, "Row 0 .*'prompt' should be"),
    ],
)
def test_rows_that_cannot_be_are_refused_by_number(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_recorded(write(tmp_path / "a.jsonl", [row]), gpt2_tokenizer(), needs_rewards=True)


def test_the_shared_records():
    """A real trainer's columns, and rewards with None, as they came in."""
    folder = SHARED / "cases"
    if not folder.is_dir():
        pytest.skip("the cases (../shared/cases) aren't beside the project")
    path = next(folder.glob("61-*/completions_00020.jsonl"))
    with pytest.raises(DataError, match="accuracy_reward, format_reward"):
        read(str(path), needs_rewards=True)
    found = read(str(path), needs_rewards=True, reward="accuracy_reward")
    assert len(found.rollouts) == 3 and "10 (12 rows), 20 (12 rows)" in found.notes[0]
    with_none = read(str(next(folder.glob("62-*/rollouts.jsonl"))), needs_rewards=True)
    assert len(with_none.rollouts) == 3 and all(np.isfinite(r.rewards).all() for r in with_none.rollouts)


# --- other tools' files -------------------------------------------------------------------------------------


def dump(step: int, *scores: float) -> list[dict[str, Any]]:
    """A step of verl's: two prompts, their answers one after the other."""
    return [
        {
            "input": f"user\n{asked}",
            "output": f"{word} {step}",
            "gts": "4",
            "score": score,
            "step": step,
            "acc": 1.0,
        }
        for asked in ("what is the sum?", "is it there?")
        for word, score in zip(("four", "the mat", "cats"), scores, strict=True)
    ]


def test_a_folder_of_verls_dumps(tmp_path):
    """Files are ordered by number, names are known, a step can be chosen, and rewards are followed over the steps."""
    for step, scores in ((2, (0, 0, 0)), (10, (1, 0, 1)), (9, (0, 0, 1))):
        write(tmp_path / f"{step}.jsonl", dump(step, *scores))
    found = read(str(tmp_path), needs_rewards=True)
    assert [r.completions for r in found.rollouts] == [("four 10", "the mat 10", "cats 10")] * 2
    assert [r.rewards.tolist() for r in found.rollouts] == [[1, 0, 1]] * 2
    told = " ".join(found.notes)
    assert (
        "prompt is the column 'input', completion is the column 'output', reward is the column 'score'"
        in told
    )
    assert "without special tokens" in told and "step 10 are scored" in told
    assert found.history["step"].tolist() == [2, 9, 10] and found.history["tied"].tolist() == [1, 0, 0]
    assert found.history["reward_mean"].tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert found.history["reward_std"].tolist() == pytest.approx([0, 3**-0.5, 3**-0.5])
    assert found.history["seen_before"].tolist() == [0, 1, 1]
    other = read(str(tmp_path), needs_rewards=True, step=2)
    assert other.rollouts[0].completions[0] == "four 2"
    with pytest.raises(DataError, match="no step 3; its steps are 2, 9, 10"):
        read(str(tmp_path), step=3)
    with pytest.raises(DataError, match="doesn't hold several steps"):
        read(str(tmp_path / "2.jsonl"), step=3)


def test_lines_with_input_output_and_reward(tmp_path):
    """OpenRLHF's; a prompt's answers in one list go by these names too."""
    rows = [{"input": "a", "output": text, "reward": k} for k, text in enumerate(("b", "c"))]
    (found,) = read(write(tmp_path / "a.jsonl", rows), needs_rewards=True).rollouts
    assert found.completions == ("b", "c") and found.rewards.tolist() == [0.0, 1.0]
    rows = [{"query": "a", "responses": ["b", "c"], "scores": [0.5, None]}]
    recorded = read(write(tmp_path / "b.jsonl", rows))
    assert recorded.rollouts[0].completions == ("b", "c") and recorded.rollouts[0].rewards[0] == 0.5


def test_names_of_ours_come_first(tmp_path):
    """Where our column is there, one by another tool's name is a column of the prompt like any other."""
    rows = [
        {"prompt": "a", "completion": text, "reward": k, "output": "x", "score": 9}
        for k, text in enumerate("bc")
    ]
    recorded = read(write(tmp_path / "a.jsonl", rows), needs_rewards=True)
    assert recorded.rollouts[0].rewards.tolist() == [0.0, 1.0] and recorded.notes == ()
    assert recorded.rollouts[0].prompt.columns == {"output": "x", "score": 9}
    assert recorded.history.empty

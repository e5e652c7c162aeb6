"""Every format that people have: read as the same pairs that TRL's columns give, or refused with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset

from entangle.data import FORMATS, DataError, load_pairs, read_pairs
from tests.conftest import SHARED

ASKED = [{"role": "user", "content": "what is the sum?"}]
SYSTEM = {"role": "system", "content": "the cat"}


def said(text: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


GOOD, BAD = said("four"), said("five")
TRL = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
WITH_SYSTEM = TRL | {"prompt": [SYSTEM, *ASKED]}


def turn(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "axolotl": ("axolotl", {"messages": ASKED, "chosen": GOOD[0], "rejected": BAD[0]}, TRL),
    "axolotl, answers in lists": ("axolotl", {"messages": ASKED, "chosen": GOOD, "rejected": BAD}, TRL),
    "axolotl, the history as prompt": (
        "axolotl",
        {"prompt": ASKED, "chosen": GOOD[0], "rejected": BAD[0]},
        TRL,
    ),
    "axolotl, a text as prompt": (
        "axolotl",
        {"prompt": "what is the sum?", "chosen": GOOD[0], "rejected": BAD[0]},
        TRL,
    ),
    "ms-swift": ("ms_swift", {"messages": [*ASKED, *GOOD], "rejected_response": "five"}, TRL),
    "ms-swift, messages": (
        "ms_swift",
        {"messages": [*ASKED, *GOOD], "rejected_messages": [*ASKED, *BAD]},
        TRL,
    ),
    "openai": (
        "openai",
        {"input": {"messages": ASKED, "tools": []}, "preferred_output": GOOD, "non_preferred_output": BAD},
        TRL,
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [turn("human", "what is the sum?")],
            "chosen": turn("gpt", "four"),
            "rejected": turn("gpt", "five"),
        },
        TRL,
    ),
    "sharegpt with system": (
        "sharegpt",
        {
            "conversations": [turn("human", "what is the sum?")],
            "system": "the cat",
            "chosen": turn("gpt", "four"),
            "rejected": turn("gpt", "five"),
        },
        WITH_SYSTEM,
    ),
    "sharegpt, whole conversations": (
        "sharegpt",
        {
            "chosen": [turn("human", "what is the sum?"), turn("gpt", "four")],
            "rejected": [turn("human", "what is the sum?"), turn("gpt", "five")],
        },
        TRL,
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "what is", "input": "the sum?", "chosen": "four", "rejected": "five"},
        TRL | {"prompt": [{"role": "user", "content": "what is\nthe sum?"}]},
    ),
    "alpaca with system and history": (
        "alpaca",
        {
            "instruction": "what is the sum?",
            "input": "",
            "system": "the cat",
            "history": [["is it?", "no"]],
            "chosen": "four",
            "rejected": "five",
        },
        TRL | {"prompt": [SYSTEM, {"role": "user", "content": "is it?"}, *said("no"), *ASKED]},
    ),
    "helpsteer 3": (
        "helpsteer",
        {"context": ASKED, "response1": "five", "response2": "four", "overall_preference": 2},
        TRL,
    ),
    "helpsteer 2": (
        "helpsteer",
        {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": -1},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ),
    "a text before messages": (
        "text_prompt",
        {"prompt": "what is the sum?", "chosen": GOOD, "rejected": BAD},
        TRL,
    ),
    "ultrafeedback": (
        "trl",
        {
            "prompt": "what is the sum?",
            "chosen": [*ASKED, *GOOD],
            "rejected": [*ASKED, *BAD],
            "score_chosen": 8.0,
            "messages": [*ASKED, *GOOD],
        },
        TRL,
    ),
    "parts that are text": (
        "trl",
        {
            side: [{"role": m[0]["role"], "content": [{"type": "text", "text": m[0]["content"]}]}]
            for side, m in TRL.items()
        },
        TRL,
    ),
    "parts as arrow fills them": (
        "trl",
        {
            side: [
                {"role": m[0]["role"], "content": [{"type": "text", "text": m[0]["content"], "image": None}]}
            ]
            for side, m in TRL.items()
        },
        TRL,
    ),
    "keys that hold none": (
        "trl",
        {side: [m[0] | {"name": None, "tool_calls": None}] for side, m in TRL.items()},
        TRL,
    ),
}


def texts(pair: Any) -> tuple[Any, Any, Any]:
    return pair.prompt, pair.chosen, pair.rejected


@pytest.mark.parametrize("case", CASES)
def test_every_format_is_read_as_trls_columns(case):
    """By itself and by name; the one that was taken is said, unless it is TRL's own."""
    name, row, expected = CASES[case]
    (pair,) = load_pairs([expected])
    for given in ("auto", name):
        found = read_pairs([row], format=given)
        assert found.format == name and texts(found.pairs[0]) == texts(pair)
        assert any(f"is read as {name}" in note for note in found.notes) == (name != "trl")
    assert texts(load_pairs(Dataset.from_list([row]))[0]) == texts(pair)


def test_every_format_has_a_case():
    assert {name for name, _, _ in CASES.values()} | {"kto", "ranked"} == set(FORMATS)


def test_an_unknown_format_is_answered_with_the_known_ones():
    with pytest.raises(DataError, match="Unknown format 'axolotle'. Known: auto, alpaca, axolotl"):
        read_pairs([TRL], format="axolotle")


def test_columns_are_renamed_before_a_format_is_looked_for():
    row = {"history": ASKED, "better": GOOD[0], "rejected": BAD[0]}
    found = read_pairs([row], columns={"messages": "history", "chosen": "better"})
    assert found.format == "axolotl" and texts(found.pairs[0]) == (ASKED, GOOD, BAD)
    plain = {"instruction": "p", "input": "q", "chosen": "a", "rejected": "b"}
    assert texts(load_pairs([plain], columns={"prompt": "instruction"})[0]) == (
        "p",
        "a",
        "b",
    )  # what is named is taken


UNPAIRED = [
    {"prompt": "p", "completion": "a", "label": True},
    {"prompt": "p", "completion": "b", "label": False},
    {"prompt": "q", "completion": "c", "label": True},
    {"prompt": "p", "completion": "d", "label": False},
    {"prompt": "p", "completion": "e", "label": True},
    {"prompt": "q", "completion": "f", "label": True},
]


def test_unpaired_rows_are_paired_by_prompt_when_asked():
    """The k-th liked with the k-th disliked; what has no partner is left out; row numbers are the liked one's."""
    with pytest.raises(DataError, match="unpaired data.*same prompt: --format kto"):
        load_pairs(UNPAIRED)
    found = read_pairs(UNPAIRED, format="kto")
    assert [(p.index, *texts(p)) for p in found.pairs] == [(0, "p", "a", "b"), (4, "p", "e", "d")]
    assert "6 rows make 2 pairs." in found.notes
    with pytest.raises(DataError, match="make none"):
        read_pairs(UNPAIRED[2:3], format="kto")
    with pytest.raises(DataError, match="Row 0: 'label' should be true or false; got 'maybe'"):
        read_pairs([UNPAIRED[0] | {"label": "maybe"}], format="kto")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "responses": ["b", "a", "c"], "scores": [1, 5, 0]},
        {
            "instruction": "p",
            "completions": [{"response": t, "overall_score": s} for t, s in (("a", 9), ("c", 2))],
        },
    ],
)
def test_ranked_answers_are_best_against_worst_when_asked(row):
    with pytest.raises(DataError, match="lists of answers.*--format ranked"):
        load_pairs([row])
    assert texts(read_pairs([row], format="ranked").pairs[0]) == ("p", "a", "c")


@pytest.mark.parametrize(
    "row, message",
    {
        "prompt in messages": (
            {"prompt": ASKED, "chosen": "I think a", "rejected": "I think b"},
            "Wrap every answer",
        ),
        "history in messages": (
            {"messages": ASKED, "chosen": "So a", "rejected": "So b"},
            "Wrap every.*prompt=messages",
        ),
        "json in texts": (
            {
                "chosen": json.dumps({"messages": [*ASKED, *GOOD]}),
                "rejected": json.dumps({"messages": [*ASKED, *BAD]}),
            },
            r"written as text \(JSON\).*json.loads",
        ),
        "python in texts": (
            {"chosen": str([*ASKED, *GOOD]), "rejected": str([*ASKED, *BAD])},
            "written as text",
        ),
        "older alpaca": ({"instruction": "p", "input": "", "output": ["a", "b"]}, r"jq .*\.output\[0\]"),
        "a prompt left out": (
            {"question": "is it?", "chosen": "It is a", "rejected": "It is b"},
            "--columns prompt=question",
        ),
        "fine-tuning": ({"prompt": "p", "completion": "a"}, "no rejected one"),
        "messages alone": ({"messages": [*ASKED, *GOOD]}, "no rejected one"),
        "tokens": ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "tokenised already"),
        "a verdict": (
            {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1},
            "a verdict",
        ),
        "images": ({"images": ["a.png"], "prompt": "p", "chosen": "a", "rejected": "b"}, "Row 0 .*images"),
        "another prompt": (
            {"prompt": "where?", "chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]},
            "Row 0 .*'where\\?' isn't in",
        ),
        "a tie": (
            {"context": ASKED, "response1": "a", "response2": "b", "overall_preference": 0},
            "Row 0 .*is a tie",
        ),
        "no assistant at the end": (
            {"messages": ASKED, "rejected_response": "b"},
            "Row 0 .*ends with the assistant",
        ),
        "an unknown speaker": (
            {"conversations": [turn("bard", "x")], "chosen": turn("gpt", "a"), "rejected": turn("gpt", "b")},
            "Row 0 .*'bard'",
        ),
        "half an emoji": (
            {"prompt": "p", "chosen": "a\ud83d", "rejected": "b"},
            "Row 0 .*half of a character.*place 1",
        ),
        "tools as names": (
            {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "tools": ["get_time"]},
            "each an object",
        ),
    }.values(),
)
def test_what_cannot_be_read_is_refused_with_the_way_out(row, message):
    with pytest.raises(DataError, match=message):
        load_pairs([row])


def test_a_prompt_is_never_made_up_for_a_row_that_lacks_it():
    """Others have one, so the common beginning of its answers isn't taken for it."""
    rows = [TRL, {"chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]}]
    with pytest.raises(DataError, match="Row 1 .*'prompt' should be"):
        load_pairs(rows)
    assert [pair.index for pair in load_pairs(rows, skip_invalid=True)] == [0]
    with pytest.raises(DataError, match="Row 0 .*'prompt' is empty"):
        load_pairs([{"prompt": "", "chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD]}])


def test_a_mixed_data_set_is_refused_by_its_row():
    with pytest.raises(DataError, match="Row 1 .*Wrap every answer as one assistant message"):
        load_pairs([TRL, {"prompt": ASKED, "chosen": "a", "rejected": "b"}])


def test_text_that_cannot_be_encoded_is_a_rows_error_and_escaped_elsewhere():
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "kind": "x\ud83d"},
        {"prompt": "\udc00", "chosen": "a", "rejected": "b"},
    ]
    (pair,) = load_pairs(rows, skip_invalid=True)
    assert pair.extra == {"kind": r"x\ud83d"}


# --- files --------------------------------------------------------------------------------------------------


def test_answers_in_a_table_are_what_stands_there(tmp_path):
    """Under other names too: numbers keep their zeros, NA isn't missing, True isn't a truth value."""
    path = tmp_path / "t.csv"
    path.write_text("asked,good,bad,rank\nseven,007,7.0,1\nhalf,0.50,1e3,2\nthere?,NA,True,3\n")
    pairs = load_pairs(path, columns={"prompt": "asked", "chosen": "good", "rejected": "bad"})
    assert [texts(p) for p in pairs] == [
        ("seven", "007", "7.0"),
        ("half", "0.50", "1e3"),
        ("there?", "NA", "True"),
    ]
    assert [p.extra for p in pairs] == [{"rank": 1}, {"rank": 2}, {"rank": 3}]


@pytest.mark.parametrize(
    "encoding, separator, message",
    [
        ("cp1252", ";", "WINDOWS-1252.*semicolons"),
        ("utf-8", ";", "semicolons.*sep=';'"),
        ("utf-16", ",", "UTF-16"),
        ("utf-8", "\t", "tabs"),
    ],
)
def test_tables_of_other_programs_are_named(encoding, separator, message, tmp_path):
    lines = ["prompt,chosen,rejected", "wo,d\u00e9j\u00e0,nie"]
    (tmp_path / "t.csv").write_bytes("\n".join(lines).replace(",", separator).encode(encoding))
    with pytest.raises(DataError, match=message):
        load_pairs(tmp_path / "t.csv")


def test_arrow_files_and_folders_of_them(tmp_path):
    """As the cache of `datasets` keeps them, without a state.json."""
    Dataset.from_list([TRL]).save_to_disk(tmp_path / "saved")
    file = next((tmp_path / "saved").glob("*.arrow"))
    (tmp_path / "bare").mkdir()
    bare = tmp_path / "bare" / "data-train.arrow"
    bare.write_bytes(file.read_bytes())
    for source in (bare, tmp_path / "bare"):
        assert texts(load_pairs(source)[0]) == texts(load_pairs([TRL])[0])


@pytest.mark.parametrize(
    "content, message",
    [
        ({"data": [TRL]}, "'data' is the list of rows.*jq"),
        ({"prompt": {"0": "p"}, "chosen": {"0": "a"}, "rejected": {"0": "b"}}, "one object of columns"),
        ({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}, "one object of columns"),
    ],
)
def test_a_json_file_that_holds_the_whole_table(content, message, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(DataError, match=message):
        load_pairs(tmp_path / "a.json")


def test_one_row_over_several_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(TRL, indent=1))
    assert texts(load_pairs(tmp_path / "a.json")[0]) == texts(load_pairs([TRL])[0])


def test_parquet_fills_keys_with_none_and_they_are_not_there(tmp_path):
    rows = [TRL, TRL | {"chosen": [GOOD[0] | {"name": "x"}]}]
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    assert [p.chosen for p in load_pairs(tmp_path / "a.parquet")] == [p.chosen for p in load_pairs(rows)]


# --- the cases beside the project ---------------------------------------------------------------------------

SHARED_CASES = [
    ("20-*/begin_alike.jsonl", {}, "Wrap every answer"),
    ("20-*/begin_differently.jsonl", {}, "Wrap every answer"),
    (
        "20-*/context_column.jsonl",
        {"prompt": "context", "chosen": "response1", "rejected": "response2"},
        "Wrap every",
    ),
    ("21-*/axolotl.jsonl", {}, "axolotl"),
    ("21-*/ms_swift.jsonl", {}, "ms_swift"),
    ("21-*/openai_dpo.jsonl", {}, "openai"),
    ("21-*/prompt_text_answers_lists.jsonl", {}, "text_prompt"),
    ("21-*/json_in_strings.jsonl", {}, "written as text"),
    ("22-*/sharegpt.json", {}, "sharegpt"),
    ("22-*/alpaca.json", {}, "alpaca"),
    ("22-*/alpaca_old.json", {"prompt": "instruction"}, "jq"),
    ("26-*/answer_is_a_call.jsonl", {}, "trl"),
    ("27-*/pairs.jsonl", {}, "trl"),
    ("27-*/with_image.jsonl", {}, "images"),
    ("28-*/windows.csv", {}, "semicolons"),
    ("31-*/kto.jsonl", {}, "--format kto"),
    ("31-*/ranked_list.jsonl", {}, "--format ranked"),
    ("32-*/ultrafeedback_like.jsonl", {}, "trl"),
]


@pytest.mark.parametrize("pattern, columns, expected", SHARED_CASES)
def test_the_shared_cases(pattern: str, columns: dict[str, str], expected: str):
    """Read by the named format with six prompts that are the questions, or refused in these words."""
    found = next((SHARED / "cases").glob(pattern), None)
    if found is None:
        pytest.skip("the cases (../shared/cases) aren't beside the project")
    path: Path = found
    if expected not in FORMATS:
        with pytest.raises(DataError, match=expected):
            load_pairs(path, columns=columns)
        return
    data = read_pairs(path, columns=columns)
    assert data.format == expected
    assert len({pair.prompt_hash for pair in data.pairs}) == len(data.pairs) in (4, 6)

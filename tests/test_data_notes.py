"""What is said of pairs: counts and row numbers of what a reader of the numbers should know, and silence otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from entangle.data import DataError, PreferencePair, load_pairs, read_pairs, tokenize_pair, tokenize_pairs
from tests import tiny
from tests.conftest import SHARED

ASKED = [{"role": "user", "content": "what is the sum?"}]
PLAIN = [dict(row) for row in tiny.ROWS]


def turns(*words: str, roles: tuple[str, str] = ("user", "assistant")) -> list[dict[str, str]]:
    """Turns that alternate."""
    return [{"role": roles[k % 2], "content": word} for k, word in enumerate(words)]


def said(rows: list[dict[str, Any]]) -> str:
    """All notes on rows, as one text."""
    return " ".join(read_pairs(rows).notes)


def rendered(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, max_length: int | None = None
) -> str:
    """All notes on rows as a tokenizer reads them."""
    return " ".join(tokenize_pairs(tokenizer, load_pairs(rows), max_length).notes)


def chat(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny.gpt2_tokenizer(chat=True)
    tokenizer.chat_template = template
    return tokenizer


def test_good_pairs_are_passed_in_silence():
    conversations = [{"prompt": ASKED, "chosen": turns("x", "four")[1:], "rejected": turns("x", "five")[1:]}]
    assert said(PLAIN) == said(conversations) == ""
    assert (
        rendered(PLAIN, tiny.gpt2_tokenizer())
        == rendered(conversations, tiny.gpt2_tokenizer(chat=True))
        == ""
    )


# --- before the tokenizer -----------------------------------------------------------------------------------


def test_a_prompt_that_was_split_off_is_shown():
    rows = [
        {"chosen": "what is it? four", "rejected": "what is it? five"},
        {"chosen": "I a", "rejected": "I b"},
    ]
    assert "no column 'prompt'" in said(rows) and "The shortest is 'I' (row 1)" in said(rows)


def test_strange_roles_are_counted():
    rows = [
        {side: turns("a", f"b{side}", roles=("Human", "Bot")) for side in ("chosen", "rejected")}
        for _ in range(3)
    ]
    assert "'Human' (3 pairs)" in said(rows) and "'Bot' (3 pairs)" in said(rows)


def test_turns_of_the_user_in_the_scored_part_are_counted():
    early = {"chosen": turns("q", "a", "why?", "so"), "rejected": turns("q", "b", "why?", "no")}
    late = {"chosen": turns("q", "a", "why?", "so"), "rejected": turns("q", "a", "why?", "no")}
    assert "In 1 of 2 pairs (row 0) the scored part holds turns of the user" in said([early, late])
    assert "turns of the user" not in said([late])


def test_answers_of_others_and_ends_of_others_are_counted():
    other = {"prompt": ASKED, "chosen": turns("x", "a")[1:], "rejected": turns("b")}
    ends = {"prompt": ASKED, "chosen": turns("x", "a", "ok")[1:], "rejected": turns("x", "b", "ok")[1:]}
    notes = said([other, ends])
    assert "1 of 2 pairs (row 0) an answer doesn't begin with the assistant" in notes
    assert "1 of 2 pairs (row 1) a conversation doesn't end with the assistant" in notes


def test_prompts_that_the_answers_repeat_are_counted():
    rows = [{"prompt": "is it?", "chosen": "is it? yes", "rejected": "is it? no"}, PLAIN[0]]
    assert "1 of 2 pairs (row 0) both answers begin with the whole prompt" in said(rows)
    again = [
        {
            "prompt": ASKED,
            "chosen": [*ASKED, *turns("x", "a")[1:]],
            "rejected": [*ASKED, *turns("x", "b")[1:]],
        }
    ]
    assert "begin with the whole prompt" in said(again)


def test_equal_prompts_and_texts_that_are_not_used_are_said():
    rows = [PLAIN[0] | {"input": "is it there?"}, PLAIN[0] | {"input": "where is it?", "chosen": "x"}]
    notes = said(rows)
    assert "All 2 prompts are equal" in notes and "'input' isn't used, in 2 of 2 pairs" in notes
    inside = [row | {"question": row["prompt"], "input": ""} for row in PLAIN]
    assert said(inside) == ""


@pytest.mark.parametrize(
    "names",
    [
        ("score_chosen", "score_rejected"),
        ("chosen-rating", "rejected-rating"),
        ("chosen_reward", "rejected_reward"),
    ],
)
def test_scores_against_labels_and_ties_are_counted(names):
    values = [(3, 1), (1, 3), (2, 2), (4.5, 0)]
    rows = [PLAIN[0] | dict(zip(names, pair, strict=True)) for pair in values]
    notes = said(rows)
    assert "higher score in 1 of 4 pairs (row 1)" in notes and "the same in 1 of 4 pairs (row 2)" in notes
    assert "score" not in said([PLAIN[0] | dict(zip(names, (3, 1), strict=True))]).replace("scored", "")


# --- after it -----------------------------------------------------------------------------------------------

THINKS = tiny.CHAT_TEMPLATE.replace("<assistant>{% endif %}", "<assistant>think {% endif %}")
COUNTS = "{{ messages|length }} turns " + tiny.CHAT_TEMPLATE
DROPS = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}so {% endif %}{% endfor %}"
ANSWERED = [{"prompt": ASKED, "chosen": turns("x", "four")[1:], "rejected": turns("x", "five")[1:]}] * 2


def test_the_end_of_a_prompt_that_is_rendered_otherwise_is_counted():
    tokenizer = chat(THINKS)
    (pair, _) = tokenize_pairs(tokenizer, load_pairs(ANSWERED)).tokens
    alone = tokenizer.apply_chat_template(ASKED, tokenize=True, return_dict=True, add_generation_prompt=True)[
        "input_ids"
    ]
    assert pair.prompt_scored == len(alone) - len(pair.prompt_ids) > 0
    notes = rendered(ANSWERED, tokenizer)
    assert "In 2 of 2 pairs" in notes and f"its last {pair.prompt_scored} tokens" in notes
    assert "WHOLE PROMPT" not in notes


def test_a_whole_prompt_that_is_scored_is_said_loudly():
    assert "THE WHOLE PROMPT IS SCORED as part of both answers in 2 of 2 pairs" in rendered(
        ANSWERED, chat(COUNTS)
    )


def test_a_token_that_merges_over_the_boundary_is_no_other_rendering():
    pair = PreferencePair(0, "she said th", "e cat", "at they")
    tokenizer = tiny.gpt2_tokenizer()
    done = tokenize_pair(tokenizer, pair, None)
    assert len(done.prompt_ids) < len(tokenizer(text=pair.prompt)["input_ids"]) and done.prompt_scored == 0


def test_answers_that_the_template_leaves_out_are_counted():
    assert "answers differ but their tokens don't" in rendered(ANSWERED, chat(DROPS))


def test_special_tokens_in_the_text_are_said():
    rows = [
        row | {"prompt": f"{tiny.START}{row['prompt']}", "chosen": f"{row['chosen']}{tiny.END}"}
        for row in PLAIN
    ]
    notes = rendered(rows, tiny.llama_tokenizer())
    assert "3 of 3 pairs (rows 0, 1, 2) begin with two beginning-of-sequence tokens" in notes
    assert tiny.START in notes and "plain letters" not in notes
    foreign = rendered([PLAIN[0] | {"prompt": "<|im_start|>user hello"}], tiny.gpt2_tokenizer())
    assert "this tokenizer reads <|im_start|> as plain letters" in foreign
    assert "two end-of-sequence tokens" in rendered(PLAIN, tiny.gpt2_tokenizer(adds_end=True))


# --- rows that a tokenizer refuses --------------------------------------------------------------------------


def test_rows_that_a_template_refuses_are_listed_and_can_be_skipped(caplog):
    picky = (
        "{% for m in messages %}{% if m['content'] == 'no' %}{{ raise_exception('not that') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    pairs = load_pairs([ANSWERED[0], *[ANSWERED[0] | {"prompt": turns("no")}] * 2, ANSWERED[1]])
    with pytest.raises(DataError, match="Row 1: .*not that.*1 more row: 2.*skip_invalid"):
        tokenize_pairs(chat(picky), pairs)
    kept = tokenize_pairs(chat(picky), pairs, skip_invalid=True)
    assert [p.index for p in kept.pairs] == [t.index for t in kept.tokens] == [
        0,
        3,
    ] and "Left out 2" in caplog.text


def test_a_tool_call_with_arguments_as_text_is_explained():
    items = (
        "{% for m in messages %}{% for c in m['tool_calls'] or [] %}"
        "{% for k, v in c['function']['arguments'].items() %}{{ k }}{% endfor %}{% endfor %}"
        "{{ m['content'] }}{% endfor %}"
    )

    def row(arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "sum", "arguments": arguments}}
        asked = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
        return ANSWERED[0] | {"prompt": asked}

    with pytest.raises(DataError, match=r"Row 0: .*as an object: json.loads"):
        tokenize_pairs(chat(items), load_pairs([row('{"a": 1}')]))
    assert tokenize_pairs(chat(items), load_pairs([row({"a": 1, "b": None})])).tokens  # None isn't there


def test_tokens_beyond_the_embeddings_are_a_rows_error():
    """The tokenizer may have more tokens, as long as no row uses one."""
    tokenizer = tiny.gpt2_tokenizer()
    known = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|late|>"]})
    pairs = load_pairs([PLAIN[0], PLAIN[1] | {"chosen": "<|late|>"}])
    with pytest.raises(
        DataError, match=rf"Row 1: its token {known} .*has {known + 1} tokens, .*for {known}\. Resize"
    ):
        tokenize_pairs(tokenizer, pairs, vocabulary=known)
    kept = tokenize_pairs(tokenizer, pairs, vocabulary=known, skip_invalid=True)
    assert [pair.index for pair in kept.pairs] == [0]
    assert len(tokenize_pairs(tokenizer, pairs).pairs) == 2


# --- the cases beside the project ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("22-*/alpaca.json", ""),
        ("24-*/capital_roles.jsonl", "Roles other than"),
        ("24-*/split_at_second_turn.jsonl", "turns of the user"),
        ("24-*/rejected_has_user_role.jsonl", "doesn't begin with the assistant"),
        ("24-*/ends_with_user.jsonl", "doesn't end with the assistant"),
        ("30-*/prompt_repeated_in_answers.jsonl", "begin with the whole prompt"),
        (
            "32-*/ultrafeedback_like.jsonl",
            "higher score in 1 of 6 pairs (row 2), and both have the same in 3 of 6",
        ),
    ],
)
def test_the_shared_cases(pattern, expected):
    path = next((SHARED / "cases").glob(pattern), None)
    if path is None:
        pytest.skip("the cases (../shared/cases) aren't beside the project")
    assert expected in " ".join(read_pairs(path).notes)

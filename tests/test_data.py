"""Reading preference pairs, and tokenising them exactly as TRL's DPOTrainer does."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from entangle.data import (
    DataError,
    PreferencePair,
    TokenizedPair,
    collate,
    hash_pairs,
    load_pairs,
    split_prompt,
    tokenize_pair,
)
from tests import tiny

PLAIN = [dict(row) for row in tiny.ROWS]
TALK = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "what is the sum?"}]


def said(text: str) -> list[dict[str, str]]:
    """An assistant's turn."""
    return [{"role": "assistant", "content": text}]


CHAT = [
    {"prompt": TALK, "chosen": said("the sum is four"), "rejected": said("they said five, then the other")},
    {"prompt": TALK[1:], "chosen": said("four"), "rejected": said("four")},
]
IMPLICIT = [
    {"chosen": "the cat sat on the mat", "rejected": "the cat sat there, she said"},
    {"chosen": "they think the", "rejected": "they think the other thing"},
    {"chosen": "the same", "rejected": "the same"},
]
IMPLICIT_CHAT = [
    {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CHAT
]
MERGED = [{"prompt": "she said th", "chosen": "e cat", "rejected": "at they", "kind": "merge"}]
ENDED = [{"prompt": "the", "chosen": f" cat{tiny.END}", "rejected": " mat"}]
IDENTICAL = [{"prompt": "the", "chosen": " cat", "rejected": " cat"}]

CASES: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], list[dict[str, Any]]]] = {
    "plain": (tiny.gpt2_tokenizer, PLAIN),
    "begins_with_bos": (tiny.llama_tokenizer, PLAIN),
    "double_eos": (lambda: tiny.gpt2_tokenizer(adds_end=True), PLAIN),
    "eos_in_the_text": (tiny.gpt2_tokenizer, ENDED),
    "merged_boundary": (tiny.gpt2_tokenizer, MERGED),
    "chat": (lambda: tiny.gpt2_tokenizer(chat=True), CHAT),
    "implicit": (tiny.gpt2_tokenizer, IMPLICIT),
    "implicit_chat": (lambda: tiny.gpt2_tokenizer(chat=True), IMPLICIT_CHAT),
    "identical": (tiny.gpt2_tokenizer, IDENTICAL),
    "padded": (lambda: tiny.gpt2_tokenizer(pad=True), PLAIN),
}


def trl_trainer(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], max_length: int, path: Path
):
    """A real trainer over these rows; nothing is trained."""
    trl = pytest.importorskip("trl", reason="parity is with TRL, which isn't installed")
    arguments = trl.DPOConfig(
        output_dir=str(path),
        bf16=False,
        use_cpu=True,
        report_to="none",
        max_length=max_length,
        disable_tqdm=True,
    )
    return trl.DPOTrainer(
        model=tiny.llama(vocabulary=len(tokenizer)),
        ref_model=tiny.llama(vocabulary=len(tokenizer)),
        args=arguments,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
    )


def tokenized(tokenizer: PreTrainedTokenizerBase, rows: Any, max_length: int | None) -> list[TokenizedPair]:
    """The rows, read and tokenised by us."""
    return [tokenize_pair(tokenizer, pair, max_length) for pair in load_pairs(rows)]


def assert_equals_trl(tokenizer: PreTrainedTokenizerBase, rows: Any, max_length: int, path: Path) -> None:
    """Token ids before truncation, and the batch after it, equal TRL's exactly."""
    trainer = trl_trainer(tokenizer, rows, max_length, path)
    kept = [pair for pair in tokenized(tokenizer, rows, max_length) if not pair.dropped]
    whole = {pair.index: pair for pair in tokenized(tokenizer, rows, None)}
    theirs = list(trainer.train_dataset)
    assert len(theirs) == len(kept) > 0
    for ours, row in zip(kept, theirs, strict=True):
        full = whole[ours.index]
        assert (full.prompt_ids, full.chosen_ids, full.rejected_ids) == (
            row["prompt_ids"],
            row["chosen_ids"],
            row["rejected_ids"],
        )
    expected = trainer.data_collator(theirs)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = collate(kept, pad_id)
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(getattr(batch, name), expected[name]), name


# --- parity with TRL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_batch_equal_trl(case, tmp_path):
    """Every way in which text becomes tokens, each with the tokenizer that makes it hard."""
    make, rows = CASES[case]
    assert_equals_trl(make(), rows, 1024, tmp_path)


@pytest.mark.parametrize("max_length", [7, 9, 12])
def test_truncation_and_drops_equal_trl(max_length, tmp_path):
    """Rows are cut independently; a prompt that fills `max_length` is gone in TRL, marked in ours."""
    tokenizer = tiny.gpt2_tokenizer()
    assert_equals_trl(tokenizer, PLAIN, max_length, tmp_path)
    lengths = [len(pair.prompt_ids) for pair in tokenized(tokenizer, PLAIN, None)]
    assert [pair.dropped for pair in tokenized(tokenizer, PLAIN, max_length)] == [
        n >= max_length for n in lengths
    ]


def test_the_cases_are_what_they_say():
    """Each parity case has the difficulty that it is named after, so none passes for nothing."""
    pair = tokenized(tiny.gpt2_tokenizer(), MERGED, None)[0]
    assert len(pair.prompt_ids) < len(tiny.gpt2_tokenizer()(text="she said th")["input_ids"])
    assert tokenized(tiny.gpt2_tokenizer(adds_end=True), PLAIN, None)[0].chosen_ids[-2:] == [2, 2]
    assert tokenized(tiny.gpt2_tokenizer(), ENDED, None)[0].chosen_ids.count(2) == 1
    assert tokenized(tiny.llama_tokenizer(), PLAIN, None)[0].prompt_ids[0] == 1
    assert tokenized(tiny.gpt2_tokenizer(chat=True), CHAT, None)[0].chosen_ids.count(2) == 1


def test_real_data_equal_trl(tldr, small_llama, tmp_path):
    """TL;DR pairs with a real SentencePiece-style tokenizer that begins with BOS."""
    rows = [json.loads(line) for line in (tldr / "tldr_pairs.jsonl").read_text().splitlines()[:20]]
    assert_equals_trl(AutoTokenizer.from_pretrained(small_llama), rows, 512, tmp_path)


def test_split_prompt_equals_trl():
    """Random strings over a small alphabet, where prefixes, spaces and identical texts are common."""
    extract = pytest.importorskip("trl").extract_prompt
    draw = random.Random(0)
    for _ in range(500):
        first, second = ("".join(draw.choices("ab ", k=draw.randint(1, 6))) for _ in range(2))
        if first[0] != second[0]:
            continue  # nothing in common: TRL wraps around to the last character; ours has an empty prompt
        expected = extract({"chosen": first, "rejected": second})
        assert split_prompt(first, second) == (expected["prompt"], expected["chosen"], expected["rejected"])


# --- flags and batches --------------------------------------------------------------------------------------


def test_flags():
    """Nine tokens of prompt: cut at 9 nothing is left, at 10 one token, equal in both rows."""
    tokenizer = tiny.gpt2_tokenizer()
    pair = PreferencePair(0, "what is the sum?", " the sum is four", " the sum is five")
    prompt = len(tokenizer(text=pair.prompt)["input_ids"])
    flags = {
        cut: (p.truncated, p.identical, p.empty, p.dropped)
        for cut in (prompt, prompt + 1, 1024)
        for p in [tokenize_pair(tokenizer, pair, cut)]
    }
    assert flags == {
        prompt: (True, False, True, True),
        prompt + 1: (True, True, False, False),
        1024: (False,) * 4,
    }


def test_a_row_of_one_token_without_a_prompt_is_empty():
    """Nothing predicts the first token: with the shared prefix gone, one token is no scored token."""
    pair = tokenize_pair(tiny.gpt2_tokenizer(), PreferencePair(0, "t", "he", "hat"), 1)
    assert pair.prompt_ids == [] and len(pair.chosen_ids) == 1 and pair.empty


def test_padding_side_moves_tokens_only():
    """Left and right padding hold the same tokens, the same scored ones, in the same order."""
    pairs = tokenized(tiny.gpt2_tokenizer(), PLAIN, 1024)
    left, right = collate(pairs, 0, "left"), collate(pairs, 0)
    assert torch.equal(left.lengths, right.lengths) and left.attention_mask[:, -1].all()
    for row in range(len(left.input_ids)):
        for mask in ("attention_mask", "completion_mask"):
            chosen = [b.input_ids[row][getattr(b, mask)[row].bool()] for b in (left, right)]
            assert torch.equal(*chosen)


def test_batch_layout():
    """Chosen rows, then rejected rows; both of a pair begin with `prompt_length` equal, unscored tokens."""
    pairs = tokenized(tiny.gpt2_tokenizer(), PLAIN, 1024)
    batch = collate(pairs, 0)
    assert batch.lengths.tolist() == [len(p.chosen_ids) for p in pairs] + [len(p.rejected_ids) for p in pairs]
    for i, length in enumerate(batch.prompt_length.tolist()):
        assert torch.equal(batch.input_ids[i, :length], batch.input_ids[i + len(pairs), :length])
        assert not batch.completion_mask[[i, i + len(pairs)], :length].any()


@pytest.mark.parametrize("pairs, side", [([], "right"), ("dropped", "right"), ("good", "middle")])
def test_collate_refuses(pairs, side):
    """Nothing to score, or an unknown side."""
    tokenizer = tiny.gpt2_tokenizer()
    given = {"dropped": tokenized(tokenizer, PLAIN, 1), "good": tokenized(tokenizer, PLAIN, 99)}
    with pytest.raises(DataError):
        collate(given.get(pairs, []) if isinstance(pairs, str) else pairs, 0, side)


def test_a_tokenizer_without_an_end_token():
    """No end of sequence is invented; the rest is tokenised as ever."""
    tokenizer = tiny.gpt2_tokenizer()
    with_end = tokenized(tokenizer, PLAIN, None)[0].chosen_ids
    tokenizer.eos_token = None
    assert tokenized(tokenizer, PLAIN, None)[0].chosen_ids == with_end[:-1]


def test_chat_needs_a_template_that_takes_the_messages():
    """No template, or one that raises: the row and the roles are named."""
    pair = load_pairs(CHAT)[0]
    with pytest.raises(DataError, match="Row 0 .* no chat template"):
        tokenize_pair(tiny.gpt2_tokenizer(), pair)
    tokenizer = tiny.gpt2_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"Row 0: .*system, user.*no system role"):
        tokenize_pair(tokenizer, pair)


# --- sources ------------------------------------------------------------------------------------------------


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Rows as a file of the format that its suffix names."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows), indent=1))
    else:
        frame = pd.DataFrame(list(rows))
        frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_file_format_gives_the_same_pairs(suffix, tmp_path):
    """A text that looks like a missing value stays a text; a line separator in it doesn't cut it."""
    rows = [*PLAIN, {"prompt": "is it there?", "chosen": "NA", "rejected": "None\u2028null"}]
    pairs = load_pairs(write(rows, tmp_path / f"pairs{suffix}"))
    assert pairs == load_pairs(rows) and pairs[-1].chosen == "NA"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_conversations_in_files(suffix, tmp_path):
    """Messages come back as lists of dicts, whatever a format makes of nested values."""
    pairs = load_pairs(write(CHAT, tmp_path / f"chat{suffix}"))
    assert pairs == load_pairs(CHAT) and pairs[0].is_conversational


def test_json_lines_under_the_name_json(tmp_path):
    """`datasets` accepts that too."""
    path = tmp_path / "pairs.json"
    write(PLAIN, tmp_path / "pairs.jsonl").rename(path)
    assert load_pairs(path) == load_pairs(PLAIN)


def test_folders_and_their_splits(tmp_path):
    """A split is a word of the file's name; without any such word, everything is the training split."""
    write(PLAIN[:1], tmp_path / "train-00000-of-00002.jsonl")
    write(PLAIN[1:2], tmp_path / "train-00001-of-00002.jsonl")
    write(PLAIN[2:], tmp_path / "test.parquet")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert load_pairs(tmp_path) == load_pairs(PLAIN[:2])
    assert load_pairs(str(tmp_path), split="test")[0].prompt == PLAIN[2]["prompt"]
    with pytest.raises(DataError, match="split 'validation'.*test.parquet"):
        load_pairs(tmp_path, split="validation")


def test_datasets_and_saved_datasets(tmp_path):
    """In memory or on disk, alone or as a dict of splits."""
    data = Dataset.from_list(PLAIN)
    both = DatasetDict({"train": data, "test": data.select([2])})
    data.save_to_disk(tmp_path / "one")
    both.save_to_disk(tmp_path / "two")
    expected = load_pairs(PLAIN)
    for source in (data, both, tmp_path / "one", tmp_path / "two"):
        assert load_pairs(source) == expected
    assert load_pairs(tmp_path / "two", split="test")[0].prompt == PLAIN[2]["prompt"]
    for source in (both, tmp_path / "two"):
        with pytest.raises(DataError, match="its splits are: train, test"):
            load_pairs(source, split="dev")


def test_subsets_keep_order_and_row_numbers():
    """First rows without a seed; with one, a random subset that is the same every time."""
    rows = [{"prompt": "p", "chosen": f"a{i}", "rejected": "b"} for i in range(50)]
    assert [pair.index for pair in load_pairs(rows, limit=3)] == [0, 1, 2]
    pairs = load_pairs(rows, limit=10, seed=7)
    indices = [pair.index for pair in pairs]
    assert indices == sorted(set(indices)) and len(indices) == 10 and indices != list(range(10))
    assert all(pair.chosen == f"a{pair.index}" for pair in pairs)
    assert pairs == load_pairs(rows, limit=10, seed=7) != load_pairs(rows, limit=10, seed=8)
    assert len(load_pairs(rows, limit=99, seed=7)) == 50


def test_columns_extras_and_reference(tmp_path):
    """Renamed columns, further scalars and reference log-probs survive to the tokenised pair."""
    row = {
        "question": "p",
        "better": "a",
        "rejected": "b",
        "ref_chosen_logps": -1.5,
        "ref_rejected_logps": -2,
        "kind": "sum",
        "score": 3,
        "tags": ["x"],
    }
    pair = load_pairs([row], columns={"prompt": "question", "chosen": "better"})[0]
    assert (pair.prompt, pair.chosen, pair.ref_chosen_logps, pair.ref_rejected_logps) == (
        "p",
        "a",
        -1.5,
        -2.0,
    )
    assert pair.extra == {"kind": "sum", "score": 3}
    ours = tokenize_pair(tiny.gpt2_tokenizer(), pair)
    assert (ours.ref_chosen_logps, ours.ref_rejected_logps, ours.extra) == (-1.5, -2.0, pair.extra)
    assert ours.prompt_hash == pair.prompt_hash == "148de9c5a7a44d19"  # sha256("p")


def test_a_plain_prompt_beside_conversations_is_split_off_them():
    """As in TRL's maybe_extract_prompt: the prompt column is a copy of what the conversations begin with."""
    rows = [{"prompt": "what is the sum?", **row} for row in IMPLICIT_CHAT]
    assert [(p.prompt, p.chosen) for p in load_pairs(rows)] == [
        (p.prompt, p.chosen) for p in load_pairs(CHAT)
    ]


def test_tools_reach_the_template():
    """Given as JSON, as TRL takes them too."""
    tokenizer = tiny.gpt2_tokenizer(chat=True)
    tokenizer.chat_template = "{% for t in tools %}{{ t['name'] }}{% endfor %}" + tiny.CHAT_TEMPLATE
    row = CHAT[0] | {"tools": json.dumps([{"name": "the cat"}])}
    ids = tokenize_pair(tokenizer, load_pairs([row])[0]).prompt_ids
    assert tokenizer.decode(ids).startswith("the cat")


def test_hash_tells_data_apart():
    """Equal data, equal hash; fewer, other or reordered rows, another one."""
    pairs = load_pairs(PLAIN)
    assert hash_pairs(pairs) == hash_pairs(load_pairs(PLAIN))
    assert len({hash_pairs(p) for p in (pairs, pairs[:2], load_pairs(PLAIN[::-1]), load_pairs(CHAT))}) == 4


# --- errors -------------------------------------------------------------------------------------------------

GOOD = PLAIN[0]


@pytest.mark.parametrize(
    "rows, message",
    {
        "no rows": ([], "no rows"),
        "missing column": ([{"prompt": "p", "chosen": "a"}], "'rejected'.*its columns are: prompt, chosen"),
        "number": ([GOOD, GOOD | {"chosen": 3}], "Row 1 .*'chosen' should be a string.*int .3."),
        "nothing": ([GOOD, {"prompt": "p", "chosen": "a"}], "Row 1 .*'rejected'.*NoneType"),
        "empty response": ([GOOD, GOOD | {"rejected": ""}], "Row 1 .*'rejected' is empty"),
        "empty prompt": ([GOOD | {"prompt": ""}], "Row 0 .*'prompt' is empty"),
        "no common beginning": ([{"chosen": "a", "rejected": "b "}], "Row 0 .*no prompt.*begin differently"),
        "empty conversation": ([GOOD | {"chosen": []}], "'chosen'.*an empty list"),
        "two kinds": ([CHAT[0] | {"chosen": "a"}], "Row 0 .*both be"),
        "no role": ([CHAT[0] | {"chosen": [{"text": "a"}]}], "'chosen'.*'role' and 'content'"),
        "image": ([CHAT[0] | {"chosen": [{"role": "user", "content": [{"type": "image"}]}]}], "images"),
        "half a reference": ([GOOD | {"ref_chosen_logps": -1.0}], "Row 0 .*only one of the reference"),
        "word": ([GOOD | {"ref_chosen_logps": "low", "ref_rejected_logps": -1}], "number; got 'low'"),
        "tools": ([GOOD | {"tools": "{"}], "'tools' should be a list or its JSON"),
        "program": ([CHAT[0] | {"chat_template_kwargs": {"chat_template": "x"}}], "is a program"),
    }.values(),
)
def test_bad_rows_are_refused_by_number(rows, message):
    """Expected, came, and where: for each way in which a row can be unusable."""
    with pytest.raises(DataError, match=message):
        load_pairs(rows)


def test_all_bad_rows_are_listed_and_can_be_skipped(caplog):
    """One message names them all; skipping logs them and keeps the others' row numbers."""
    rows = [GOOD, GOOD | {"chosen": ""}, GOOD, GOOD | {"chosen": None}, GOOD | {"chosen": 1}]
    with pytest.raises(DataError, match="Row 1 .*2 more rows: 3, 4.*skip_invalid"):
        load_pairs(rows)
    assert [pair.index for pair in load_pairs(rows, skip_invalid=True)] == [0, 2]
    assert "Left out 3" in caplog.text
    with pytest.raises(DataError):
        load_pairs(rows[1:2], skip_invalid=True)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"prompt": "p"}\n\n{"prompt": \n', r"a\.jsonl, line 3, column 12: not valid JSON"),
        ("a.jsonl", '{"prompt": "p"}\n[1]\n', r"line 2: expected a JSON object; got \[1\]"),
        ("a.json", '[{"prompt": "p"},\n {"prompt": }]', "line 2, column 13: not valid JSON"),
        ("a.json", '[{"prompt": "p"}, 3]', "entry 1 is 3"),
        ("a.jsonl", "[" * 100_000, "line 1: .*(nested too deep|not valid JSON)"),
        ("a.jsonl", b'{"prompt": "\xff"}', "readable .jsonl"),
        ("a.csv", "", "readable .csv"),
        ("a.csv", "prompt,chosen,rejected\na,b,c\na,b,c,d\n", "readable .csv.*line 3"),
        ("a.parquet", "no parquet", "readable .parquet"),
        ("a.jsonl", "\n", "no rows"),
        ("a.txt", "x", "Expected a .json"),
    ],
)
def test_broken_files_are_named(name, content, message, tmp_path):
    """The file, and the line where there is one."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        load_pairs(path)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing", "/missing", "a/b/c", "missing.json.gz", "~/missing-"]
)
def test_a_path_that_is_not_there_never_goes_to_the_hub(name, monkeypatch):
    """A typo in a path must not become a download."""
    monkeypatch.setattr("entangle.data.sources.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="there is none"):
        load_pairs(name)


def test_the_hub_out_of_reach_is_said_clearly():
    """Offline, the message says so and what else the name was tried as."""
    with pytest.raises(DataError, match="'nobody/nothing'.*from the hub.*no local file"):
        load_pairs("nobody/nothing")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"limit": 0}, "limit of at least 1 pair; got 0"),
        ({"columns": {"chosn": "chosen"}}, "unknown name 'chosn'; it can map: prompt, chosen"),
        ({"columns": {"prompt": "question"}}, "Expected a column 'question'"),
    ],
)
def test_bad_options(options, message):
    """Options that make no sense name what would."""
    with pytest.raises(DataError, match=message):
        load_pairs(PLAIN, **options)


def test_a_stream_or_anything_else_is_refused():
    """A stream has no length and no row numbers."""
    with pytest.raises(DataError, match="got generator"):
        load_pairs(row for row in PLAIN)  # pyright: ignore[reportArgumentType]

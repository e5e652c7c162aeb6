"""The embedded pair set keeps what its format and each of its kinds promise.

Every check is a function of one row (or of all rows) that asserts. The second half of the file breaks a
good row in one place at a time and asserts that the check notices.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from importlib.resources import files

import pytest

Row = dict[str, str]
SIDES = ("chosen", "rejected")

ROWS: list[Row] = [
    json.loads(line)
    for line in (files("entangle.embedded") / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
]

PROMPT = re.compile(
    r"SUBREDDIT: r/\w+\n\nTITLE: (?P<title>[^\n]+)\n\nPOST: (?P<post>.+)\n\nTL;DR:", re.DOTALL
)
FORBIDDEN = re.compile(r"https?:|www\.|@|(?<!\w)/?u/|[\u2018-\u201f\ufffd]")


def title_and_post(row: Row) -> tuple[str, str]:
    """The title and the post that stand in the row's prompt."""
    match = PROMPT.fullmatch(row["prompt"])
    assert match, "the prompt isn't SUBREDDIT, TITLE, POST, TL;DR:"
    return match["title"], match["post"]


def common_prefix(first: list[str], second: list[str]) -> int:
    """How many leading words the two lists share."""
    same = [a == b for a, b in zip(first, second, strict=False)]
    return same.index(False) if False in same else len(same)


def contrast(row: Row) -> tuple[int, int, int, int]:
    """(shared leading words, chosen middle, rejected middle, shared trailing words), all in words."""
    chosen, rejected = row["chosen"].split(), row["rejected"].split()
    prefix = common_prefix(chosen, rejected)
    suffix = common_prefix(chosen[prefix:][::-1], rejected[prefix:][::-1])
    return prefix, len(chosen) - prefix - suffix, len(rejected) - prefix - suffix, suffix


def bag(text: str, shortest: int = 1) -> Counter[str]:
    """The words of `text`, lower case and without punctuation, that have at least `shortest` letters."""
    return Counter(word for word in re.findall(r"[a-z0-9']+", text.lower()) if len(word) >= shortest)


def overlap(first: str, second: str) -> float:
    """Dice overlap of two bags of words: 1 iff they hold the same words, 0 iff they share none."""
    a, b = bag(first), bag(second)
    return 2 * (a & b).total() / (a.total() + b.total())


def coverage(response: str, prompt: str) -> float:
    """The share of the response's words of five letters or more that occur in the prompt."""
    words, known = bag(response, shortest=5), bag(prompt)
    return sum(count for word, count in words.items() if word in known) / max(words.total(), 1)


def lengths(row: Row) -> tuple[int, int]:
    """Words in the shorter and in the longer response."""
    shorter, longer = sorted((len(row["chosen"].split()), len(row["rejected"].split())))
    return shorter, longer


def is_chosen_longer(row: Row) -> bool:
    """True where the chosen response has more words."""
    return len(row["chosen"].split()) > len(row["rejected"].split())


def check_format(row: Row) -> None:
    """Fields, prompt, leading spaces, post length and clean text."""
    assert set(row) == {"prompt", "chosen", "rejected", "kind"}
    _, post = title_and_post(row)
    assert 60 <= len(post.split()) <= 150, "a post has 60 to 150 words"
    for response in (row[side] for side in SIDES):
        assert re.fullmatch(r" \S+( \S+)*", response), "a response is one space, then words one space apart"
    assert row["chosen"] != row["rejected"]
    for text in row.values():
        assert not FORBIDDEN.search(text), "no link, no user name, no curly quote"


def check_one_fact_changed(row: Row) -> None:
    """At most three words differ, at one place with text before and after it."""
    prefix, chosen, rejected, suffix = contrast(row)
    assert prefix >= 1 and suffix >= 1
    assert 1 <= chosen <= 3 and 1 <= rejected <= 3


def check_opening(row: Row, shortest: int, longest: int) -> None:
    """One or two opening words differ; the rest is identical and has `shortest` to `longest` words."""
    prefix, chosen, rejected, suffix = contrast(row)
    assert prefix == 0
    assert 1 <= chosen <= 2 and 1 <= rejected <= 2
    assert shortest <= suffix <= longest


def check_opening_word(row: Row) -> None:
    """A different opening, then 8 to 14 identical words."""
    check_opening(row, shortest=8, longest=14)


def check_long_shared_suffix(row: Row) -> None:
    """A different opening, then 30 to 44 identical words."""
    check_opening(row, shortest=30, longest=44)


def check_last_word(row: Row) -> None:
    """Only the last word differs, no full stop follows it, and at least eight words come before it."""
    prefix, chosen, rejected, suffix = contrast(row)
    assert prefix >= 8
    assert (chosen, rejected, suffix) == (1, 1, 0)
    assert row["chosen"][-1].isalpha() and row["rejected"][-1].isalpha()


def check_single_word(row: Row) -> None:
    """Each response is one plain short word and nothing else."""
    for response in (row[side] for side in SIDES):
        assert re.fullmatch(r" [a-z]{2,6}", response)


def check_verbose_vs_terse(row: Row) -> None:
    """One response has at least twice the words of the other."""
    shorter, longer = lengths(row)
    assert shorter >= 8
    assert longer >= 2 * shorter


def check_off_topic(row: Row) -> None:
    """The chosen response speaks the post's words, the rejected hardly any of them."""
    assert coverage(row["chosen"], row["prompt"]) >= 0.5
    assert coverage(row["rejected"], row["prompt"]) <= 0.2


def check_near_duplicate(row: Row) -> None:
    """The responses share most of their words and their length."""
    shorter, longer = lengths(row)
    assert overlap(row["chosen"], row["rejected"]) >= 0.75
    assert longer - shorter <= 2


def check_length_gap(row: Row) -> None:
    """Four to eight words against forty or more, so a ratio of at least five."""
    shorter, longer = lengths(row)
    assert 4 <= shorter <= 8
    assert longer >= 40


CHECKS: dict[str, Callable[[Row], None]] = {
    "one_fact_changed": check_one_fact_changed,
    "opening_word": check_opening_word,
    "long_shared_suffix": check_long_shared_suffix,
    "last_word": check_last_word,
    "single_word": check_single_word,
    "verbose_vs_terse": check_verbose_vs_terse,
    "off_topic": check_off_topic,
    "near_duplicate": check_near_duplicate,
    "length_gap": check_length_gap,
}


def check_kinds(rows: list[Row]) -> None:
    """At least 8 rows of each of the nine kinds, so at least 72, and none of an unknown kind."""
    counts = Counter(row["kind"] for row in rows)
    assert set(counts) == set(CHECKS)
    assert min(counts.values()) >= 8


def check_unique(rows: list[Row]) -> None:
    """No two rows share a title, a post, or a pair of responses."""
    titles, posts = zip(*(title_and_post(row) for row in rows), strict=True)
    responses = [(row["chosen"], row["rejected"]) for row in rows]
    for values in (titles, posts, responses):
        assert max(Counter(values).values()) == 1


def check_balance(rows: list[Row]) -> None:
    """In the two kinds about length the chosen response is the longer one in exactly half of the rows."""
    for kind in ("verbose_vs_terse", "length_gap"):
        longer = [is_chosen_longer(row) for row in rows if row["kind"] == kind]
        assert 2 * sum(longer) == len(longer), kind


def first(kind: str) -> Row:
    """A copy of the first row of a kind."""
    return dict(next(row for row in ROWS if row["kind"] == kind))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['kind']}-{ROWS.index(row)}")
def test_row_keeps_its_promises(row: Row) -> None:
    """Format, and what the row's kind says."""
    check_format(row)
    CHECKS[row["kind"]](row)


@pytest.mark.parametrize("check", [check_kinds, check_unique, check_balance])
def test_set_keeps_its_promises(check: Callable[[list[Row]], None]) -> None:
    """Counts, uniqueness and the balance of lengths."""
    check(ROWS)


TINY_PROMPT = "SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: too short\n\nTL;DR:"


def responses(chosen: str, rejected: str) -> Row:
    """The two response fields of a row, with their leading spaces."""
    return {"chosen": " " + chosen, "rejected": " " + rejected}


def renamed(row: Row, field: str) -> Row:
    """The row with one more word after `field` in its prompt."""
    return row | {"prompt": row["prompt"].replace(field, field + "And ", 1)}


BROKEN_FORMAT: dict[str, Callable[[Row], Row]] = {
    "extra field": lambda row: row | {"note": "x"},
    "no TL;DR": lambda row: row | {"prompt": row["prompt"].removesuffix("TL;DR:")},
    "space after TL;DR": lambda row: row | {"prompt": row["prompt"] + " "},
    "no title": lambda row: row | {"prompt": row["prompt"].replace("TITLE: ", "")},
    "short post": lambda row: row | {"prompt": TINY_PROMPT},
    "long post": lambda row: row | {"prompt": row["prompt"].replace("POST: ", "POST: " + "and " * 150)},
    "no leading space": lambda row: row | {"chosen": row["chosen"].strip()},
    "two leading spaces": lambda row: row | {"rejected": " " + row["rejected"]},
    "trailing newline": lambda row: row | {"rejected": row["rejected"] + "\n"},
    "empty response": lambda row: row | {"rejected": " "},
    "equal responses": lambda row: row | {"rejected": row["chosen"]},
    "link": lambda row: row | {"chosen": row["chosen"] + " https://example.org"},
    "address": lambda row: row | {"chosen": row["chosen"] + " me@example"},
    "user name": lambda row: row | {"chosen": row["chosen"] + " u/someone"},
    "curly quote": lambda row: row | {"chosen": row["chosen"] + " it\u2019s"},
}

BROKEN_KIND: list[tuple[str, str, Callable[[Row], Row]]] = [
    (
        "one_fact_changed",
        "two places",
        lambda row: row | responses("On a mat here a cat sat", "On a rug here a dog sat"),
    ),
    ("one_fact_changed", "four words", lambda row: row | responses("A cat sat", "A b c d e sat")),
    ("one_fact_changed", "no prefix", lambda row: row | responses("Cat sat here", "Dog sat here")),
    ("one_fact_changed", "no suffix", lambda row: row | responses("Here sat a cat", "Here sat a dog")),
    ("opening_word", "same opening", lambda row: row | {side: " Our" + row[side] for side in SIDES}),
    ("opening_word", "long opening", lambda row: row | {"rejected": " One or two" + row["rejected"]}),
    ("opening_word", "suffix differs", lambda row: row | {"rejected": row["rejected"] + " now"}),
    ("opening_word", "short suffix", lambda row: row | responses("Cat ran off", "Dog ran off")),
    ("opening_word", "long suffix", lambda row: first("long_shared_suffix")),
    ("long_shared_suffix", "short suffix", lambda row: first("opening_word")),
    ("long_shared_suffix", "suffix differs", lambda row: row | {"rejected": row["rejected"] + " now"}),
    ("long_shared_suffix", "same opening", lambda row: row | {side: " Our" + row[side] for side in SIDES}),
    ("last_word", "two words differ", lambda row: row | {"rejected": row["rejected"] + " now"}),
    ("last_word", "opening differs", lambda row: row | {"rejected": " Also" + row["rejected"]}),
    ("last_word", "full stop", lambda row: row | {side: row[side] + "." for side in SIDES}),
    ("last_word", "short prefix", lambda row: row | responses("A cat", "A dog")),
    ("single_word", "two words", lambda row: row | {"rejected": row["rejected"] + " now"}),
    ("single_word", "full stop", lambda row: row | {"chosen": row["chosen"] + "."}),
    ("verbose_vs_terse", "similar lengths", lambda row: row | {"rejected": row["chosen"] + " now"}),
    ("verbose_vs_terse", "too terse", lambda row: row | {"chosen": " A cat sat"}),
    ("off_topic", "on topic", lambda row: row | {"rejected": row["chosen"] + " now"}),
    ("off_topic", "both off topic", lambda row: row | {"chosen": row["rejected"] + " now"}),
    ("near_duplicate", "other words", lambda row: row | {"rejected": " word" * len(row["chosen"].split())}),
    ("near_duplicate", "longer", lambda row: row | {"rejected": row["rejected"] + " as of right now"}),
    ("length_gap", "similar lengths", lambda row: row | {"rejected": row["chosen"]}),
    ("length_gap", "short side too long", lambda row: row | {"rejected": row["rejected"] * 2}),
    ("length_gap", "long side too short", lambda row: row | {"chosen": " " + "word " * 38 + "word"}),
]

BROKEN_SET: list[tuple[Callable[[list[Row]], None], str, Callable[[list[Row]], list[Row]]]] = [
    (check_kinds, "one row missing", lambda rows: rows[:-1]),
    (check_kinds, "unknown kind", lambda rows: rows + [rows[0] | {"kind": "other"}] * 8),
    (check_kinds, "a thin kind", lambda rows: [*rows[1:], rows[-1]]),
    (check_unique, "same row twice", lambda rows: [*rows, rows[0]]),
    (check_unique, "same title", lambda rows: [*rows, renamed(rows[0], "POST: ") | {"chosen": " Other"}]),
    (check_unique, "same post", lambda rows: [*rows, renamed(rows[0], "TITLE: ") | {"chosen": " Other"}]),
    (check_unique, "same responses", lambda rows: [*rows, rows[0] | {"prompt": TINY_PROMPT}]),
    (check_balance, "one row missing", lambda rows: rows[:-1]),
]


@pytest.mark.parametrize("damage", BROKEN_FORMAT)
def test_check_format_notices(damage: str) -> None:
    """Each kind of damage to a good row is refused."""
    row = first("one_fact_changed")
    check_format(row)
    with pytest.raises(AssertionError):
        check_format(BROKEN_FORMAT[damage](row))


@pytest.mark.parametrize(
    ("kind", "break_row"),
    [pytest.param(kind, break_row, id=f"{kind}-{damage}") for kind, damage, break_row in BROKEN_KIND],
)
def test_check_of_kind_notices(kind: str, break_row: Callable[[Row], Row]) -> None:
    """A row that breaks its kind's promise is refused by that kind's check."""
    row = first(kind)
    CHECKS[kind](row)
    with pytest.raises(AssertionError):
        CHECKS[kind](break_row(row))


@pytest.mark.parametrize(
    ("check", "break_rows"),
    [pytest.param(check, break_rows, id=damage) for check, damage, break_rows in BROKEN_SET],
)
def test_check_of_set_notices(
    check: Callable[[list[Row]], None], break_rows: Callable[[list[Row]], list[Row]]
) -> None:
    """A set that lost or repeats rows is refused."""
    with pytest.raises(AssertionError):
        check(break_rows(ROWS))


def test_every_kind_has_a_negative_test() -> None:
    """A new kind can't come without a row that its check refuses."""
    assert {kind for kind, _, _ in BROKEN_KIND} == set(CHECKS)

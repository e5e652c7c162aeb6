"""What a reader chooses on the page: it lives in the address, is taken along as a file or a command, and cards turn."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from entangle.config import build_losses
from entangle.config.filter import parse_rule
from entangle.config.specs import parse_spec
from entangle.report import page as report_page
from entangle.report.command import load_sources
from entangle.report.page import render_page, write_page
from entangle.report.rows import spec_of
from entangle.report.source import Source
from tests.report.browser import browser, complaints, show, until
from tests.report.test_browser import choose, found, rows
from tests.run_folders import synthetic_pairs, synthetic_run

COUNT = 60
FORMULA = '=HYPERLINK("http://x","y")'
CHOSEN, REJECTED = "The cat sat on the mat today.", "The dog sat on a mat today."


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    with browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A run whose pair 3 is a formula, with what an epoch does to each pair under dpo."""
    pairs = synthetic_pairs(COUNT, norm_ratio=0.7).assign(kind=[f"kind{i % 3}" for i in range(COUNT)])
    run = synthetic_run(tmp_path_factory.mktemp("view") / "a run", pairs, losses=("dpo", "simpo"))
    texts = pd.DataFrame(
        {"index": range(COUNT), "prompt": "Why? " * 100, "chosen": CHOSEN, "rejected": REJECTED}
    )
    texts.loc[3, ["chosen", "rejected"]] = FORMULA, "\t-1"
    run.write_table("texts.parquet", texts)
    regimes = ["both_down" if i % 4 else "ideal" for i in range(COUNT)]
    epochs = pd.DataFrame({"index": range(COUNT), "loss": "dpo", "epoch_regime": regimes})
    run.write_table("across.parquet", epochs.assign(epoch_chosen=[float(i - 30) for i in range(COUNT)]))
    return load_sources([run.path])[0]


@pytest.fixture(scope="module")
def page(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page([source], tmp_path_factory.mktemp("pages") / "report.html")


@pytest.fixture
def shown(opened: Any, page: Path) -> Iterator[Any]:
    show(opened, page)
    yield opened
    assert complaints(opened) == []


def address(driver: Any) -> str:
    return driver.execute_script("return location.hash")


def text(driver: Any, selector: str) -> str:
    return driver.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def test_what_is_chosen_lives_in_the_address(shown, opened, page, source):
    choose(shown, "loss", "simpo")
    choose(shown, "regime", "0")
    choose(shown, "least", "0.2")
    shown.execute_script("document.querySelector('[data-column=cosine] button').click()")
    shown.execute_script("document.querySelector('[data-column=cosine] button').click()")
    said, count, first = address(shown), found(shown), rows(shown, 0)[:5]
    assert said == "#?loss=simpo&regime=ideal&least=0.2&sort=-cosine"
    show(opened, page, said)
    assert found(opened) == count and rows(opened, 0)[:5] == first
    assert opened.execute_script("return document.getElementById('loss').value") == "simpo"
    judged = source.judged("simpo").query("regime == 'ideal' and cosine >= 0.2")
    assert count == f"{len(judged)} of {COUNT} pairs"


def test_a_pair_s_address_carries_the_view(shown, opened, page):
    choose(shown, "regime", "2")
    index = rows(shown, 0)[1]
    shown.execute_script("document.querySelectorAll('#body th a')[1].click()")
    until(shown, f"return document.activeElement.id === 'pair-{index}'")
    assert address(shown) == f"#pair-{index}?regime=both_down"
    show(opened, page, f"#pair-{index}?regime=both_down&loss=simpo")
    assert opened.execute_script("return document.activeElement.id") == f"pair-{index}"
    assert opened.execute_script("return document.getElementById('loss').value") == "simpo"


@pytest.mark.parametrize(
    "said", ["#?loss=none&regime=bad&sort=nothing&run=9", "#pair-1?least=x", "#nowhere?"]
)
def test_an_address_that_says_nothing_known_shows_everything(opened, page, said):
    show(opened, page, said)
    assert found(opened) == f"{COUNT} of {COUNT} pairs"
    assert complaints(opened) == []


def test_the_view_is_saved_as_csv_that_no_spreadsheet_runs(shown):
    shown.execute_script("URL.createObjectURL = (blob) => { window.kept = blob; return 'data:,'; };")
    choose(shown, "words", "3")
    shown.execute_script("document.getElementById('csv').click()")
    saved = shown.execute_async_script("window.kept.text().then(arguments[0])")
    table = list(csv.DictReader(io.StringIO(saved)))
    (row,) = [row for row in table if row["index"] == "3"]
    assert row["chosen"] == f"'{FORMULA}" and row["rejected"] == "'\t-1" and row["loss"] == "dpo"
    assert row["epoch"] == "both_down" and float(row["cosine"]) <= 1 and row["kind"] == "kind0"
    assert [each["index"] for each in table] == rows(shown, 0)


def test_the_command_makes_the_view_s_complement(shown, source):
    assert text(shown, "#command").startswith("# choose a regime")
    choose(shown, "regime", "2")
    choose(shown, "least", "0.5")
    choose(shown, "kind", "1")
    words = shlex.split(text(shown, "#command"))
    assert words[:3] == ["entangle", "filter", source.path]
    rule = words[words.index("--drop") + 1]
    assert (
        rule == "regime==both_down and kind==kind1 and cosine>=0.5" and len(parse_rule(rule).conditions) == 3
    )
    choose(shown, "words", "mat")
    assert text(shown, "#command").startswith("# a rule can't say: the text\n")


def test_a_loss_s_label_is_named_as_commands_take_it():
    for spec in ("dpo", {"name": "dpop", "penalty": 5.0, "beta": 0.2}):
        (loss,) = build_losses([spec])
        (again,) = build_losses([parse_spec(spec_of(loss.label))])
        assert again.label == loss.label


def test_pairs_carry_their_epoch_regime(shown):
    heads = shown.execute_script(
        "return [...document.querySelectorAll('#heads th')].map(h => h.dataset.column)"
    )
    assert "epoch" in heads and rows(shown, heads.index("epoch"))[:5] == [
        "ideal",
        *["both down"] * 3,
        "ideal",
    ]
    choose(shown, "epoch", "0")
    assert found(shown) == f"{COUNT // 4} of {COUNT} pairs"
    cards = shown.execute_script("return [...document.querySelectorAll('#cards .card')].map(c => c.id)")
    assert cards == [f"pair-{i}" for i in range(5)]  # by the epoch, not by the pair's own step
    assert "over an epochideal" in text(shown, "#pair-0 .facts") and "an epoch of dpo" in text(
        shown, "#worst .lead"
    )
    choose(shown, "loss", "simpo")  # for which no epoch was measured
    assert found(shown) == f"{COUNT} of {COUNT} pairs" and "one step of simpo" in text(shown, "#worst .lead")
    assert shown.execute_script("return document.getElementById('epoch').closest('label').hidden")


def test_cards_turn_to_the_pair_before_and_after(shown):
    shown.execute_script("location.hash = '#pair-17'")
    until(shown, "return document.activeElement.id === 'pair-17'")
    shown.execute_script("document.querySelector('#pair-17 .after').click()")
    until(shown, "return document.activeElement.id === 'pair-18'")
    shown.execute_script("document.querySelector('#pair-18 .before').click()")
    until(shown, "return document.activeElement.id === 'pair-17'")
    shown.execute_script("location.hash = '#pair-0'")
    until(shown, "return document.activeElement.id === 'pair-0'")
    assert shown.execute_script("return document.querySelector('#pair-0 .before').disabled")


def test_a_long_prompt_is_folded_and_words_of_one_side_are_marked(shown):
    card = "#pair-1"
    assert not shown.execute_script(f"return document.querySelector('{card} .fold').open")
    assert text(shown, f"{card} .fold summary") == "Prompt (500 characters)"
    marked = "return [...document.querySelectorAll(arguments[0] + ' mark.only')].map(m => m.textContent)"
    assert shown.execute_script(marked, f"{card} .text.chosen") == ["cat", "the"]
    assert shown.execute_script(marked, f"{card} .text.rejected") == ["dog", "a"]
    assert text(shown, f"{card} .text.chosen") == CHOSEN and text(shown, f"{card} .text.rejected") == REJECTED


def test_print_defines_only_what_is_used(shown):
    shown.execute_script("dispatchEvent(new Event('beforeprint'))")
    gone = shown.execute_script("return [...document.querySelectorAll('[data-unused]')].map(e => e.id)")
    used = shown.execute_script(
        "return [...document.querySelectorAll('main a.term')].map(a => a.hash.slice(1))"
    )
    assert "def-reward_std" in gone and "def-cosine" not in gone and not set(gone) & set(used)
    shown.execute_script("dispatchEvent(new Event('afterprint'))")
    assert shown.execute_script("return document.querySelectorAll('[data-unused]').length") == 0


def test_the_page_is_titled_by_its_data_and_model(tmp_path):
    run = synthetic_run(
        tmp_path / "r",
        synthetic_pairs(6),
        provenance={"model_name_or_path": "org/m-135M", "model_parameters": 9},
    )
    config = dict(run.config) | {"dataset_name": "/data/tldr.jsonl"}
    run.write_yaml("config.yaml", config)
    page = render_page(load_sources([run.path]))
    assert "<title>Gradient entanglement: tldr.jsonl, m-135M</title>" in page
    assert (
        'dir="auto">tldr.jsonl, m-135M</h2>' in page and "<dt>size</dt>" in page and "<dt>date</dt>" in page
    )
    assert "/data/tldr.jsonl" in page and "9 parameters" in page


def test_a_sample_is_named_wherever_it_is_shown(opened, source, tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "LARGEST", 0)
    show(opened, write_page([source], tmp_path / "page.html"))
    held = opened.execute_script(
        "return JSON.parse(document.getElementById('content').textContent).runs[0].pairs.count"
    )
    assert (
        held < COUNT
        and found(opened) == f"{held} of {held} pairs (a sample of the {COUNT} scored, with the worst)"
    )
    for key in ("plane-0-0", "changes-0-0"):
        assert f"{held} pairs shown (a sample of the {COUNT} scored" in text(opened, f"#tools-{key}")
    assert complaints(opened) == []

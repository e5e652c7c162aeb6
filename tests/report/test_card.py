"""The section for a README: what stands in it, read by a parser of Markdown; text from data stays text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from entangle.cli import main
from entangle.errors import RunError
from entangle.report.card import escape, render_card, write_card
from entangle.report.command import load_sources
from entangle.report.verdict import verdict
from tests.run_folders import synthetic_pairs, synthetic_run

HOSTILE = (
    "</td><script>alert(1)</script>|`x`\n# no *heading* [a](http://b.example) ![c](d) &amp; <!-- $1$ -->"
)

READER = MarkdownIt("commonmark").enable("table")


def tokens(text: str) -> list:
    found = []
    for token in READER.parse(text):
        found += [token, *(token.children or [])]
    return found


def texts(text: str) -> list[str]:
    """Of every inline element the text that a reader sees."""
    return [
        "".join(child.content for child in token.children or [])
        for token in READER.parse(text)
        if token.type == "inline"
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return synthetic_run(tmp_path / "run", synthetic_pairs()).path


def test_the_card_says_what_the_page_says_and_its_figures_are_beside_it(run: Path, tmp_path: Path) -> None:
    (source,) = load_sources([run])
    written = write_card([source], tmp_path / "hub")
    text = (tmp_path / "hub" / "card.md").read_text()
    assert text == render_card([source])
    seen = texts(text)
    for sentence in verdict(source):
        assert sentence in seen
    images = [token.attrs["src"] for token in tokens(text) if token.type == "image"]
    assert images and {tmp_path / "hub" / name for name in images} == set(written[1:])
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written[1:])
    assert f"{len(source.scored):,} scored of {len(source.pairs):,}" in seen
    assert all(loss in seen for loss in source.losses)


def test_text_from_outside_stays_text(run: Path) -> None:
    (source,) = load_sources([run])
    source = replace(
        source, name=HOSTILE, provenance={"model_name_or_path": HOSTILE, "metric": "/home/me/secret/x"}
    )
    text = render_card([source, source])
    kinds = {token.type for token in tokens(text)}
    assert not kinds & {"html_block", "html_inline", "link_open", "code_inline"}
    shown = " ".join(HOSTILE.split())
    assert texts(text).count(shown) == 4 and texts(text).count("x") == 2 and "secret" not in text
    assert sum(token.tag == "h1" for token in READER.parse(text)) == 0
    for line in (
        "# a",
        "- a",
        "+ a",
        "1. a",
        "2) a",
        "= a",
        "~~~ a",
        "> a",
        "a | b",
        "<b>",
        "$x$",
        "@a http://a.b",
    ):
        assert texts(escape(line)) == [line] and READER.parse(escape(line))[0].type == "paragraph_open"


def test_several_runs_are_sections_with_files_of_their_own(run: Path, tmp_path: Path) -> None:
    other = synthetic_run(tmp_path / "other", synthetic_pairs(seed=1)).path
    written = write_card(load_sources([run, other]), tmp_path / "hub")
    assert len(set(written)) == len(written)
    assert [t for t in texts((tmp_path / "hub" / "card.md").read_text()) if t in ("run", "other")] == [
        "run",
        "other",
    ]


def test_the_command_writes_it_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--format", "card"]) == 0
    assert str(run / "card" / "card.md") in capsys.readouterr().out.replace("\n", "")
    (run / "card" / "card.md").unlink()
    (run / "card" / "card.md").mkdir()
    with pytest.raises(RunError, match="Choose another --output"):
        write_card(load_sources([run]), run / "card")

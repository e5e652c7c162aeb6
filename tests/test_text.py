"""Text from outside is shown without steering anything."""

from __future__ import annotations

import pytest

from entangle.tables.text import MOST, visible, visible_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [bold]", "plain [bold]"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("\x07\x00\x7f", "\\x07\\x00\\x7f"),
        ("\x9b2J\x85", "\\x9b2J\\x85"),
        ("a\nb\tc\r", "a\\x0ab\\x09c\\x0d"),
        ("\u202eabc\u2028", "\\u202eabc\\u2028"),
        ("größer 数", "größer 数"),
        (5, "5"),
        ("", ""),
    ],
)
def test_controls_become_visible(text, shown):
    assert visible(text) == shown


def test_length_is_bounded():
    assert visible("x" * 1000) == "x" * MOST + "... (1000 characters)"
    assert visible("x" * 1000, None) == "x" * 1000
    assert len(visible("\x1b" * 10_000)) < 5 * MOST


def test_line_ends_of_a_message_stay():
    assert visible_lines("a\x1bb\nc\rd") == "a\\x1bb\nc\\x0dd"

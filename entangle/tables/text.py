"""Text that comes from outside, made safe to show: nothing in it steers a terminal."""

from __future__ import annotations

import re

MOST = 200
"""Characters that a name or a value is shown with, at most."""

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def visible(text: object, most: int | None = MOST) -> str:
    r"""Text with control characters as visible escapes (`\x1b`), and cut where it is longer than `most` characters.

    Controls are C0, DEL, C1, line separators and what turns the direction of writing. Markup of rich isn't touched:
    show the result in a `rich.text.Text` or with `markup=False`.

    Args:
        text: anything; its `str` is shown.
        most: the longest that is shown whole; None for any length.
    """
    shown = str(text)
    if most is not None and len(shown) > most:
        shown = f"{shown[:most]}... ({len(shown)} characters)"
    return _CONTROLS.sub(_escape, shown)


def visible_lines(text: object, most: int | None = None) -> str:
    """The same for a message of several lines, whose line ends stay."""
    return "\n".join(visible(line, most) for line in str(text).split("\n"))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

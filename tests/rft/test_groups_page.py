"""The page on groups of answers: its example prints what stands there."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "groups.md"


def test_the_example_prints_what_the_page_says(capsys):
    found = re.search(
        r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S
    )
    assert found is not None
    exec(compile(found[1], str(PAGE), "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == found[2]

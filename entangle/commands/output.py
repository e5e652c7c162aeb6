"""What a command shows that isn't the result of a run folder."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import RenderableType


@dataclass(frozen=True)
class Output:
    """What is printed when a command has ended.

    Args:
        content: what rich can render; a text is printed as it is.
        place: a line on where the result is kept.
        status: the exit status.
        wraps: whether lines are broken at the terminal's width.
    """

    content: RenderableType
    place: str = ""
    status: int = 0
    wraps: bool = True

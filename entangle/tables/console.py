"""The console that everything is printed on: text from data, files and folders can't steer the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from entangle.tables.text import visible_lines


class SafeConsole(Console):
    """A console that shows control characters of any text as visible escapes, whatever it stands in.

    What rich itself sends to a terminal (colours, the cursor of a progress bar) isn't text and stays.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of a renderable, their texts made visible."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(visible_lines(segment.text), segment.style)

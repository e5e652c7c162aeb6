"""What a long computation shows and how it stops: a progress bar, and a Ctrl-C that finishes the work at hand."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from entangle.tables.console import SafeConsole


class Interrupted(Exception):
    """The user pressed Ctrl-C; what was finished is in the run folder."""


def notes_console(console: Console | None = None, *, is_shown: bool = True) -> Console:
    """Where a command's notes and progress go: `console`, or standard error (plain text in a notebook, too).

    Args:
        console: the caller's own.
        is_shown: whether this process speaks; of several, one does.
    """
    if not is_shown:
        return SafeConsole(quiet=True)
    return console or SafeConsole(stderr=True, force_jupyter=False)


def say(console: Console, sentence: str) -> None:
    """Print something that the reader of the numbers should know."""
    console.print(f"Note: {sentence}", markup=False)


@contextmanager
def progress_bar(console: Console, unit: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, counted from what this process does itself."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(unit, total=total, completed=done)
        yield lambda count: progress.advance(task, count)


@contextmanager
def deferred_interrupt(waits_for: str = "what is at hand") -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that the loop asks for, and say so; the second one interrupts at once.

    Args:
        waits_for: what is finished first, as the user reads it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = False

    def on_press(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        print(
            f"Stopping once {waits_for} is finished. Ctrl-C again stops at once.", file=sys.stderr, flush=True
        )

    before = signal.signal(signal.SIGINT, on_press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)

"""The life of a run, once for all commands: begin, identity check, resume, Ctrl-C, processes, finish, provenance.

    session = Session.start(config, console)
    ...                                             load what the options name
    if session.begin(identity):                     False: the run is finished already
        session.sum_up("pairs", sizes, add, sums)   shards: shared among processes, resumed, stopped by Ctrl-C
        session.compute("pairs", sizes, rows_of)    the same, each into tables of its own
        session.finish(close)                       the main process writes what closes a run, its summary last

Under `accelerate launch` or `torchrun` every process makes a session, and all must call the same methods in the same
order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from accelerate import PartialState
from rich.console import Console

from entangle.config import RecordedOptions
from entangle.runs.folder import RunFolder
from entangle.runs.progress import Interrupted, deferred_interrupt, notes_console, progress_bar, say

Advance = Callable[[int], None]
"""Told of every pass: how many things it finished."""

ShardTables = Callable[[int, Advance], Mapping[str, pd.DataFrame]]
"""The tables of a shard by folder, from its number."""


class Further(Protocol):
    """Results of shards that lie beside their tables, or are all that there is of them."""

    @property
    def kept(self) -> Set[int]:
        """The shards that it holds."""
        ...

    def keep(self, shard: int, is_last: bool) -> None:
        """Take note of a shard, before its tables are written; at once, if it is the last or a stop was asked for."""
        ...


@dataclass
class Session:
    """One command at work on its run folder.

    Args:
        config: the options.
        run: the run folder.
        console: where progress and notes go; silent in all processes but the main one.
        processes: this process among the others.
    """

    config: RecordedOptions
    run: RunFolder
    console: Console
    processes: PartialState
    _started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(
        cls, config: RecordedOptions, console: Console | None = None, *, on_cpu: bool = False
    ) -> Session:
        """Join the other processes, if there are any, before anything is loaded.

        Args:
            config: the options.
            console: where progress and notes go; standard error by default.
            on_cpu: leave accelerators alone.
        """
        processes = PartialState(cpu=on_cpu or not torch.cuda.is_available())
        shown = notes_console(console, is_shown=processes.is_main_process)
        return cls(config, RunFolder(config.run_path), shown, processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all have found."""
        return self.processes.is_main_process

    @property
    def seconds(self) -> float:
        """Since the run began (or went on)."""
        return time.monotonic() - self._started

    @property
    def resume_command(self) -> str:
        """What to type to resume the run."""
        return self.run.command_from_record(self.config.VERB, self.config.place)

    def note(self, sentence: str) -> None:
        """Say something that the reader of the numbers should know."""
        say(self.console, sentence)

    def begin(self, identity: Mapping[str, Any]) -> bool:
        """Make the run folder, or resume the same run in it.

        Args:
            identity: hashes of what decides the numbers; a resumed run must have the same.

        Returns:
            Whether there is anything to do; False: the folder holds this run, finished.

        Raises:
            RunError: the folder holds another run or foreign files, or can't be written.
        """
        self.claim(identity)
        if self.run.is_complete:
            self.console.print(f"{self.run.path} holds this run already; nothing to compute.", markup=False)
            return False
        self._started = time.monotonic()
        return True

    def holds_all_but(self, options: Sequence[str], identity: Mapping[str, Any]) -> bool:
        """Whether the folder holds this run, finished, but for some of these options; not where it is to be replaced.

        Args:
            options: names of options that need nothing measured.
            identity: as in `begin`.
        """
        found = self.config.replaces != "any" and self.run.differs_only_in(options, self.config, identity)
        self.processes.wait_for_everyone()  # before one of them rewrites the options
        return found

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make the run folder, or check that it is of the same run; also of a finished one that may be extended.

        Args:
            identity: hashes of what decides the numbers.

        Raises:
            RunError: the folder holds another run or foreign files, or can't be written.
        """
        replaces = self.config.replaces if self.is_main else "nothing"
        with self.processes.main_process_first():
            self.run.begin(self.config, identity, replaces=replaces)

    def compute(
        self,
        folder: str,
        sizes: Sequence[int],
        tables_of: ShardTables,
        *,
        unit: str = "",
        further: Further | None = None,
    ) -> None:
        """Write every shard of this process that isn't there yet; return when all processes have theirs.

        What a shard holds must depend on the options and its number alone, so that a resumed run, and one of several
        processes, equals an unbroken one.

        Args:
            folder: where shards are; one counts as finished once its table is there. Other tables are written before.
            sizes: things in each shard (for the progress bar).
            tables_of: the tables of a shard by folder; it advances the bar.
            unit: what the things are called; the folder's name by default.
            further: what else a shard leaves: one that it doesn't hold counts as unfinished.

        Raises:
            Interrupted: Ctrl-C; the shard at hand is finished.
        """

        def finished() -> set[int]:
            there = set(self.run.shards_of(folder))
            return there if further is None else there & further.kept

        def make(number: int, is_last: Callable[[], bool], advance: Advance) -> None:
            tables = dict(tables_of(number, advance))
            last = tables.pop(folder)
            if further is not None:
                further.keep(number, is_last())
            for name, rows in tables.items():
                self.run.write_shard(name, number, rows)
            self.run.write_shard(folder, number, last)

        self._take_turns(sizes, make, finished, unit or folder)

    def sum_up(
        self, unit: str, sizes: Sequence[int], add: Callable[[int, Advance], None], sums: Further
    ) -> None:
        """Add every shard of this process that isn't there yet to `sums`; return when all processes have theirs.

        Args:
            unit: what the things in a shard are called.
            sizes: things in each shard (for the progress bar).
            add: adds a shard, by its number, and advances the bar.
            sums: what it is added to. A shard that it hasn't kept counts as unfinished.

        Raises:
            Interrupted: Ctrl-C; the shard at hand is finished.
        """

        def make(number: int, is_last: Callable[[], bool], advance: Advance) -> None:
            add(number, advance)
            sums.keep(number, is_last())

        self._take_turns(sizes, make, lambda: set(sums.kept), unit)

    def _take_turns(
        self,
        sizes: Sequence[int],
        make: Callable[[int, Callable[[], bool], Advance], None],
        finished: Callable[[], Set[int]],
        unit: str,
    ) -> None:
        """Make the shards of this process one by one; `make` is told whether one may be the last for now."""
        done = finished()
        own = range(self.processes.process_index, len(sizes), self.processes.num_processes)
        left = [number for number in own if number not in done]
        total = sum(sizes[number] for number in own)
        there = total - sum(sizes[number] for number in left)
        if done:
            self.console.print(
                f"Resuming {self.run.path}: {there} of {total} {unit} are there.", markup=False
            )
        with progress_bar(self.console, unit, total, there) as advance, deferred_interrupt() as interrupted:
            for number in left:
                make(number, lambda number=number: number == left[-1] or interrupted(), advance)
                if interrupted():
                    raise Interrupted(
                        f"Stopped; {len(finished())} of {len(sizes)} shards are in {self.run.path}. "
                        f"Resume with: {self.resume_command}"
                    )
        self.processes.wait_for_everyone()

    def finish(self, close: Callable[[], None]) -> Path:
        """Let the main process write what closes a run (its summary last), while the others wait.

        Returns:
            The run folder's path, to load the result from.
        """
        if self.is_main:
            close()
        self.processes.wait_for_everyone()
        return self.run.path

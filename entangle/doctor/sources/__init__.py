"""Where a log is, by what it was left in: one reader per kind of file, the first that takes a file reads it."""

from __future__ import annotations

import csv
import sqlite3
from dataclasses import replace
from pathlib import Path

from entangle.doctor.log import TrainingLog
from entangle.doctor.sources import events, lines, printed, scalars, states, tables, trackio
from entangle.doctor.sources.beside import advice, origin, with_rewards
from entangle.doctor.sources.folder import newest
from entangle.doctor.sources.found import Found, Reader
from entangle.errors import DataError

READERS: tuple[Reader, ...] = (
    events.READER,
    states.READER,
    lines.READER,
    scalars.READER,
    tables.READER,
    trackio.READER,
    printed.READER,
)
"""A reader per kind of file; the first that takes a file reads it."""


def read_log(path: str | Path, trainer: str | None = None) -> TrainingLog:
    """The log of a run.

    Args:
        path: `trainer_state.json`; ms-swift's `logging.jsonl`, OpenRLHF's metrics or any `.jsonl` with a row per step;
            a table (CSV, TSV, .xlsx) of wandb, tensorboard or a spreadsheet; rows that a terminal or a notebook showed;
            event files of tensorboard; a database of trackio; or a folder, of which the newest run's log is taken.
        trainer: what the run was trained with, where its folder doesn't say so.

    Raises:
        DataError: there is no log, it can't be read, or it lacks what is judged.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"Expected a log or a folder with one at {place}; there is none.")
    files, notes = newest(place) if place.is_dir() else ([place], ())
    found = _read(files)
    told = origin(files[0].parent)
    log = TrainingLog.of(
        found.rows,
        path=str(files[0] if len(files) == 1 else files[0].parent),
        kind=found.kind,
        origin=replace(told, trainer=trainer or told.trainer),
        notes=(*notes, *found.notes),
    )
    return _with_what_is_beside(log, files[0])


def _read(files: list[Path]) -> Found:
    try:
        reader = next((reader for reader in READERS if reader.takes(files[0])), printed.READER)
        return reader.read(files)
    except (
        OSError,
        UnicodeError,
        csv.Error,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
        sqlite3.Error,
    ) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{files[0]} isn't a readable {_kind(files[0])}, or was cut off: {error}.") from error


def _kind(file: Path) -> str:
    return {
        ".json": "trainer state",
        ".jsonl": "file of JSON lines",
        ".csv": "CSV",
        ".db": "database of trackio",
    }.get(file.suffix, "log")


def _with_what_is_beside(log: TrainingLog, file: Path) -> TrainingLog:
    """The log, with a note where another file beside it has rewards that this one lacks.

    Raises:
        DataError: it has nothing that is judged; says which file beside it has.
    """
    try:
        family = log.family
    except DataError as error:
        hint = advice(
            file, "Give the trainer_state.json of the run's output_dir, or the whole table of your tracker"
        )
        raise DataError(f"{error} {hint}") from error
    if family == "groups" or {"rewards/chosen", "rewards/rejected"} <= log.metrics:
        return log
    near = with_rewards(file)
    if near is None:
        return log
    return replace(log, notes=(*log.notes, f"{near} beside it has the rewards that this log lacks."))

"""Where a log is: transformers' trainer state, CSV of a tracker, event files, trackio, or a folder of those."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from entangle.doctor.log import TRAINERS, TrainingLog
from entangle.errors import DataError

Row = Mapping[str, Any]

_PATTERNS = (
    ("trainer_state.json", "checkpoint-*/trainer_state.json", "log_history.json"),
    ("events.out.tfevents.*", "runs/*/events.out.tfevents.*"),
    ("*.csv",), ("*.jsonl",), ("*.db",),
)  # fmt: skip
"""Where a run leaves its log, by kind; a kind before another is preferred."""


def read_log(path: str | Path, trainer: str | None = None) -> TrainingLog:
    """The log of a run.

    Args:
        path: `trainer_state.json`; a CSV export of wandb (a table or one chart) or tensorboard (one scalar);
            `.jsonl` with a row per step; an event file of tensorboard; a database of trackio; or a folder, of
            which the newest run's log is taken.
        trainer: what the run was trained with, where its folder doesn't say so.

    Raises:
        DataError: there is no log, or it can't be read.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"Expected a log or a folder with one at {place}; there is none.")
    files = _newest(place) if place.is_dir() else [place]
    rows = [row for file in files for row in _rows(file)]
    shown = str(files[0] if len(files) == 1 else files[0].parent)
    return TrainingLog.of(
        rows, path=shown, kind=_kind(files[0]), trainer=trainer or _trainer(files[0].parent)
    )


def _newest(folder: Path) -> list[Path]:
    """The files of the newest run in a folder: of its checkpoints the last one, of its event files all.

    Raises:
        DataError: there is no log.
    """
    for patterns in _PATTERNS:
        places = [below + pattern for pattern in patterns for below in ("", "*/")]
        found = {file for place in places for file in folder.glob(place) if file.is_file()}
        if not found:
            continue
        newest = max(found, key=lambda file: file.stat().st_mtime)
        mine = sorted(file for file in found if _run_of(file) == _run_of(newest))
        if _kind(newest) == "trainer state":
            return [max(mine, key=lambda file: len(_state(file)))]
        is_in_parts = _kind(newest) in ("tensorboard's event file", "tensorboard's CSV")
        return mine if is_in_parts else [newest]
    raise DataError(
        f"Expected a log in {folder}: trainer_state.json (also in checkpoint-*/), events.out.tfevents.*, .csv, "
        ".jsonl or a trackio .db; found none there or one folder below. `save_strategy: no` keeps no "
        "trainer_state.json: then export the run from your tracker as CSV."
    )


def _run_of(file: Path) -> Path:
    return file.parent.parent if file.parent.name.startswith("checkpoint-") else file.parent


def _kind(file: Path) -> str:
    if file.name.startswith("events.out.tfevents"):
        return "tensorboard's event file"
    if file.suffix == ".csv":
        return "tensorboard's CSV" if _is_scalar(_header(file)) else "CSV"
    return {".json": "trainer state", ".jsonl": "JSON lines", ".db": "trackio's database"}.get(
        file.suffix, ""
    )


def _rows(file: Path) -> list[Row]:
    readers = {
        "trainer state": _state, "JSON lines": _json_lines, "CSV": _table, "tensorboard's CSV": _scalar,
        "tensorboard's event file": _events, "trackio's database": _trackio,
    }  # fmt: skip
    kind = _kind(file)
    if kind not in readers:
        raise DataError(f"Expected a .json, .jsonl, .csv, .db or tensorboard event file; got {file}.")
    try:
        return list(readers[kind](file))
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, sqlite3.Error) as error:
        raise DataError(f"{file} isn't a readable {kind}, or was cut off: {error}.") from error


def _state(file: Path) -> list[Row]:
    content = json.loads(file.read_text(encoding="utf-8"))
    history = content.get("log_history") if isinstance(content, dict) else content
    if not isinstance(history, list):
        raise DataError(f"Expected a list `log_history` in {file}, as transformers' trainer writes it.")
    return [row for row in history if isinstance(row, dict)]


def _json_lines(file: Path) -> Iterator[Row]:
    for line in file.read_text(encoding="utf-8").split("\n"):
        row = json.loads(line) if line.strip() else None
        if isinstance(row, dict):
            yield row


def _header(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return next(csv.reader(lines), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} isn't a readable CSV: {error}.") from error


def _is_scalar(header: list[str]) -> bool:
    return header == ["Wall time", "Step", "Value"]


def _table(file: Path) -> Iterator[Row]:
    """Columns of metrics, or the export of wandb's charts: `<run> - <metric>`, with `__MIN` and `__MAX` beside."""
    names: dict[str, str] = {}
    for column in _header(file):
        if column.endswith(("__MIN", "__MAX")):
            continue
        name = column.rpartition(" - ")[2]
        if name in names:
            raise DataError(
                f"{file} holds {name} of several runs ({names[name]!r}, {column!r}). Export one run at a time."
            )
        names[name] = column
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for row in csv.DictReader(lines):
            yield {name: row[column] for name, column in names.items()}


def _scalar(file: Path) -> Iterator[Row]:
    """One metric, named in the file's name: `run-...-tag-train_rewards_chosen.csv`."""
    tag = file.stem.rpartition("tag-")[2]
    split, _, rest = tag.partition("_")
    split, rest = (split, rest) if split in ("train", "eval") else ("train", tag)
    # tensorboard writes / as _ in the name; the names that matter have at most one
    name = re.sub(r"^(rewards|logps|logits|completions|entangle)_", r"\1/", rest)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for row in csv.DictReader(lines):
            yield {"step": row["Step"], f"{split}/{name}": row["Value"]}


def _events(file: Path) -> Iterator[Row]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise DataError(
            f"Reading {file.name} needs tensorboard (pip install tensorboard); or give the run's "
            "trainer_state.json, or a CSV that tensorboard exported."
        ) from error
    events = EventAccumulator(str(file), size_guidance={"scalars": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            yield {"step": event.step, tag: event.value}


def _trackio(file: Path) -> Iterator[Row]:
    """The run that logged last."""
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
        last = database.execute("SELECT run_name FROM metrics ORDER BY timestamp DESC LIMIT 1").fetchone()
        query = "SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY step"
        for step, metrics in database.execute(query, last or ("",)):
            yield {"step": step, **json.loads(metrics)}


def _trainer(folder: Path) -> str | None:
    """What the model card beside the log names among its tags."""
    for card in (folder / "README.md", folder.parent / "README.md"):
        if not card.is_file():
            continue
        parts = card.read_text(encoding="utf-8", errors="replace").split("---")
        try:
            front = yaml.safe_load(parts[1]) if len(parts) > 2 else None
        except yaml.YAMLError:
            continue
        tags = front.get("tags") if isinstance(front, dict) else None
        named = [tag for tag in tags if tag in TRAINERS] if isinstance(tags, list) else []
        if named:
            return named[0]
    return None

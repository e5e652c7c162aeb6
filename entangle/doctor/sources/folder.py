"""The log of the newest run in a folder."""

from __future__ import annotations

import json
from pathlib import Path

from entangle.doctor.sources import events, scalars, states, tables
from entangle.errors import DataError

_PATTERNS = (
    ("trainer_state.json", "checkpoint-*/trainer_state.json", "log_history.json"),
    ("logging.jsonl",),
    ("events.out.tfevents.*", "runs/*/events.out.tfevents.*"),
    ("*.csv", "*.tsv", "*.xlsx"),
    ("*.jsonl",),
    ("*.db",),
    ("*.log", "nohup.out", "wandb/*/files/output.log", "files/output.log"),
)
"""Where a run leaves its log, by kind; a kind before another is preferred."""

_SUMMARIES = ("completions", "predictions", "generated")


def newest(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The files of the newest run in a folder, and what to say of other runs there.

    Of its checkpoints the last one is taken, of its event files all.

    Raises:
        DataError: there is no log.
    """
    for patterns in _PATTERNS:
        places = [below + pattern for pattern in patterns for below in ("", "*/")]
        found = {file for place in places for file in folder.glob(place) if file.is_file()}
        found = {file for file in found if not file.name.startswith(_SUMMARIES)}
        if found:
            return _of_one_run(found)
    raise DataError(
        f"Expected a log in {folder}: trainer_state.json (also in checkpoint-*/), logging.jsonl, "
        "events.out.tfevents.*, "
        ".csv, .jsonl, a trackio .db or a .log; found none there or one folder below. `save_strategy: no` keeps no "
        "trainer_state.json: then export the run from your tracker as CSV."
    )


def _of_one_run(found: set[Path]) -> tuple[list[Path], tuple[str, ...]]:
    last = max(found, key=lambda file: (file.stat().st_mtime, str(file)))
    mine = sorted(file for file in found if _folder_of(file) == _folder_of(last))
    folders = {_folder_of(file) for file in found}
    notes = (
        (f"{len(folders)} runs are in this folder; the newest, {_folder_of(last).name}, is judged.",)
        if len(folders) > 1
        else ()
    )
    if last.suffix == ".json":
        checkpoint, others = _last_checkpoint(last, mine)
        return [checkpoint], notes + others
    if events.READER.takes(last):
        return mine, notes
    if last.suffix == ".csv":
        files, others = _tables(last, [file for file in mine if file.suffix == ".csv"])
        return files, notes + others
    return [last], notes


def _folder_of(file: Path) -> Path:
    return file.parent.parent if file.parent.name.startswith("checkpoint-") else file.parent


def _last_checkpoint(newest: Path, files: list[Path]) -> tuple[Path, tuple[str, ...]]:
    """Of one run, a checkpoint's history begins with that of each before: the longest that goes on from the newest."""
    histories = {file: [json.dumps(row, sort_keys=True) for row in states.history(file)] for file in files}
    start = histories[newest]
    mine = [file for file in files if histories[file][: len(start)] == start]
    last = max(mine, key=lambda file: len(histories[file]), default=newest)
    whole = histories[last]
    strangers = [file for file in files if histories[file] != whole[: len(histories[file])]]
    if not strangers:
        return last, ()
    return last, (
        f"{len(strangers)} checkpoints of another run are in the same folder ({strangers[0].parent.name}, "
        "...), and left "
        "out: the run that wrote last is judged.",
    )


def _tables(newest: Path, files: list[Path]) -> tuple[list[Path], tuple[str, ...]]:
    """The files that belong with the newest: tensorboard's metrics of one run, wandb's charts of one run."""
    if scalars.READER.takes(newest):
        parts = [file for file in files if scalars.READER.takes(file)]
        runs = {scalars.run_of(file) for file in parts}
        note = f"Metrics of {len(runs)} runs are in this folder; the newest's, {scalars.run_of(newest)}, are judged."
        return [file for file in parts if scalars.run_of(file) == scalars.run_of(newest)], (note,) * (
            len(runs) > 1
        )
    chart = tables.chart_of(newest)
    if chart is None:
        others = [file.name for file in files if file != newest]
        note = f"Other tables are in this folder ({', '.join(others[:3])}); the newest, {newest.name}, is judged."
        return [newest], (note,) * bool(others)
    return [file for file in files if tables.chart_of(file) == chart], ()

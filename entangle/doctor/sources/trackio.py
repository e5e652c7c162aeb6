"""Databases of trackio."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from entangle.doctor.sources.found import Found, Reader


def read(files: Sequence[Path]) -> Found:
    """The run that logged last, in the order in which it logged."""
    query = "SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY timestamp, rowid"
    with sqlite3.connect(f"file:{files[0]}?mode=ro", uri=True) as database:
        runs = database.execute(
            "SELECT run_name FROM metrics GROUP BY run_name ORDER BY MAX(timestamp) DESC"
        ).fetchall()
        last = runs[0] if runs else ("",)
        rows = [{"step": step, **json.loads(metrics)} for step, metrics in database.execute(query, last)]
    notes = (f"{len(runs)} runs are in this database; the one that logged last, {last[0]}, is judged.",)
    return Found(rows, "trackio's database", notes if len(runs) > 1 else ())


READER = Reader(lambda file: file.suffix == ".db", read)

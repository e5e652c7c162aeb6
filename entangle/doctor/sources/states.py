"""JSON files: `trainer_state.json` of transformers' trainer, or its `log_history` alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entangle.doctor.sources import lines
from entangle.doctor.sources.found import Found, Reader, Row, text_of
from entangle.errors import DataError


def read(files: Sequence[Path]) -> Found:
    """The log of one such file.

    Raises:
        DataError: it holds no log.
    """
    file = files[0]
    try:
        content = json.loads(text_of(file))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # an object per line
            return lines.read(files)
        raise
    return Found(_history(content, file), "trainer state")


def history(file: Path) -> list[Row]:
    """The rows that a trainer state holds; none where it can't be read."""
    try:
        return _history(json.loads(text_of(file)), file)
    except (OSError, ValueError, RecursionError):
        return []


def _history(content: Any, file: Path) -> list[Row]:
    found = content.get("log_history") if isinstance(content, dict) else content
    if isinstance(found, list):
        return [row for row in found if isinstance(row, dict)]
    if isinstance(content, dict) and any(isinstance(value, int | float) for value in content.values()):
        raise DataError(
            f"{file} holds one set of numbers, as train_results.json, all_results.json and "
            "wandb-summary.json do; a log "
            "has a row per step: give trainer_state.json (a list `log_history`) of the same run."
        )
    raise DataError(f"Expected a list `log_history` in {file}, as transformers' trainer writes it.")


READER = Reader(lambda file: file.suffix == ".json", read)

"""Event files of tensorboard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entangle.doctor.sources.found import Found, Reader, Row
from entangle.errors import DataError


def read(files: Sequence[Path]) -> Found:
    """The scalars of files in one folder, file by file, each in the order in which they were written.

    Raises:
        DataError: tensorboard isn't installed.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise DataError(
            f"Reading {files[0].name} needs tensorboard (pip install tensorboard); or give the run's "
            "trainer_state.json, or a CSV that tensorboard exported."
        ) from error
    rows: list[Row] = []
    for file in files:
        # nothing is purged: where steps go back, that is seen and said
        events: Any = EventAccumulator(str(file), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        found = [(event, tag) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
        found.sort(key=lambda pair: pair[0].wall_time)
        rows += [{"step": event.step, tag: event.value} for event, tag in found]
    return Found(rows, "tensorboard's event file")


READER = Reader(lambda file: file.name.startswith("events.out.tfevents"), read)

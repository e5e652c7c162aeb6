"""Rows that several runs left in one place: the last run alone is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def last_run(rows: Sequence[tuple[int, Row]]) -> tuple[Sequence[tuple[int, Row]], str]:
    """Rows of the last run, and what to say of the ones before; rows as they are where their steps never go back.

    A metric's steps rise within a run. Where they go back, another run began (or the same was resumed).

    Args:
        rows: step and metrics, in the order of the file.
    """
    if len({step for step, _ in rows}) > 1 and all(
        later <= earlier for (earlier, _), (later, _) in zip(rows, rows[1:], strict=False)
    ):
        rows = rows[::-1]  # newest first
    seen: dict[str, int] = {}
    starts: list[tuple[int, int]] = []
    pairs: set[tuple[str, int]] = set()
    repeated = False
    for place, (step, row) in enumerate(rows):
        back = max((seen[name] for name in row if seen.get(name, step) > step), default=None)
        if back is not None:
            starts.append((place, back))
            seen = {}
        for name in row:
            seen[name] = step
            repeated |= (name, step) in pairs
            pairs.add((name, step))
    if not starts:
        return rows, ""
    if len(starts) > 2 and not repeated:  # one run, shuffled
        return sorted(rows, key=lambda row: row[0]), ""
    place, before = starts[-1]
    last = rows[place:]
    steps = [step for step, _ in last]
    return last, (
        f"The steps go back, from {before} to {steps[0]}: {len(starts) + 1} runs (or parts of one that was "
        "resumed) are "
        f"logged in one place. Only the last is judged, steps {min(steps)} to {max(steps)}. A resumed run is whole in "
        "the trainer_state.json of its last checkpoint."
    )

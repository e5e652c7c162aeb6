"""Files with a JSON object per line: ms-swift's logging.jsonl, OpenRLHF's metrics, and any other with TRL's names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from entangle.doctor.sources.beside import advice
from entangle.doctor.sources.found import Found, Reader, Row, text_of
from entangle.errors import DataError


def read(files: Sequence[Path]) -> Found:
    """The rows of one such file; a last line that was cut off is left out, and said.

    Raises:
        DataError: it is a log of a trainer that keeps its rewards elsewhere.
    """
    file = files[0]
    given = [line for line in text_of(file).splitlines() if line.strip()]
    rows: list[Row] = []
    notes: tuple[str, ...] = ()
    for place, line in enumerate(given):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if place + 1 < len(given) or not rows:
                raise
            notes = ("The last line is cut off, and left out.",)
            break
        if isinstance(row, dict):
            rows.append(row)
    keys = {key for row in rows for key in row}
    refuse_foreign(rows, keys, file)
    return Found(rows, _kind(keys), notes)


def _kind(keys: set[str]) -> str:
    if "global_step/max_steps" in keys:
        return "ms-swift's logging.jsonl"
    plain = {key.removeprefix("train/") for key in keys}
    return "OpenRLHF's metrics" if {"chosen_reward", "reject_reward"} & plain else "JSON lines"


def refuse_foreign(rows: Sequence[Row], keys: set[str], file: Path) -> None:
    """Refuse logs that don't have what is judged, with what to give instead.

    Raises:
        DataError: LLaMA-Factory's short log, verl's, or a file of answers.
    """
    has_rewards = any("rewards/chosen" in key for key in keys)
    if {"current_steps", "total_steps"} <= keys and not has_rewards:
        raise DataError(
            f"{file} is LLaMA-Factory's short log: it has loss and accuracy, but no rewards of chosen and rejected. "
            + advice(
                file, "trainer_state.json in the run's output_dir (and in its checkpoint-* folders) has them"
            )
        )
    below = {name for row in rows[:50] for value in row.values() if isinstance(value, dict) for name in value}
    if any(name.startswith(("actor/", "critic/")) for name in keys | below):
        raise DataError(
            f"{file} is a log of verl: it has the mean reward, but nothing of the spread within groups. "
            + advice(
                file,
                "Give its tensorboard files (trainer.logger=[tensorboard]) for reward, KL, entropy and lengths",
            )
            + " For the groups themselves: trainer.rollout_data_dir writes all answers, and entangle rft reads them."
        )
    if {"prompt", "completion"} <= keys or {"prompt", "chosen"} <= keys:
        raise DataError(
            f"{file} holds texts, not a log. Pairs are read by entangle probe --dataset_name, answers by entangle rft."
        )


READER = Reader(lambda file: file.suffix in (".jsonl", ".ndjson"), read)

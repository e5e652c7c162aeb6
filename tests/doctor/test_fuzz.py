"""Damaged logs: whatever a file holds, it is judged or refused in words, soon, and never with a traceback."""

from __future__ import annotations

import io
import json
import math
import random
import time
from typing import Any

import pytest
from rich.console import Console

from entangle.doctor import examine, read_log
from entangle.errors import UserError
from entangle.tables.doctor import findings_text
from tests.doctor.made import Row, groups, pairs

VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1e308,
    -1e308,
    1e999,
    math.nan,
    "",
    "nan",
    "Infinity",
    "1,5",
    "12%",
    "5/10",
    "x" * 50,
    [],
    {},
    {"a": 1},
    [1, 2],
    10**400,
    "1e5",
    "\x1b[2J",
    2**60,
    "None",
]
NAMES = [
    "step",
    "epoch",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "loss",
    "grad_norm",
    "reward",
    "reward_std",
    "kl",
    "eval_rewards/chosen",
    "eval_x_rewards/rejected",
    "frac_reward_zero_std",
    "logps/chosen",
    "entropy",
    "_step",
    "train/global_step",
    "",
    "eval_",
    "global_step/max_steps",
    "completion_length",
    "nll_loss",
    "learning_rate",
]
EACH = 100
"""Mutated files of each kind."""


def mutated(draw: random.Random) -> list[Row]:
    rows = draw.choice([pairs, groups])(draw.choice([1, 2, 3, 5, 8, 30]))
    for _ in range(draw.choice([0, 1, 2, 5, 20])):
        if not rows:
            break
        place, name, value = draw.randrange(len(rows)), draw.choice(NAMES), draw.choice(VALUES)
        match draw.randrange(7):
            case 0:
                rows[place][name] = value
            case 1:
                rows = [{key: kept for key, kept in row.items() if key != name} for row in rows]
            case 2:
                rows = [row | {name: value} for row in rows]
            case 3:
                rows.insert(place, dict(draw.choice(rows)))
            case 4:
                rows.pop(place)
            case 5:
                draw.shuffle(rows)
            case 6:
                rows[place] = {name: value}
    return rows


def as_table(rows: list[Row], mark: str) -> str:
    names = list(dict.fromkeys(key for row in rows for key in row))
    return "\n".join(
        [mark.join(names), *(mark.join(str(row.get(name, "")) for name in names) for row in rows)]
    )


def damaged(text: str, draw: random.Random) -> str:
    """One time in ten with some characters gone or others in their place."""
    if draw.random() > 0.1:
        return text
    place = draw.randrange(len(text) + 1)
    return (
        text[:place]
        + draw.choice(["", "\0", "{", "}", '"', ";;;", "\n\n", "é"])
        + text[place + draw.randrange(9) :]
    )


FORMS = {
    "trainer_state.json": lambda rows: json.dumps({"log_history": rows}),
    "log.jsonl": lambda rows: "\n".join(map(json.dumps, rows)),
    "log.csv": lambda rows: as_table(rows, ","),
    "log.tsv": lambda rows: as_table(rows, "\t"),
    "log.md": lambda rows: as_table(rows, " | "),
    "train.log": lambda rows: "\n".join(map(str, rows)),
}


@pytest.mark.parametrize("name", FORMS)
def test_damaged_logs_are_judged_or_refused(name, tmp_path):
    draw = random.Random(name)
    judged = 0
    for _ in range(EACH):
        (tmp_path / name).write_text(damaged(FORMS[name](mutated(draw)), draw))
        began = time.monotonic()
        try:
            report = examine(read_log(tmp_path / name))
            Console(file=io.StringIO()).print(findings_text(report.content))
            json.dumps(report.content, allow_nan=False)
            judged += 1
        except UserError as error:
            assert str(error)
        assert time.monotonic() - began < 10
    assert judged > EACH / 10  # damage is worth something only where most of a log is left

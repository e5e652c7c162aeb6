"""Logs made by formula: what a healthy run of each kind writes, to be made ill one quantity at a time."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from entangle.doctor import Finding, Report, TrainingLog, examine

Row = dict[str, Any]
Change = Callable[[Row, int], Row]


def pairs(
    rows: int = 30,
    every: int = 7,
    chosen: float = 0.4,
    rejected: float = -1.1,
    noise: float = 0.02,
    seed: int = 0,
) -> list[Row]:
    """A DPO run whose rewards go from 0 to the given values, as TRL writes it."""
    draw = random.Random(seed)
    made = []
    for place in range(1, rows + 1):
        share = place / rows
        sides = {
            "rewards/chosen": chosen * share + draw.gauss(0, noise),
            "rewards/rejected": rejected * share + draw.gauss(0, noise),
        }
        margin = sides["rewards/chosen"] - sides["rewards/rejected"]
        made.append(
            {
                "loss": math.log1p(math.exp(-margin)),
                "grad_norm": 1.7 + draw.gauss(0, 0.1),
                "learning_rate": 3e-6 * (1 - share),
                **sides,
                "rewards/margins": margin,
                "rewards/accuracies": min(1.0, 0.5 + margin / 3),
                "logps/chosen": -180 + draw.gauss(0, 15) + 10 * sides["rewards/chosen"],
                "logps/rejected": -150 + draw.gauss(0, 15) + 10 * sides["rewards/rejected"],
                "logits/chosen": -1.5,
                "logits/rejected": -1.4,
                "epoch": share,
                "step": place * every,
            }
        )
    return made


def groups(rows: int = 50, seed: int = 0) -> list[Row]:
    """A GRPO run that learns, as TRL of today writes it."""
    draw = random.Random(seed)
    return [
        {
            "loss": 0.0004 * place / rows,
            "grad_norm": 0.3 + draw.gauss(0, 0.03),
            "learning_rate": 2e-6,
            "reward": 0.3 + 0.5 * place / rows + draw.gauss(0, 0.03),
            "reward_std": 0.4 + draw.gauss(0, 0.02),
            "frac_reward_zero_std": 0.1 + 0.05 * draw.random(),
            "kl": 0.02 * place / rows + 0.001 * draw.random(),
            "entropy": 0.8 - 0.2 * place / rows + draw.gauss(0, 0.01),
            "clip_ratio/region_mean": 0.01,
            "completions/mean_length": 210 + draw.gauss(0, 5),
            "completions/clipped_ratio": 0.04,
            "rewards/correct/mean": 0.5,
            "rewards/correct/std": 0.4,
            "epoch": place / rows,
            "step": place,
        }
        for place in range(1, rows + 1)
    ]


def changed(rows: Iterable[Row], change: Change) -> list[Row]:
    """Rows with each changed, given its place (0, 1, ...)."""
    return [row | change(row, place) for place, row in enumerate(rows)]


def log_of(rows: Iterable[Row], **given: Any) -> TrainingLog:
    return TrainingLog.of(rows, path="here", kind="trainer state", **given)


def report_of(rows: Iterable[Row], **given: Any) -> Report:
    return examine(log_of(rows, **given))


def found_in(rows: Iterable[Row], **given: Any) -> dict[str, Finding]:
    return {finding.rule: finding for finding in report_of(rows, **given).findings}


def write_state(folder: Path, rows: Iterable[Row]) -> Path:
    """A trainer_state.json."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "trainer_state.json"
    file.write_text(json.dumps({"global_step": 1, "log_history": list(rows)}))
    return file


def write_lines(file: Path, rows: Iterable[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

"""Training runs with and without the callback, for its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl import DPOTrainer

from entangle.training import EntanglementCallback
from tests.training import runs


def train(folder: Path, callback: EntanglementCallback | None = None, **options: Any) -> DPOTrainer:
    """A finished run of 6 steps of the tiny policy; `args` (a dict) go to DPOConfig."""
    args = {"max_steps": 6, "logging_steps": 2} | options.pop("args", {})
    done = runs.trainer(folder, args=args, **options)
    if callback is not None:
        callback.attach(done)
    done.train()
    return done


def weights(done: DPOTrainer) -> list[torch.Tensor]:
    """Trained parameters."""
    return [p.detach() for p in done.model.parameters() if p.requires_grad]


def are_same_run(one: DPOTrainer, other: DPOTrainer) -> bool:
    """Equal weights bit for bit, and equal log rows but for the callback's and the clock's."""
    same = all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))
    return same and own_rows(one) == own_rows(other)


def own_rows(done: DPOTrainer) -> list[dict[str, Any]]:
    """Rows of the log that the trainer itself wrote, without what a clock says."""
    ours = ("entangle/probe/", "entangle/live/", "entangle/ledger/", "entangle/set/")
    rows = [row for row in done.state.log_history if not any(key.startswith(ours) for key in row)]
    return [{k: v for k, v in row.items() if not k.endswith(("runtime", "per_second"))} for row in rows]

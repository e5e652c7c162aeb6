"""One process of a two-process run: `torchrun ... -m tests.training.ddp_run FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from trl import DPOTrainer

from entangle.training import PreferenceTrainer
from tests.processes import finish, gathered
from tests.training import runs


def main(folder: Path) -> None:
    """Train 20 steps with TRL's trainer and with ours, 3 with reward calibration.

    The answer is digests of all ranks and a log row, and the moving averages of all ranks.
    """
    torch.set_num_threads(1)
    args = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    answer: dict[str, Any] = {}
    for cls in (DPOTrainer, PreferenceTrainer):
        done = runs.trainer(folder, cls, args=args)
        done.train()
        log = {k: v for k, v in done.state.log_history[5].items() if isinstance(v, int | float)}
        answer[cls.__name__] = {"digests": gathered(runs.digest(done.model)), "log": log}
    answer["averages"] = gathered(runs.calibrated(folder, **args | {"gradient_accumulation_steps": 1}))
    finish(folder / "answer.json", answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

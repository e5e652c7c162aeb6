"""One process of a two-process run: `torchrun ... -m tests.training.ddp_run FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from trl import DPOTrainer

from entangle.training import PreferenceTrainer
from tests.training import runs


def main(folder: Path) -> None:
    """Train 20 steps with TRL's trainer and with ours, 3 with reward calibration.

    Rank 0 writes digests of all ranks and a log row, and the moving averages of all ranks.
    """
    torch.set_num_threads(1)
    args = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    answer: dict[str, Any] = {}
    for cls in (DPOTrainer, PreferenceTrainer):
        done = runs.trainer(folder, cls, args=args)
        done.train()
        digests: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(digests, runs.digest(done.model))
        log = {k: v for k, v in done.state.log_history[5].items() if isinstance(v, int | float)}
        answer[cls.__name__] = {"digests": digests, "log": log}
    averages: list[float | None] = [None] * dist.get_world_size()
    dist.all_gather_object(averages, runs.calibrated(folder, **args | {"gradient_accumulation_steps": 1}))
    answer["averages"] = averages
    if dist.get_rank() == 0:
        (folder / "answer.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # the answer is written; tearing down the threads of gloo can hang

"""One process of a two-process run with the callback: `torchrun ... -m tests.training.ddp_callback_run FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from entangle.training import EntanglementCallback
from tests.training import runs
from tests.training.watched import train


def main(folder: Path) -> None:
    """Train without and with the callback; rank 0 writes the digests of both runs on both ranks."""
    torch.set_num_threads(1)
    args = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    answer: list[str] = []
    for name, callback in (
        ("plain", None),
        ("double", EntanglementCallback(5, every=2, live=True, ledger=True)),
    ):
        done = train(folder / name, callback, args=args)
        digests: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(digests, runs.digest(done.model))
        answer += digests
    if dist.get_rank() == 0:
        (folder / "answer.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # the answer is written; tearing down the threads of gloo can hang

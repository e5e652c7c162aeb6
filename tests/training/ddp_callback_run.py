"""One process of a two-process run with the callback: `torchrun ... -m tests.training.ddp_callback_run FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from entangle.training import EntanglementCallback
from tests.processes import finish, gathered
from tests.training import runs
from tests.training.callback_runs import train


def main(folder: Path) -> None:
    """Train without and with the callback; the answer is the digests of both runs on both ranks."""
    torch.set_num_threads(1)
    args = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    answer: list[str] = []
    for name, callback in (
        ("plain", None),
        ("double", EntanglementCallback(5, every=2, live=True, ledger=True)),
    ):
        answer += gathered(runs.digest(train(folder / name, callback, args=args).model))
    finish(folder / "answer.json", answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""One process of a two-process steered run: `torchrun ... -m tests.training.ddp_steering_run FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from entangle.analysis.mitigations import SetBand
from entangle.training.mitigated import MitigatedTrainer
from tests.processes import finish, gathered
from tests.training import runs


def main(folder: Path) -> None:
    """Train a few steered steps; the answer is each rank's digest and the factors that were logged."""
    torch.set_num_threads(1)
    args = {
        "max_steps": 9,
        "per_device_train_batch_size": 2,
        "ddp_backend": "gloo",
        "dataloader_drop_last": True,
    }
    done = runs.trainer(folder, MitigatedTrainer, mitigation=SetBand(window=4), args=args)
    done.train()
    finish(folder / "answer.json", gathered((runs.digest(done.model), runs.logged(done, "entangle/set/k"))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

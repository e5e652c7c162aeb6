"""Programs on two processes (gloo), launched as a user would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(*words: str) -> list[str]:
    """The command line of `-m WORDS` on two processes, at a port that is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "-m",
        *words,
    ]


def run_on_two(*words: str) -> str:
    """Run it to its end; what it printed."""
    done = subprocess.run(
        torchrun(*words), capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def gathered(value: Any) -> list[Any]:
    """The value of every process."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def finish(path: Path, answer: Any) -> None:
    """Rank 0 writes the answer, and the process ends."""
    if dist.get_rank() == 0:
        path.write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # the answer is written; tearing down the threads of gloo can hang

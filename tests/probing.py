"""Probes of tiny models on rows of random words."""

from __future__ import annotations

import json
import random
from pathlib import Path

from rich.console import Console

from entangle.commands.probe import ProbeResult, run_probe
from entangle.config import ProbeConfig

WORDS = "the cat sat on the mat and then the other cat sat there too while they thought of nothing".split()


def write_rows(path: Path, count: int = 10, seed: int = 0) -> str:
    """Pairs of random words, of unlike lengths, in two kinds."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " " + " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    rows = [
        {"prompt": "TL;DR:" + text(2, 6), "chosen": text(1, 4), "rejected": text(1, 4), "kind": "ab"[i % 2]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(inputs: dict[str, str], output: Path, **changes) -> ProbeConfig:
    """Options of a probe on `inputs`."""
    given = {
        "model_name_or_path": inputs["base"],
        "adapter_name_or_path": inputs["adapter"],
        "dataset_name": inputs["data"],
        "losses": ("dpo", "simpo", "kto"),
        "shard_size": 3,
        "max_length": 64,
        "output_dir": str(output),
    }
    return ProbeConfig(**(given | changes))


def probe(config: ProbeConfig) -> ProbeResult:
    """Run it without a word."""
    return run_probe(config, Console(quiet=True))

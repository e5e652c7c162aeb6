"""Whether `entangle probe --dry_run` tells the truth: its memory and time against those of the run itself.

    python benchmarks/estimate.py              every setting; writes benchmarks/results/estimate-cpu.{md,json}
    python benchmarks/estimate.py --quick      one of them on few pairs, printed only

Each estimate and each run is a process of its own, one thread. Memory is the growth of resident memory from just
before the weights are read to its peak, as Linux counts it: weights and passes, without what Python and its libraries
take. Time is CPU seconds of the passes, the engine's check of itself among them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from engine import TLDR, conditions, forget_peak, peak_resident, table
from methods import Shape, build
from rich.console import Console
from transformers import AutoTokenizer

from entangle import embedded
from entangle.commands import probe
from entangle.config import ProbeConfig
from entangle.measure.estimate import estimate
from entangle.runs.progress import progress_bar
from entangle.runs.session import Session

TOLERANCE = 0.25
"""How far an estimate may be off, as a share of what is measured."""

SMALL_LLAMA = Path("../shared/models/stories260k")


@dataclass(frozen=True)
class Setting:
    """A probe that is estimated and run.

    Args:
        title: what the reader needs to know of it.
        options: options of the probe.
        shape: the random model that it is given; None where the options name one.
        repeat: how often the words of every prompt are repeated, for longer rows.
    """

    title: str
    options: dict[str, Any] = field(default_factory=dict)
    shape: Shape | None = None
    repeat: int = 1


PLAIN_LLAMA = replace(TLDR, lora=None)
LORA = {"use_peft": True, "lora_r": 16}
FULL = {"parameters": "full", "reference": "self"}
STORIES = {"model_name_or_path": str(SMALL_LLAMA), "max_length": 2048} | FULL

SETTINGS = (
    Setting("embedded policy, LoRA"),
    Setting("embedded policy, LoRA, one pair per pass, by module", {"batch_size": 1, "modules": True}),
    Setting("embedded policy, all parameters", {"parameters": "full"}),
    Setting("small real Llama (0.3M), all parameters, long rows", STORIES),
    Setting("59M Llama, LoRA r=16", LORA | {"limit": 36}, PLAIN_LLAMA),
    Setting(
        "59M Llama, LoRA r=16, two pairs per pass, longer prompts",
        LORA | {"limit": 12, "batch_size": 2},
        PLAIN_LLAMA,
        repeat=4,
    ),
    Setting(
        "72M Llama (12 layers, from stacks of 2 and 4), LoRA r=16, two pairs per pass",
        LORA | {"limit": 24, "batch_size": 2},
        replace(PLAIN_LLAMA, layers=12),
    ),
    Setting(
        "59M Llama, all parameters, two pairs per pass", FULL | {"limit": 24, "batch_size": 2}, PLAIN_LLAMA
    ),
    Setting(
        "59M Llama, all parameters, one pair per pass, longer prompts, two losses",
        FULL | {"limit": 8, "batch_size": 1, "losses": ("dpo", "kto")},
        PLAIN_LLAMA,
        repeat=4,
    ),
)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison; its results, as they are written to the .json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", type=int, nargs="*", help="numbers of settings, counted from 0")
    parser.add_argument("--quick", action="store_true", help="the first setting on few pairs")
    parser.add_argument("--output", type=Path, help="folder to write to")
    options = parser.parse_args(arguments)
    chosen = [SETTINGS[i] for i in (range(len(SETTINGS)) if options.only is None else options.only)]
    if options.quick:
        chosen = [replace(SETTINGS[0], options={"limit": 4})]
    chosen = [s for s in chosen if s.shape or Path(s.options.get("model_name_or_path", ".")).exists()]
    results: dict[str, Any] = {"conditions": conditions(), "settings": []}
    with progress_bar(Console(stderr=True), "settings", len(chosen), 0) as advance:
        for setting in chosen:
            results["settings"].append({"title": setting.title} | compare(setting))
            advance(1)
    text = render(results)
    print(text)
    output = options.output
    if output is None and not options.quick and options.only is None:
        output = Path(__file__).parent / "results"
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "estimate-cpu.md").write_text(text)
        (output / "estimate-cpu.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def compare(setting: Setting) -> dict[str, Any]:
    """Pairs, and megabytes and seconds as they were estimated and measured."""
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(setting, Path(folder))
        (estimated, pairs), (measured, _) = (apart(part, config) for part in (promised, used))
    return {"pairs": pairs, "estimated": estimated, "measured": measured}


def prepare(setting: Setting, folder: Path) -> ProbeConfig:
    """The options of a setting; its model and its pairs lie in the folder."""
    options: dict[str, Any] = {
        "device": "cpu",
        "seed": 0,
        "output_dir": str(folder / "run"),
    } | setting.options
    if setting.shape is not None:
        tokenizer = AutoTokenizer.from_pretrained(embedded.POLICY)
        model, _ = build(setting.shape)
        model.save_pretrained(folder / "model")  # pyright: ignore[reportCallIssue]
        tokenizer.save_pretrained(folder / "model")
        options["model_name_or_path"] = str(folder / "model")
    if setting.repeat > 1:
        rows = [json.loads(line) for line in embedded.PAIRS.read_text().splitlines()]
        longer = [row | {"prompt": " ".join([row["prompt"]] * setting.repeat)} for row in rows]
        options["dataset_name"] = str(folder / "pairs.jsonl")
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))
    return ProbeConfig(**options)


Found = tuple[dict[str, float], int]
"""Megabytes and seconds, and how many pairs were scored."""


def apart(part: Callable[[ProbeConfig], Found], config: ProbeConfig) -> Found:
    """What a function finds in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(part, config).result()


def promised(config: ProbeConfig) -> Found:
    """What the dry run says, its clock counting CPU seconds."""
    torch.set_num_threads(1)
    with patch("entangle.measure.estimate.time.perf_counter", time.process_time):
        found = estimate(config)
    return {"MB": found.bytes / 1e6, "seconds": found.seconds}, found.scored


def used(config: ProbeConfig) -> Found:
    """What the run takes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # so that the libraries are loaded
        probe.run_probe(ProbeConfig(limit=1, device="cpu", output_dir=f"{folder}/run"), Console(quiet=True))
    ctypes.CDLL(None).malloc_trim(0)
    seconds: list[float] = []
    passes = Session.compute

    def timed(*arguments: Any, **options: Any) -> None:
        started = time.process_time()
        passes(*arguments, **options)
        seconds.append(time.process_time() - started)

    before = forget_peak()
    with patch.object(Session, "compute", timed):
        result = probe.run_probe(config, Console(quiet=True))
    return {"MB": (peak_resident() - before) / 1e6, "seconds": seconds[0]}, len(result.pairs)


def render(results: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    facts = results["conditions"]
    software = facts["software"]
    rows, ratios = [], []
    for row in results["settings"]:
        estimated, measured = row["estimated"], row["measured"]
        ratio = {unit: estimated[unit] / measured[unit] for unit in ("MB", "seconds")}
        ratios += ratio.values()
        rows.append(
            [
                row["title"],
                str(row["pairs"]),
                *(
                    f"{estimated[unit]:.3g} / {measured[unit]:.3g} = {ratio[unit]:.2f}"
                    for unit in ("MB", "seconds")
                ),
            ]
        )
    within = sum(abs(ratio - 1) <= TOLERANCE for ratio in ratios)
    return "\n".join(
        [
            "# What `entangle probe --dry_run` says, and what the run takes",
            "",
            "Memory: growth of resident memory to its peak, from before the weights are read. Time: CPU seconds of the "
            "passes. Float32, one thread, each estimate and run in a process of its own. Made by "
            "`python benchmarks/estimate.py`.",
            "",
            f"{facts['date']}; {facts['processor']}, {facts['cores']} cores; torch {software['torch']}, transformers "
            f"{software['transformers']}, peft {software['peft']}; load average {facts['load_at_start']} before.",
            "",
            f"{within} of {len(ratios)} estimates are within {100 * TOLERANCE:.0f} % of what is measured; the ratios "
            f"lie between {min(ratios):.2f} and {max(ratios):.2f}.",
            "",
            *table(["setting", "pairs", "MB, estimated / measured", "seconds, estimated / measured"], rows),
            "",
        ]
    )


if __name__ == "__main__":
    main()

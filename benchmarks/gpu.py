"""The engine against the per-response loop on a GPU: an 8B-shaped Llama in bfloat16, LoRA r=64 on q, k and v.

    python benchmarks/gpu.py                       writes benchmarks/results/engine-gpu.{md,json}; needs 80 GB
    python benchmarks/gpu.py --pairs_per_pass 4    for less memory
    python benchmarks/gpu.py --device cpu --tiny   the same on a tiny model, to see that it runs; printed only

The weights are random and made on the device; nothing is downloaded. Lengths are TL;DR's: prompts of 200 to 400 tokens,
responses of 20 to 50. Both methods run on the same weights in the same precision, take turns, and are given a warm-up
pass. The engine's scores are bfloat16's, as the loop's are: what differs between them is rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from methods import Method, Parameters, Shape, batches_of, build, ours, response_loop
from rich.console import Console
from torch import nn

from entangle.runs.progress import progress_bar
from entangle.runs.provenance import environment

LLAMA_8B = Shape(
    layers=32,
    width=4096,
    inner=14_336,
    heads=32,
    kv_heads=8,
    vocabulary=128_256,
    lora=64,
    targets=("q_proj", "k_proj", "v_proj"),
    pairs=64,
    per_batch=12,
)
TARGET = 3.0
"""Pairs per second of ours, at least, in units of the loop's."""

METHODS: dict[str, Method] = {"ours": ours, "response loop": response_loop}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison; its results, as they are written to the .json."""
    options = _parser().parse_args(arguments)
    shape = LLAMA_8B.tiny if options.tiny else LLAMA_8B
    shape = replace(
        shape,
        pairs=options.pairs or shape.pairs,
        per_batch=options.pairs_per_pass or shape.per_batch,
    )
    model, parameters = build(shape, torch.bfloat16, options.device)
    console = Console(stderr=True)
    results = {
        "date": date.today().isoformat(),
        "device": _device_name(options.device),
        "software": environment()["packages"],
        "shape": asdict(shape),
        "methods": compare(model, parameters, shape, options.device, options.repeats, console),
    }
    text = render(results)
    print(text)
    output = options.output or (None if options.tiny else Path(__file__).parent / "results")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "engine-gpu.md").write_text(text)
        (output / "engine-gpu.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def compare(
    model: nn.Module, parameters: Parameters, shape: Shape, device: str, rounds: int, console: Console
) -> dict[str, Any]:
    """Pairs per second in every round, peak memory, and the cosines that each method finds."""
    batches = batches_of(shape, device)
    runs = {}
    for name, prepare in METHODS.items():
        prepare(model, parameters, batches[:1])()  # warm-up
        runs[name] = prepare(model, parameters, batches)
    found: dict[str, Any] = {name: {"pairs_per_second": [], "peak_gb": None} for name in METHODS}
    with progress_bar(console, "rounds", rounds * len(METHODS), 0) as advance:
        for _ in range(rounds):
            for name, run in runs.items():
                if device.startswith("cuda"):
                    torch.cuda.reset_peak_memory_stats(device)
                _wait(device)
                started = time.perf_counter()
                block = run()
                _wait(device)
                found[name]["pairs_per_second"].append(shape.pairs / (time.perf_counter() - started))
                if device.startswith("cuda"):
                    found[name]["peak_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
                assert block is not None
                sq_chosen, sq_rejected, inner = block.double().cpu().unbind(1)
                found[name]["cosines"] = (inner / (sq_chosen * sq_rejected).sqrt()).tolist()
                advance(1)
    return found


def render(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    shape, methods = results["shape"], results["methods"]
    fast, slow = methods["ours"], methods["response loop"]
    ratios = [a / b for a, b in zip(fast["pairs_per_second"], slow["pairs_per_second"], strict=True)]
    gap = max(abs(a - b) for a, b in zip(fast["cosines"], slow["cosines"], strict=True))
    software = results["software"]
    lines = [
        "# The engine on a GPU",
        "",
        f"{results['date']}; {results['device']}; torch {software['torch']}, transformers {software['transformers']}, "
        f"peft {software['peft']}. Llama of {shape['layers']} layers x {shape['width']}, {shape['vocabulary']} tokens, "
        f"random weights in bfloat16, LoRA r={shape['lora']} on {', '.join(shape['targets'])}; {shape['pairs']} pairs, "
        f"prompts of {shape['prompt'][0]}-{shape['prompt'][1]} tokens, responses of {shape['response'][0]}-"
        f"{shape['response'][1]}; ours {shape['per_batch']} pairs per pass, the loop one response. Wall time, median "
        "[least, most]. Made by `python benchmarks/gpu.py`.",
        "",
        "| method | pairs per second | peak memory, GB |",
        "| --- | --- | --- |",
    ]
    for name, row in methods.items():
        speeds = row["pairs_per_second"]
        peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}"
        lines.append(
            f"| {name} | {statistics.median(speeds):.3g} [{min(speeds):.3g}, {max(speeds):.3g}] | {peak} |"
        )
    ratio = statistics.median(ratios)
    lines += [
        "",
        f"Ours is {ratio:.2f} times the loop [{min(ratios):.2f}, {max(ratios):.2f}]; at least {TARGET:g} was asked: "
        f"{'met' if ratio >= TARGET else '**not met**'}. Largest difference of a pair's cosine: {gap:.1e}.",
    ]
    return "\n".join(lines) + "\n"


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="device to run on")
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    parser.add_argument("--pairs", type=int, help="pairs")
    parser.add_argument("--pairs_per_pass", type=int, help="pairs per pass of ours")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--output", type=Path, help="folder to write to")
    return parser


if __name__ == "__main__":
    main()

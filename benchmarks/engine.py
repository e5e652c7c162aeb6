"""What the engine costs, as ratios to one plain forward and backward pass of the same rows.

    python benchmarks/engine.py                        every case; writes benchmarks/results/engine-cpu.{md,json}
    python benchmarks/engine.py --case lora full-512   some of them, printed only
    python benchmarks/engine.py --quick                the same on tiny models, to see that everything runs

The methods of a case take turns, round after round, in one process and one thread; a ratio is taken within its round,
and the table gives the median over the rounds and the range. Times are CPU seconds of the process, so that another job
on the machine disturbs them little. Random weights and random tokens: neither costs more or less than real ones.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import os
import platform
import pstats
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from methods import (
    Method,
    Shape,
    batches_of,
    build,
    full_logits,
    ours,
    ours_fast_gemm,
    ours_gram,
    ours_with_sums,
    plain_pass,
    response_loop,
    token_loop,
    token_sums,
    torch_vmap,
)
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer

from entangle.commands.probe import run_probe
from entangle.config import ProbeConfig
from entangle.embedded import POLICY
from entangle.errors import UserError
from entangle.runs.progress import progress_bar
from entangle.runs.provenance import environment
from entangle.scores.logps import Rows
from entangle.scores.prefix import split_for

PLAIN, LOOP, OURS, FAST = "plain pass", "response loop", "ours", "ours, fast matrix product"
SET = "ours, with the set's block"

TLDR = Shape(layers=8, width=512, inner=1376, heads=8, vocabulary=32_000)
WIDE = Shape(layers=4, width=1536, inner=4096, heads=12, vocabulary=8_000, lora=None)
SMALL = Shape(
    layers=2,
    width=64,
    inner=172,
    heads=2,
    vocabulary=1_000,
    prompt=(30, 60),
    response=(10, 20),
    pairs=32,
    per_batch=8,
)

METHODS: dict[str, Method] = {
    PLAIN: plain_pass,
    "full logits": full_logits,
    OURS: ours,
    SET: ours_with_sums,
    FAST: ours_fast_gemm,
    "torch.func vmap": torch_vmap,
    LOOP: response_loop,
}


@dataclass(frozen=True)
class Target:
    """What a method may cost at most, in units of another."""

    method: str
    limit: float
    unit: str = PLAIN


@dataclass(frozen=True)
class Case:
    """Methods that are compared on one shape.

    Args:
        title: what the reader needs to know of the shape.
        shape: the model and the pairs.
        targets: what is asked of ours.
        rounds: how often the methods take turns.
        methods: by name; the first one is the unit, the last one the one that the others' numbers are held against.
    """

    title: str
    shape: Shape
    targets: tuple[Target, ...]
    rounds: int = 5
    methods: dict[str, Method] = field(default_factory=lambda: METHODS)


CASES: dict[str, Case] = {
    "lora": Case(
        "LoRA r=16 on all linear layers, 59M Llama (8 x 512), TL;DR lengths",
        TLDR,
        (Target(OURS, 0.78), Target(SET, 1.05, OURS)),
    ),
    "full-512": Case(
        "all parameters, 59M Llama (8 x 512), TL;DR lengths",
        replace(TLDR, lora=None),
        (Target(OURS, 0.86), Target(SET, 1.20, OURS), Target(SET, 1.00)),
    ),
    "full-1536": Case(
        "all parameters, 138M Llama (4 x 1536), TL;DR lengths",
        WIDE,
        (Target(OURS, 0.60), Target(SET, 1.20, OURS), Target(SET, 1.00)),
        rounds=3,
        methods={name: method for name, method in METHODS.items() if method is not torch_vmap},
    ),
    "gram": Case(
        "Gram matrix of 32 pairs, 64 x 64, LoRA as above",
        replace(TLDR, pairs=32),
        (Target("ours, score_gram", 1.0),),
        rounds=1,
        methods={PLAIN: plain_pass, "ours, score_gram": ours_gram},
    ),
    "tokens": Case(
        "token sums in both directions, one pair of 300 + 35 tokens, LoRA as above",
        replace(TLDR, prompt=(300, 300), response=(35, 35), pairs=1, per_batch=1),
        (Target("ours, token sums", 0.10, "token loop"),),
        rounds=1,
        methods={PLAIN: plain_pass, "ours, token sums": token_sums, "token loop": token_loop},
    ),
    "small": Case(
        "LoRA r=16, CI-sized Llama (2 x 64), 8 pairs per pass, prompts of 30-60 tokens",
        SMALL,
        (Target(OURS, 0.30, LOOP),),
        rounds=5,
    ),
}

SHARING = {
    "59M Llama, LoRA": TLDR,
    "59M Llama, all parameters": replace(TLDR, lora=None),
    "CI-sized Llama, LoRA": replace(SMALL, response=(20, 50)),
}
"""Shapes on which it is measured from where on a shared prompt pays; answers as in TL;DR, prompts of growing length."""

SHARED_PROMPTS = (12, 25, 50)
"""Their mean lengths."""

MEMORY = {"lora": replace(TLDR, pairs=4), "full-512": replace(TLDR, lora=None, pairs=4)}
"""Shapes whose peak memory is measured."""

OTHERS = ("sharing", "memory", "probe")
"""What is measured in ways of its own."""

PROBE = TLDR
PROBE_TARGET = 0.02
AFTER_THE_SCORES = ("predict_losses", "summarise", "write_table", "write_json", "write_yaml")
"""Functions of a probe run that the losses, regimes, aggregates and files cost."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; its results, as they are written to the .json."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "ignore", "There is a performance drop", UserWarning
    )  # vmap's own, seen in its figures
    results: dict[str, Any] = {"conditions": conditions(), "cases": {}}
    console = Console(stderr=True)
    for name in options.case or [*CASES, *OTHERS]:
        if name == "memory":
            results["memory"] = measure_memory(options.quick)
        elif name == "sharing":
            results["sharing"] = measure_sharing(options.quick, options.repeats or 2)
        elif name == "probe":
            results["probe"] = measure_probe(options.quick)
        else:
            case = CASES[name]
            if options.quick:
                case = replace(case, shape=case.shape.tiny, rounds=1)
            results["cases"][name] = measure_case(case, options.repeats or case.rounds, console, name)
    results["conditions"]["load_at_end"] = _load()
    text = render(results)
    print(text)
    output = options.output or (None if options.case or options.quick else Path(__file__).parent / "results")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "engine-cpu.md").write_text(text)
        (output / "engine-cpu.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def measure_case(case: Case, rounds: int, console: Console, name: str) -> dict[str, Any]:
    """CPU seconds per pair of every method and round, and how far its numbers are from the last method's."""
    model, parameters = build(case.shape)
    batches = batches_of(case.shape)
    runs = {method: prepare(model, parameters, batches) for method, prepare in case.methods.items()}
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    found: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    with progress_bar(console, name, rounds * len(runs), 0) as advance:
        for _ in range(rounds):
            for method, run in runs.items():
                if method in refused:
                    continue
                started = time.process_time()
                try:
                    value = run()
                except (
                    UserError,
                    RuntimeError,
                ) as error:  # no such route on this machine; vmap of a new kernel
                    refused[method] = str(error).splitlines()[0]
                    continue
                seconds[method].append((time.process_time() - started) / case.shape.pairs)
                if value is not None:
                    found[method] = value
                advance(1)
    oracle = found[list(case.methods)[-1]]
    return {
        "title": case.title,
        "shape": asdict(case.shape),
        "targets": [asdict(target) for target in case.targets],
        "seconds_per_pair": {method: times for method, times in seconds.items() if times},
        "error": {method: relative_error(value, oracle) for method, value in found.items()},
        "refused": refused,
    }


def relative_error(found: Tensor, oracle: Tensor) -> float:
    """Largest difference, relative to the largest entry of its pair."""
    return float(((found - oracle).abs().amax(-1) / oracle.abs().amax(-1)).max())


def ratios(seconds: dict[str, list[float]], method: str, unit: str) -> list[float]:
    """Cost of a method in units of another, round by round."""
    return [a / b for a, b in zip(seconds[method], seconds[unit], strict=True)]


def measure_sharing(quick: bool, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Cost of the engine with prompts evaluated once in units of whole rows, by the share of tokens that this saves."""
    found: dict[str, list[dict[str, float]]] = {}
    always = partial(split_for, min_share=0.0)
    for name, shape in SHARING.items():
        shape = shape.tiny if quick else shape
        model, parameters = build(shape)
        found[name] = []
        for length in SHARED_PROMPTS:
            batches = batches_of(replace(shape, prompt=(round(0.8 * length), round(1.2 * length))))
            saved = [split for batch in batches if (split := always(model, Rows.from_batch(batch), 2))]
            seconds: list[list[float]] = [[], []]
            with patch("entangle.scores.factored.split_for", always):
                runs = [ours(model, parameters, batches, share_prompts=share) for share in (True, False)]
                for _ in range(rounds):
                    for times, run in zip(seconds, runs, strict=True):
                        started = time.process_time()
                        run()
                        times.append(time.process_time() - started)
            found[name].append(
                {
                    "prompt": length,
                    "saved": statistics.mean(split.tokens_saved for split in saved),
                    "cost": statistics.median(a / b for a, b in zip(*seconds, strict=True)),
                }
            )
    return found


def measure_memory(quick: bool) -> dict[str, dict[str, float]]:
    """Peak memory beyond the loaded model, MB, each method in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, float]] = {}
    for name, shape in MEMORY.items():
        shape = shape.tiny if quick else shape
        found[name] = {}
        for method in (PLAIN, OURS, LOOP):
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                found[name][method] = pool.submit(peak_memory, shape, method).result()
        model, parameters = build(shape)
        found[name]["scores of one pair"] = 2 * sum(p.nbytes for p in parameters.values()) / 2**20
        found[name]["weights"] = sum(p.nbytes for p in model.parameters()) / 2**20
    return found


def peak_memory(shape: Shape, method: str) -> float:
    """MB that a method needs beyond the model, as Linux counts resident memory."""
    torch.set_num_threads(1)
    model, parameters = build(shape)
    batches = batches_of(shape)
    before = forget_peak()
    METHODS[method](model, parameters, batches)()
    return (peak_resident() - before) / 2**20


def forget_peak() -> int:
    """Let the largest resident memory start anew from what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_resident()


def peak_resident() -> int:
    """Largest resident memory of this process, bytes (`getrusage` would count its parent's)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])  # pyright: ignore[reportOptionalSubscript]


def measure_probe(quick: bool) -> dict[str, Any]:
    """What share of a probe run is losses, regimes, aggregates and files: the pairs of the package, LoRA, 13 losses."""
    shape = PROBE.tiny if quick else PROBE
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(POLICY)
        vocabulary = max(shape.vocabulary, len(tokenizer))
        model, _ = build(replace(shape, lora=None, vocabulary=vocabulary))
        model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        tokenizer.save_pretrained(folder)
        config = ProbeConfig(
            model_name_or_path=folder,
            use_peft=True,
            seed=0,
            device="cpu",
            output_dir=f"{folder}/run",
            limit=4 if quick else 36,
        )
        profile = cProfile.Profile(time.process_time)
        result = profile.runcall(run_probe, config, Console(quiet=True))
    stats = pstats.Stats(profile).stats  # pyright: ignore[reportAttributeAccessIssue]
    times = {function: cumulative for (_, _, function), (_, _, _, cumulative, _) in stats.items()}
    parts = {name: times[name] for name in AFTER_THE_SCORES if name in times}
    whole = times["run_probe"]
    return {
        "pairs": len(result.pairs),
        "seconds": whole,
        "parts": parts,
        "share": sum(parts.values()) / whole,
    }


def render(results: dict[str, Any]) -> str:
    """The results as Markdown: targets first, then every case."""
    facts = results["conditions"]
    software = facts["software"]
    lines = [
        "# Cost of the engine on a CPU",
        "",
        "Unit: one plain forward and backward pass of the same rows in the same passes, gradients in the probed "
        "parameters only, LM head at response positions. CPU seconds of the process, float32, one thread; methods take "
        "turns. Ratios: median over the rounds [least, most]. Made by `python benchmarks/engine.py`.",
        "",
        f"{facts['date']}; {facts['processor']}, {facts['cores']} cores, {facts['threads']} thread; torch "
        f"{software['torch']}, transformers {software['transformers']}, peft {software['peft']}; load average "
        f"{facts['load_at_start']} before and {facts['load_at_end']} after"
        + (
            " (other jobs were running)." if facts["load_at_start"] > 1 or facts["load_at_end"] > 1.5 else "."
        ),
        "",
        *table(["what", "of", "measured", "at most", "met"], list(_targets(results))),
    ]
    for case in results["cases"].values():
        lines += [
            "",
            f"## {case['title']}",
            "",
            *table(["method", "CPU ms per pair", "of the plain pass", "error"], list(_case_rows(case))),
        ]
    if "sharing" in results:
        lines += [
            "",
            "## From where on a shared prompt pays",
            "",
            "Cost of the engine with prompts evaluated once, in units of the engine on whole rows; in brackets the "
            "share of tokens that sharing saves.",
            "",
            *table(
                ["prompt tokens", *map(str, SHARED_PROMPTS)],
                [
                    [name, *(f"{row['cost']:.2f} ({row['saved']:.2f})" for row in rows)]
                    for name, rows in results["sharing"].items()
                ],
            ),
        ]
    if "memory" in results:
        lines += [
            "",
            "## Peak memory beyond the weights",
            "",
            "MB, two pairs per pass, a process per method; `scores` is what two written-out scores take.",
            "",
            *table(
                ["shape", PLAIN, OURS, LOOP, "scores", "weights"],
                [
                    [
                        name,
                        *(f"{row[key]:.0f}" for key in (PLAIN, OURS, LOOP, "scores of one pair", "weights")),
                    ]
                    for name, row in results["memory"].items()
                ],
            ),
        ]
    if "probe" in results:
        probe = results["probe"]
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in probe["parts"].items())
        lines += [
            "",
            "## A probe run",
            "",
            f"{probe['pairs']} pairs of the package, the 59M Llama with a fresh LoRA, 13 losses, under the profiler: "
            f"{probe['seconds']:.1f} CPU seconds, of these after the scores: {parts}.",
        ]
    return "\n".join(lines) + "\n"


def _targets(results: dict[str, Any]) -> Iterator[list[str]]:
    """One row per target."""
    for case in results["cases"].values():
        for target in (Target(**target) for target in case["targets"]):
            if target.method in case["seconds_per_pair"]:
                found = ratios(case["seconds_per_pair"], target.method, target.unit)
                what = case["title"] + (", with the set's block" if target.method == SET else "")
                yield _verdict(what, target.unit, found, target.limit)
    for name, row in results.get("memory", {}).items():
        limit = row[PLAIN] + MEMORY[name].per_batch * row["scores of one pair"]
        yield _verdict(f"peak memory, {name}", "plain pass + the scores of a pass", [row[OURS] / limit], 1.0)
    if "probe" in results:
        yield _verdict(
            "losses, regimes and writing", "a probe run", [results["probe"]["share"]], PROBE_TARGET
        )


def _verdict(title: str, unit: str, found: list[float], limit: float) -> list[str]:
    return [
        title,
        unit,
        spread(found),
        f"{limit:.2f}",
        "yes" if statistics.median(found) <= limit else "**no**",
    ]


def _case_rows(case: dict[str, Any]) -> Iterator[list[str]]:
    seconds = case["seconds_per_pair"]
    for method, times in seconds.items():
        error = f"{case['error'][method]:.0e}" if method in case["error"] else ""
        yield [
            method,
            f"{1e3 * statistics.median(times):.3g}",
            spread(ratios(seconds, method, PLAIN)),
            error,
        ]
    for method, reason in case["refused"].items():
        yield [method, "doesn't run", reason, ""]


def spread(values: list[float]) -> str:
    """Median [least, most]; a single value alone."""
    middle = f"{statistics.median(values):.3g}"
    return f"{middle} [{min(values):.3g}, {max(values):.3g}]" if len(values) > 1 else middle


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def conditions() -> dict[str, Any]:
    """The machine and the software; nothing that names them."""
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "load_at_start": _load(),
        "software": environment()["packages"],
    }


def _processor() -> str:
    """Model, and what decides how fast it multiplies matrices."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)  # pyright: ignore
    flags = facts.get("flags", "").split()
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags]
    return f"{facts.get('model name', platform.machine())} ({', '.join(units)})"


def _load() -> float:
    return round(os.getloadavg()[0], 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--case", nargs="*", choices=[*CASES, *OTHERS], help="what to run; everything if left out"
    )
    parser.add_argument("--repeats", type=int, help="rounds of every case, instead of its own number")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument("--output", type=Path, help="folder to write to")
    return parser


if __name__ == "__main__":
    main()

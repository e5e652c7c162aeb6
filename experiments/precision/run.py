"""What bfloat16 does to cosines and to verdicts, where the weights are the same.

    python experiments/precision/run.py

The base's weights are rounded to bfloat16 once. The scores of that one function are then computed in float64 (the
truth), in float32, in float32 under bfloat16 autocast as training computes them, and in bfloat16 throughout. The last
row of a setting is another function: the weights as they were saved, in float64. A verdict is the regime of one pair
under one loss. It is kept, withheld (degenerate: closer to zero than the arithmetic is believed to tell) or wrong. A
setting whose data isn't there is left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from entangle.analysis.predictions import is_scored, predict_losses
from entangle.commands.probe import ProbeResult, run_probe
from entangle.config import ProbeConfig, build_losses, read_yaml
from entangle.errors import UserError
from entangle.scores.float64 import KeepFloat64

SETTINGS = sorted(Path("experiments/precision").glob("*.yaml"))
OUTPUT = Path("experiments/results/precision")


@dataclass(frozen=True)
class Way:
    """One way to compute: options of the probe that differ, and what it runs under."""

    options: dict[str, str]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


TRUTH = Way({"dtype": "bfloat16", "score_dtype": "float64"}, KeepFloat64)

WAYS = {
    "float32": Way({"dtype": "bfloat16", "score_dtype": "float32"}),
    "autocast to bfloat16": Way(
        {"dtype": "bfloat16", "score_dtype": "float32", "engine": "autograd"},
        lambda: torch.autocast("cpu", torch.bfloat16),
    ),
    "bfloat16": Way({"dtype": "bfloat16", "score_dtype": "bfloat16"}),
    "float64, weights not rounded": Way({"dtype": "float64"}, KeepFloat64),
}


def run(config: ProbeConfig, way: Way) -> tuple[ProbeResult, float]:
    """The probe of a setting, computed in one of the ways in a folder that goes away, and its resolution."""
    with tempfile.TemporaryDirectory() as scratch, way.context():
        changed = replace(config, **way.options, output_dir=f"{scratch}/run", save_text=False)
        result = run_probe(changed, Console(quiet=True))
        return result, result.folder.read_json("provenance.json")["resolution"]


def compare(
    found: ProbeResult, truth: ProbeResult, config: ProbeConfig, resolution: float
) -> dict[str, object]:
    """Errors of the pairs' numbers, and verdicts counted, against the truth."""
    rows, expected = (result.pairs.set_index("index") for result in (found, truth))
    scored = is_scored(expected)
    rows, expected = rows[scored], expected[scored]
    cosine = (rows["cosine"] - expected["cosine"]).abs()
    square = (rows["sq_chosen"] / expected["sq_chosen"] - 1).abs()
    believed = predict_losses(found.pairs, build_losses(config.losses), resolution=1e-12, batch_size=8)
    verdicts = truth.predictions.merge(found.predictions, on=["index", "loss"], suffixes=("_true", "_found"))
    verdicts = verdicts.merge(believed, on=["index", "loss"])
    verdicts = verdicts[verdicts["regime_true"] != "degenerate"]
    same = verdicts["regime_true"] == verdicts["regime_found"]
    withheld = verdicts["regime_found"] == "degenerate"
    wrong = verdicts[~same & ~withheld]
    return {
        "pairs": len(rows),
        "cosine error, median": float(cosine.median()),
        "cosine error, max": float(cosine.max()),
        "error of A, median": float(square.median()),
        "error of A, max": float(square.max()),
        "believed to": resolution,
        "verdicts": len(verdicts),
        "kept": int(same.sum()),
        "withheld": int(withheld.sum()),
        "wrong": len(wrong),
        "wrong if all are believed": int((verdicts["regime_true"] != verdicts["regime"]).sum()),
        "wrong by loss": ", ".join(f"{loss} {n}" for loss, n in wrong["loss"].value_counts().items()) or "-",
    }


def rows_of(setting: Path) -> Iterator[Mapping[str, object]]:
    """One row per way of computing."""
    config = ProbeConfig(**read_yaml(setting, ProbeConfig).values)
    truth, _ = run(config, TRUTH)
    for name, way in WAYS.items():
        found, resolution = run(config, way)
        yield {"setting": setting.stem, "computed in": name} | compare(found, truth, config, resolution)


READING = """# What 16-bit arithmetic does to cosines and verdicts

All rows but the last of a setting compute one function, the model whose weights are rounded to bfloat16, and are held
against that function in float64. `float64, weights not rounded` is another function: the weights as they were saved.
It says what rounding the weights changes by itself, with nothing lost in the arithmetic. A = |g_w|^2. A verdict is the
regime of one pair under one loss; it is kept, withheld (`degenerate`) or wrong. The last column but one counts wrong
ones if no sign were withheld. Made by `python experiments/precision/run.py`.

"""


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown: errors to two digits, counts as they are."""
    lines = [" | ".join(table.columns), " | ".join("---" for _ in table.columns)]
    for row in table.itertuples(index=False):
        lines.append(" | ".join(f"{v:.1e}" if isinstance(v, float | np.floating) else str(v) for v in row))
    return READING + "".join(f"| {line} |\n" for line in lines)


def main() -> None:
    """Compute every setting whose data is there, and write the table."""
    rows: list[Mapping[str, object]] = []
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for setting in SETTINGS:
        try:
            rows += rows_of(setting)
        except UserError as error:
            print(f"{setting.stem} is left out: {error}")
        table = pd.DataFrame(rows)
        table.to_csv(OUTPUT / "precision.csv", index=False)
        (OUTPUT / "precision.md").write_text(markdown(table))
        print(markdown(table), flush=True)


if __name__ == "__main__":
    main()

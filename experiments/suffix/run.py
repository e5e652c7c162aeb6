"""Does a shared suffix entangle? The sentiment setting of arXiv 2410.13828 with no, a short and a long suffix.

    python experiments/suffix/make.py
    python experiments/suffix/run.py

Runs `entangle compare` with suffix.yaml on the pairs of each suffix, draws cosine and log-probs over training, and the
token heat map of one held-out pair under the policy that DPO started from.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
from make import FOLDER, SUFFIXES
from rich.console import Console

from entangle.commands.compare import CompareResult, run_compare, trials_of
from entangle.commands.probe import run_probe
from entangle.commands.tokens import run_tokens
from entangle.config import CompareConfig, ProbeConfig, TokensConfig, parse
from entangle.figures.style import SIDE_COLOURS, panels, save

RESULTS = Path("experiments/results/suffix")
CONSOLE = Console(stderr=True)


def options(suffix: str) -> CompareConfig:
    """The comparison on one suffix's pairs."""
    data = FOLDER / suffix
    flags = [
        "--config",
        "experiments/suffix/suffix.yaml",
        "--dataset_name",
        str(data / "train.jsonl"),
        "--eval_dataset_name",
        str(data / "test.jsonl"),
        "--output_dir",
        f"runs/compare/suffix-{suffix}",
    ]
    return parse(CompareConfig, flags, prog="suffix")[0]


def figure(bands: pd.DataFrame) -> None:
    """Log-probs above, cosine below, a column per suffix; mean and range over seeds."""
    drawn, axes = panels(2, len(SUFFIXES), 9.5, 5.2)
    for column, (suffix, own) in enumerate(bands.groupby("suffix", sort=False)):
        upper, lower = axes[column], axes[len(SUFFIXES) + column]
        for name, colour, each in (
            *((f"moved_{side}", colour, upper) for side, colour in SIDE_COLOURS.items()),
            ("cosine", "#333333", lower),
        ):
            label = name.removeprefix("moved_")
            each.plot(own["step"], own[name], color=colour, lw=1.6, label=label)
            each.fill_between(
                own["step"], own[f"{name}_low"], own[f"{name}_high"], color=colour, alpha=0.2, lw=0
            )
            each.axhline(0, color="#999999", lw=0.8, zorder=0)
        upper.set_title(f"suffix: {suffix}", fontsize=10, loc="left")
        lower.set_ylim(-1, 1)
    axes[0].set_ylabel("change of log-prob, nats")
    axes[len(SUFFIXES)].set_ylabel("cosine, median of the pairs")
    axes[0].legend(fontsize=8, frameon=False)
    drawn.supxlabel("optimiser step", fontsize=10)
    save(drawn, RESULTS / "suffix.png")


def heat_map(suffix: str, result: CompareResult) -> None:
    """The first held-out pair's tokens under the fine-tuned policy that DPO starts from (first seed)."""
    start = trials_of(options(suffix))[0].run.path / "sft" / "merged"
    probe = ProbeConfig(
        model_name_or_path=str(start),
        use_peft=True,
        seed=0,
        dataset_name=str(FOLDER / suffix / "test.jsonl"),
        limit=8,
        losses=("dpo",),
        output_dir=f"runs/suffix/probe-{suffix}",
    )
    done = run_probe(probe, CONSOLE)
    index = int(done.pairs["index"].min())
    run_tokens(TokensConfig(run=str(done.folder.path), pairs=(index,), matrix=True))
    shutil.copy(done.folder.path / "tokens" / f"{index}.png", RESULTS / f"tokens-{suffix}.png")


def main() -> None:
    """Run everything that isn't there, and write the tables and figures."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    bands, finals = [], []
    for suffix in SUFFIXES:
        result = run_compare(options(suffix), CONSOLE)
        bands.append(result.bands.assign(suffix=suffix))
        finals.append(result.runs.assign(suffix=suffix))
        heat_map(suffix, result)
    table = pd.concat(bands, ignore_index=True)
    table.to_csv(RESULTS / "curves.csv", index=False, float_format="%.5g")
    last = pd.concat(finals, ignore_index=True)
    last.to_csv(RESULTS / "final.csv", index=False, float_format="%.5g")
    figure(table)
    shown = [
        "suffix",
        "seed",
        "moved_chosen",
        "moved_rejected",
        "both_fell",
        "cosine",
        "ideal",
        "both_down",
        "onset",
    ]
    print(last[shown].to_string(index=False))


if __name__ == "__main__":
    main()

"""Whose gradients move a held-out pair? The pull on other pairs' chosen responses against the push on rejected ones.

    python experiments/compare/split.py
    python experiments/pull_and_push/run.py

DPO and others as in experiments/compare/tldr.yaml: a fresh LoRA on the embedded policy, 30 AdamW steps of 4 pairs. A
held-out pair is in no batch, so neither its own score nor its partner's moves it: all of its change comes from other
pairs. The gradient of a step is the sum of its part through the chosen rows and its part through the rejected rows,
AdamW's momentum is such a sum of earlier gradients, and so, under the preconditioner P of the very step,

    change of log pi  =  <S, P (pull)>  +  <S, P (push)>  +  remainder beyond first order.

The condition of a pair (arXiv 2410.13828) holds of a set too, with mean scores in the place of scores: one SGD step
of DPO on a whole set lowers its mean chosen log-prob iff <mean S_w, mean S_l> > |mean S_w|^2. Both sides are estimated
without bias from different held-out pairs (i != j), at steps 0, 10, 20 and 30.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor

from entangle.config import ProbeConfig, parse_spec
from entangle.data import TokenizedPair, load_pairs, tokenize_pair
from entangle.figures.style import SIDE_COLOURS, panels, save
from entangle.measure.inputs import load_policy_of
from entangle.models import Policy
from entangle.runs.progress import progress_bar
from entangle.scores import Engine, make_engine, row_logps
from losses import PairLogps, PreferenceLoss, build

DATA, RESULTS = Path("runs/tldr"), Path("experiments/results/pull_and_push")
LOSSES, SEEDS = ("dpo", "simpo", "dpop", "cpo", "dpo_shift:shift=0.85"), (0, 1, 2)
STEPS, BATCH, HELD, LOOK = 30, 4, 32, 10
RATE, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
CONSOLE = Console(stderr=True)
Vectors = dict[str, Tensor]


def scored(policy: Policy, engine: Engine, pairs: list[TokenizedPair]) -> tuple[Vectors, PairLogps]:
    """Scores of all rows, `(2n, numel)` by parameter, and what a loss reads."""
    batch = policy.collate(pairs)
    chosen, rejected = row_logps(policy.model, batch).chunk(2)
    reference = policy.reference.logps(batch, pairs)
    assert reference is not None
    (length_chosen, length_rejected), (ref_chosen, ref_rejected) = (
        batch.lengths.double().chunk(2),
        reference.chunk(2),
    )
    return engine.scores(batch), PairLogps(
        chosen, rejected, length_chosen, length_rejected, ref_chosen, ref_rejected
    )


def sides(loss: PreferenceLoss, scores: Vectors, logps: PairLogps) -> tuple[Vectors, Vectors]:
    """The gradient of the batch's mean loss, through its chosen rows and through its rejected ones."""
    push = loss.incentives(logps)
    n = len(logps.chosen)
    chosen = {name: -(push.chosen.to(rows) @ rows[:n]) / n for name, rows in scores.items()}
    rejected = {name: (push.rejected.to(rows) @ rows[n:]) / n for name, rows in scores.items()}
    return chosen, rejected


def set_condition(scores: Vectors) -> dict[str, float]:
    """Cosines within and between pairs, and both sides of the condition with mean scores; unbiased (i != j)."""
    rows = torch.cat([value.double() for value in scores.values()], 1)
    gram, n = rows @ rows.T, len(rows) // 2
    norm = gram.diagonal().sqrt()
    cosine = gram / norm[:, None] / norm
    apart = ~torch.eye(n, dtype=torch.bool)
    ww, wl, ll = (slice(0, n), slice(0, n)), (slice(0, n), slice(n, None)), (slice(n, None), slice(n, None))
    return {
        "cosine_within": float(cosine[wl].diagonal().mean()),
        "cosine_chosen_chosen": float(cosine[ww][apart].mean()),
        "cosine_chosen_rejected": float(cosine[wl][apart].mean()),
        "cosine_rejected_rejected": float(cosine[ll][apart].mean()),
        "mean_sq_chosen": float(gram[ww][apart].mean()),
        "mean_inner": float(gram[wl][apart].mean()),
        "mean_sq_rejected": float(gram[ll][apart].mean()),
    }


def batches(count: int, seed: int) -> Iterator[list[int]]:
    """Places of the pairs of every step."""
    order = np.random.default_rng(seed).permutation(count)
    for step in range(STEPS):
        yield order[step * BATCH : (step + 1) * BATCH].tolist()


def run(name: str, seed: int) -> tuple[list[dict], list[dict]]:
    """Train; a row per step and side, and a row per look at the set's condition."""
    torch.manual_seed(seed)
    policy = load_policy_of(ProbeConfig(use_peft=True, seed=seed, device="cpu"))
    engine = make_engine(policy.model, policy.parameters)
    train, held = (
        [tokenize_pair(policy.tokenizer, pair, 512) for pair in load_pairs(DATA / f"{part}.jsonl")]
        for part in ("train", "test")
    )
    held, loss = held[:HELD], build(parse_spec(name))
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
    averages = [{k: torch.zeros(p.numel()) for k, p in policy.parameters.items()} for _ in range(2)]
    rows, looks = [], []
    own, logps = scored(policy, engine, held)
    with progress_bar(CONSOLE, f"{name}, seed {seed}", STEPS, 0) as advance:
        for step, places in enumerate(batches(len(train), seed), 1):
            if step % LOOK == 1:
                looks.append({"loss": name, "seed": seed, "step": step - 1} | set_condition(own))
            parts = sides(loss, *scored(policy, engine, [train[place] for place in places]))
            for k, p in policy.parameters.items():
                p.grad = (parts[0][k] + parts[1][k]).view_as(p)
            optimizer.step()
            change = torch.zeros(2, 2 * HELD, dtype=torch.float64)
            for k, p in policy.parameters.items():
                square = optimizer.state[p]["exp_avg_sq"].ravel() / (1 - BETAS[1] ** step)
                scale = RATE / (1 - BETAS[0] ** step) / (square.sqrt() + EPS)
                for average, part, moved in zip(averages, parts, change, strict=True):
                    average[k] = BETAS[0] * average[k] + (1 - BETAS[0]) * part[k]
                    moved -= own[k].double() @ (scale * average[k]).double()
            old = logps
            own, logps = scored(policy, engine, held)
            measured = torch.cat([logps.chosen - old.chosen, logps.rejected - old.rejected])
            for k, side in enumerate(("chosen", "rejected")):
                here = slice(k * HELD, (k + 1) * HELD)
                pull, push, moved = (float(x[here].mean()) for x in (change[0], change[1], measured))
                rows.append(
                    {
                        "loss": name,
                        "seed": seed,
                        "step": step,
                        "side": side,
                        "pull": pull,
                        "push": push,
                        "remainder": moved - pull - push,
                        "measured": moved,
                    }
                )
            advance(1)
    looks.append({"loss": name, "seed": seed, "step": STEPS} | set_condition(own))
    return rows, looks


def figure(rows: pd.DataFrame) -> None:
    """Cumulated pull, push and measured change of both sides, mean over seeds; a column per loss."""
    names = list(dict.fromkeys(rows["loss"]))
    drawn, axes = panels(2, len(names), 2.2 * len(names), 5.0)
    for i, side in enumerate(("chosen", "rejected")):
        for j, name in enumerate(names):
            own = rows[(rows["loss"] == name) & (rows["side"] == side)]
            sums = own.groupby("step")[["pull", "push", "remainder", "measured"]].mean().cumsum()
            each = axes[i * len(names) + j]
            for column, colour, style in (
                ("pull", "#2f855a", "-"),
                ("push", "#b7791f", "-"),
                ("remainder", "#999999", ":"),
                ("measured", SIDE_COLOURS[side], "-"),
            ):
                each.plot(
                    sums.index,
                    sums[column],
                    style,
                    color=colour,
                    lw=2.2 if column == "measured" else 1.3,
                    label=column,
                )
            each.axhline(0, color="#cccccc", lw=0.8, zorder=0)
            each.set_title(name.replace(":", "\n") if i == 0 else "", fontsize=9, loc="left")
            each.set_ylabel(f"{side}, nats" if j == 0 else "")
            each.set_xlabel("step" if i else "")
    axes[0].legend(frameon=False, fontsize=7)
    save(drawn, RESULTS / "pull_and_push.png")


def main() -> None:
    """Train what isn't there yet, and write tables and figure."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    steps, looks = RESULTS / "steps.csv", RESULTS / "condition.csv"
    tables = [pd.read_csv(path).to_dict("records") if path.exists() else [] for path in (steps, looks)]
    done = {(row["loss"], row["seed"]) for row in tables[1]}
    for seed in SEEDS:
        for name in LOSSES:
            if (name, seed) not in done:
                for table, new in zip(tables, run(name, seed), strict=True):
                    table += new
                for path, table in zip((steps, looks), tables, strict=True):
                    pd.DataFrame(table).to_csv(path, index=False, float_format="%.6g")
    rows = pd.DataFrame(tables[0])
    figure(rows)
    sums = rows.groupby(["loss", "seed", "side"], sort=False)[["pull", "push", "remainder", "measured"]].sum()
    print(sums.groupby(["loss", "side"], sort=False).agg(["mean", "min", "max"]).round(2).to_string())
    print(pd.DataFrame(tables[1]).groupby(["loss", "step"], sort=False).mean().round(3).to_string())


if __name__ == "__main__":
    main()

"""How long does a forecast hold? Real short runs beside what their first Gram matrix says.

    python experiments/compare/split.py
    python experiments/forecast/run.py            # the policy that ships with the package, a few minutes on one core
    python experiments/forecast/run.py runs/smollm2 12 1e-4 5e-4

DPO (beta 0.1) on real TL;DR pairs, posts cut after 60 words; a third of them held out. SGD without momentum at rates
that would gain 0.3 and 1 nat of margin in all steps, and AdamW (beta1 0.9) at fixed rates, whose metric is that of ten
steps before; each with a fresh LoRA (r 16; its B is 0) and with one that has been trained for twenty steps. Every
step, the mean log-probs of all pairs are measured; the horizon is the last step up to which forecast and measurement
differ by at most 20 % of the measurement (or by 0.02 nats, below which the two can't be told apart here).
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from entangle.analysis.forecast import Momentum, draw_batches, forecast, rate_for_margin
from entangle.data import TokenizedPair, load_pairs, tokenize_pair
from entangle.figures.style import SIDE_COLOURS, legend_below, panels, save
from entangle.models import Policy, load_policy
from entangle.models.adam_state import adam_state_of
from entangle.scores import make_engine, row_logps, score_gram
from entangle.scores.logps import token_logps
from losses import DPO, PairLogps

STEPS, BATCH, WARM_UP, LEARN, SEEDS = 20, 4, 10, 20, (0, 1)
LOSS, TOLERANCE, FLOOR, BETA1 = DPO(), 0.2, 0.02, 0.9


@dataclass
class Study:
    """A policy, its pairs, and the log-probs that training started from.

    Args:
        policy: with a LoRA whose parameters are trained.
        pairs: N of them.
        trained: `(M,)` int64, those that are trained on.
    """

    policy: Policy
    pairs: list[TokenizedPair]
    trained: Tensor

    def __post_init__(self) -> None:
        self.reference = self.logps()

    def logps(self) -> Tensor:
        """`(2, N)` float64, all pairs."""
        batches = [self.policy.collate(self.pairs[i : i + 8]) for i in range(0, len(self.pairs), 8)]
        parts = [row_logps(self.policy.model, batch).double().view(2, -1) for batch in batches]
        return torch.cat(parts, dim=1)

    def at(self, logps: Tensor, rows: Tensor | slice = slice(None)) -> PairLogps:
        """Log-probs of some pairs as a loss reads them."""
        lengths = torch.tensor([[len(p.chosen_ids), len(p.rejected_ids)] for p in self.pairs]).T
        own = lengths[:, rows]
        return PairLogps(logps[0], logps[1], own[0], own[1], self.reference[0, rows], self.reference[1, rows])

    def step(self, optimiser: torch.optim.Optimizer, batch: Tensor) -> None:
        """One step of DPO on a batch of pairs."""
        rows = token_logps(self.policy.model, self.policy.collate([self.pairs[i] for i in batch])).sum(-1)
        optimiser.zero_grad()
        LOSS.per_pair(self.at(rows.double().view(2, -1), batch)).mean().backward()
        optimiser.step()

    def gram(self, metric: dict[str, Tensor] | None) -> Tensor:
        """K over all pairs, `(2N, 2N)`, chosen rows first."""
        engine = make_engine(self.policy.model, self.policy.parameters)
        parts = [self.pairs[i : i + 8] for i in range(0, len(self.pairs), 8)]
        whole = score_gram(engine, [self.policy.collate(part) for part in parts], metric=metric)
        order: tuple[list[int], list[int]] = ([], [])
        start = 0
        for part in parts:
            for side in order:
                side.extend(range(start, start + len(part)))
                start += len(part)
        both = order[0] + order[1]
        return whole[both][:, both]


def study_of(model: str, count: int, is_trained: bool) -> Study:
    """The policy with a fresh LoRA, trained for some steps of AdamW or not, and `count` pairs."""
    policy = load_policy(model, use_peft=True, seed=0)
    source = load_pairs("runs/tldr/train.jsonl")[:count]
    pairs = [tokenize_pair(policy.tokenizer, pair, 1024) for pair in source]
    study = Study(policy, pairs, torch.arange(count - count // 3))
    for parameter in policy.parameters.values():
        parameter.requires_grad_(True)
    if is_trained:
        optimiser = torch.optim.AdamW(policy.parameters.values(), 1e-3, weight_decay=0.0)
        for batch in draw_batches(study.trained, BATCH, LEARN, seed=99):
            study.step(optimiser, batch)
    return study


def course(study: Study, optimiser: torch.optim.Optimizer, batches: list[Tensor]) -> Tensor:
    """Measured log-probs `(T + 1, 2, N)` of real steps; the parameters are put back afterwards."""
    before = {name: p.detach().clone() for name, p in study.policy.parameters.items()}
    path = [study.logps()]
    for batch in batches:
        study.step(optimiser, batch)
        path.append(study.logps())
    with torch.no_grad():
        for name, parameter in study.policy.parameters.items():
            parameter.copy_(before[name])
    return torch.stack(path)


def of_sgd(study: Study) -> list[pd.DataFrame]:
    """Forecast and measurement under SGD."""
    gram, found = study.gram(None), []
    start = study.at(study.logps())
    for nats, seed in itertools.product((0.3, 1.0), SEEDS):
        rate = rate_for_margin(gram, start, LOSS, study.trained, STEPS, nats=nats)
        batches = draw_batches(study.trained, BATCH, STEPS, seed)
        said = forecast(gram, start, LOSS, batches, learning_rate=rate)
        measured = course(study, torch.optim.SGD(study.policy.parameters.values(), rate), batches)
        forecast_path = torch.stack([said.chosen, said.rejected], 1)
        found.append(
            compared(study, forecast_path, measured).assign(optimiser="sgd", rate=rate, seed=seed, nats=nats)
        )
    return found


def of_adamw(study: Study, rates: list[float]) -> list[pd.DataFrame]:
    """Forecast and measurement under AdamW, its second moments those of some steps before; momentum begins anew."""
    found = []
    begin = {name: p.detach().clone() for name, p in study.policy.parameters.items()}
    for rate, seed in itertools.product(rates, SEEDS):
        optimiser = torch.optim.AdamW(study.policy.parameters.values(), rate, weight_decay=0.0)
        for batch in draw_batches(study.trained, BATCH, WARM_UP, seed + 50):
            study.step(optimiser, batch)
        for state in optimiser.state.values():
            state["exp_avg"].zero_()
        metric = adam_state_of(
            optimiser.state_dict(), study.policy.model, list(study.policy.parameters)
        ).metric(study.policy.parameters)
        gram, start = study.gram(metric), study.at(study.logps())
        batches = draw_batches(study.trained, BATCH, STEPS, seed)
        ours, torchs = (
            [1 - BETA1 ** (behind + t) for t in range(1, STEPS + 1)] for behind in (0, WARM_UP)
        )  # torch corrects the first moment by all its updates; it was set to 0 after the first ten
        said = forecast(
            gram,
            start,
            LOSS,
            batches,
            learning_rate=[rate * a / b for a, b in zip(ours, torchs, strict=True)],
            momentum=Momentum.adam(BETA1),
        )
        measured = course(study, optimiser, batches)
        forecast_path = torch.stack([said.chosen, said.rejected], 1)
        found.append(compared(study, forecast_path, measured).assign(optimiser="adamw", rate=rate, seed=seed))
        with torch.no_grad():
            for name, parameter in study.policy.parameters.items():
                parameter.copy_(begin[name])
    return found


def compared(study: Study, said: Tensor, measured: Tensor) -> pd.DataFrame:
    """Mean changes since the start by step, split and side, both ways."""
    is_trained = torch.zeros(len(study.pairs), dtype=torch.bool)
    is_trained[study.trained] = True
    rows = []
    for split, pairs in (("trained", is_trained), ("held_out", ~is_trained)):
        for name, weights in (("chosen", (1.0, 0.0)), ("rejected", (0.0, 1.0)), ("margin", (1.0, -1.0))):
            both = []
            for path in (said, measured):
                moved = (path - path[0])[:, :, pairs].mean(-1)
                both.append(weights[0] * moved[:, 0] + weights[1] * moved[:, 1])
            rows += [
                {"split": split, "of": name, "step": t, "forecast": float(a), "measured": float(b)}
                for t, (a, b) in enumerate(zip(*both, strict=True))
            ]
    return pd.DataFrame(rows)


def horizon(course: pd.DataFrame) -> int:
    """The last step up to which forecast and measurement differ by at most 20 % (or 0.02 nats)."""
    apart = (course["forecast"] - course["measured"]).abs() > np.maximum(
        TOLERANCE * course["measured"].abs(), FLOOR
    )
    return int(course.loc[apart, "step"].min()) - 1 if apart.any() else int(course["step"].max())


def main() -> None:
    """Run the studies of one model, write the table, the horizons and a figure."""
    model = sys.argv[1] if len(sys.argv) > 1 else "embedded"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 48
    rates = [float(rate) for rate in sys.argv[3:]] or [1e-4, 1e-3]
    results = Path("experiments/results/forecast") / Path(model).name
    results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = []
    for is_trained in (False, True):
        study = study_of(model, count, is_trained)
        lora = "trained" if is_trained else "fresh"
        found += [table.assign(lora=lora) for table in (*of_sgd(study), *of_adamw(study, rates))]
        print(lora, "done", flush=True)
    table = pd.concat(found, ignore_index=True)
    table.to_parquet(results / "courses.parquet")
    keys = ["lora", "optimiser", "rate", "seed", "split", "of"]
    rows = [
        dict(zip(keys, key, strict=True))
        | {"horizon": horizon(part)}
        | part.loc[part["step"] == STEPS, ["forecast", "measured"]].iloc[0].to_dict()
        for key, part in table.groupby(keys, sort=False)
    ]
    horizons = pd.DataFrame(rows)
    horizons.to_csv(results / "horizons.csv", index=False, float_format="%.4g")
    print(horizons.to_string(float_format=lambda value: f"{value:.3g}"))
    figure(table, results / "courses.png")


def figure(table: pd.DataFrame, file: Path) -> None:
    """Forecast (dashed) beside measurement of the held-out pairs, seed 0, a panel per setting."""
    shown = table[(table["split"] == "held_out") & (table["seed"] == SEEDS[0])]
    settings = list(shown.groupby(["lora", "optimiser", "rate"], sort=False))
    figure, axes = panels(2, (len(settings) + 1) // 2, 12.0, 6.0, sharex=False)
    for each, ((lora, optimiser, rate), part) in zip(axes, settings, strict=False):
        for side, colour in SIDE_COLOURS.items():
            course = part[part["of"] == side]
            each.plot(course["step"], course["measured"], "-", color=colour, label=f"{side}, measured")
            each.plot(course["step"], course["forecast"], "--", color=colour, label=f"{side}, forecast")
        each.set_title(f"{lora} LoRA, {optimiser}, lr {rate:.2g}", fontsize=9, loc="left")
    axes[0].set_ylabel("change, nats")
    legend_below(figure)
    save(figure, file)


if __name__ == "__main__":
    main()

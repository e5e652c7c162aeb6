"""The ledger: steps taken apart exactly, parts that add up, causes that are what they claim to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from entangle.analysis.ledger import PARTS, account, cumulate, describe_change, over_time, products
from entangle.data import TokenizedPair, collate
from entangle.figures.ledger import stacked, write_figures
from entangle.figures.style import figure_of, new_axes
from entangle.scores.autograd import AutogradEngine
from entangle.scores.logps import row_logps, token_logps
from entangle.scores.rows import RowBatch
from entangle.training import EntanglementCallback, TrainingError
from entangle.training.optimizer_steps import check_optimizer, read_step
from losses import DPO, PairLogps
from tests.architectures import tiny_model
from tests.training import runs
from tests.training.callback_runs import train

OPTIMISERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adamw": (AdamW, {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}),
    "adamw_fused": (AdamW, {"lr": 1e-2, "weight_decay": 0.1, "fused": True}),
    "adamw_foreach": (AdamW, {"lr": 1e-2, "foreach": True}),
    "adam_coupled_decay": (Adam, {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}),
    "sgd": (SGD, {"lr": 0.1}),
    "sgd_decay": (SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd_momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd_dampened": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "sgd_nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_is_what_the_optimiser_then_does(name: str) -> None:
    """An identity, at t = 1 and later, per parameter."""
    kind, options = OPTIMISERS[name]
    parameters = {n: nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for n in ("a", "b", "unused")}
    optimiser = kind(list(parameters.values()), **options)
    for _ in range(4):
        for n in ("a", "b"):
            parameters[n].grad = torch.randn(3, 4, dtype=torch.float64)
        coming = read_step(optimiser, parameters)
        before = {n: p.detach().clone() for n, p in parameters.items()}
        optimiser.step()
        assert set(coming) == {"a", "b"}
        for n, part in coming.items():
            assert torch.allclose(part.delta, parameters[n].detach() - before[n], rtol=0, atol=1e-12)
            assert torch.allclose(part.fresh, -part.metric * parameters[n].grad, rtol=0, atol=1e-15)


def test_adamw_doesnt_see_the_scale_of_the_first_gradient() -> None:
    """At t = 1 the step is sign descent as eps -> 0, whatever the loss's scale."""
    steps = []
    for scale in (1.0, 1000.0):
        p = nn.Parameter(torch.ones(5, dtype=torch.float64))
        p.grad = scale * torch.linspace(-1, 2, 5, dtype=torch.float64)
        steps.append(read_step(AdamW([p], lr=0.1, eps=1e-30, weight_decay=0.0), {"p": p})["p"].delta)
    assert torch.allclose(*steps)


def test_an_unknown_optimiser_is_refused() -> None:
    p = nn.Parameter(torch.zeros(2))
    for optimiser in (torch.optim.Adagrad([p]), AdamW([p], amsgrad=True)):
        with pytest.raises(TrainingError, match="adamw_torch"):
            check_optimizer(optimiser)


PAIRS = [
    TokenizedPair(0, [3, 4, 5], [6, 7, 2], [8, 2]),
    TokenizedPair(1, [9, 4], [6, 10, 11, 2], [6, 12, 2]),
    TokenizedPair(2, [13, 4, 5, 6], [7, 2], [14, 15, 2]),
    TokenizedPair(3, [3, 9], [16, 2], [17, 18, 2]),
]
"""The first three are trained on, the last is held out."""


class Accounted:
    """Steps of a hand-written loop in float64 over two micro-batches, with the last step's ledger."""

    def __init__(self, optimiser: str, lr: float, clip: float, steps: int) -> None:
        self.model = tiny_model("gpt2")  # float64 all the way through
        self.parameters = {n: p for n, p in self.model.named_parameters() if ".h.0." in n}
        for p in self.model.parameters():
            p.requires_grad_(any(p is own for own in self.parameters.values()))
        self.engine = AutogradEngine(self.model, self.parameters)
        kind, options = OPTIMISERS[optimiser]
        own = kind(list(self.parameters.values()), **options)
        probed = collate(PAIRS, 0)
        for step in range(steps):
            if step == steps - 1:  # histories are equal; only the last step's size differs
                for group in own.param_groups:
                    group["lr"] *= lr
            own.zero_grad()
            self.upstream = torch.zeros(4, 2).double()
            for micro in ([0, 1], [2]):
                self.upstream[micro] += self._backward(collate([PAIRS[i] for i in micro], 0)).view(2, -1).T
            norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), clip)
            self.clip = min(1.0, clip / (float(norm) + 1e-6))
            self.step = read_step(own, self.parameters)
            self.scores = self.engine.scores(probed)
            found = products(self.scores, self.step)
            before = row_logps(self.model, probed)
            own.step()
            self.measured = (row_logps(self.model, probed) - before).view(2, -1).T
            self.parts = account(found, self.upstream, self.clip, self.measured)

    def _backward(self, batch: RowBatch) -> Tensor:
        """Loss / 2 accumulation steps; u of the micro-batch's rows."""
        logps = token_logps(self.model, batch).sum(1)
        logps.retain_grad()
        chosen, rejected = logps.chunk(2)
        start = torch.zeros_like(chosen.detach())
        lengths = batch.lengths.chunk(2)
        loss = DPO(beta=1.0).per_pair(PairLogps(chosen, rejected, *lengths, start, start)).mean() / 2
        loss.backward()
        assert logps.grad is not None
        return logps.grad

    def gram(self) -> Tensor:
        """K[a, b] = <S_a, M S_b> over the eight rows, written out."""
        return sum((rows * self.step[name].metric.ravel()) @ rows.T for name, rows in self.scores.items())  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("optimiser", ["adamw", "adam_coupled_decay", "sgd_momentum", "sgd_nesterov"])
@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_every_part_is_what_it_says(optimiser: str, clip: float) -> None:
    """Own, partner and others against the Gram matrix under the step's metric; the rest against the step itself."""
    run = Accounted(optimiser, 1.0, clip, steps=3)
    assert (run.clip < 1) == (clip < 1)
    gram, upstream = run.gram(), run.upstream.T.flatten()  # rows: chosen, then rejected
    effect = -gram * upstream  # of row b on row a
    own, rows = effect.diagonal(), torch.arange(8)
    partner = effect[rows, (rows + 4) % 8]
    expected = {"own": own, "partner": partner, "others": effect.sum(1) - own - partner}
    expected["clipping"] = (run.clip - 1) * effect.sum(1)
    for name, direction in (("momentum", "momentum"), ("decay", "decay")):
        expected[name] = sum(
            scores @ getattr(run.step[n], direction).ravel() for n, scores in run.scores.items()
        )
    for name, value in expected.items():
        assert torch.allclose(run.parts[name], value.view(2, -1).T, rtol=1e-9, atol=1e-12), name
    assert torch.allclose(sum(run.parts.values()), run.measured, rtol=0, atol=1e-12)  # pyright: ignore[reportArgumentType]
    assert not run.parts["own"][3].any() and not run.parts["partner"][3].any()  # held out
    assert run.parts["own"][0].abs().min() > 0 and run.parts["momentum"].abs().min() > 0
    assert set(run.parts) == set(PARTS)


@pytest.mark.parametrize("optimiser", ["adamw", "sgd_momentum"])
def test_the_remainder_is_of_second_order(optimiser: str) -> None:
    """Halving the last step's learning rate divides it by four."""
    whole, half, quarter = (
        Accounted(optimiser, lr, 0.05, steps=3).parts["remainder"] for lr in (0.02, 0.01, 0.005)
    )
    for larger, smaller in ((whole, half), (half, quarter)):
        assert torch.allclose(larger / smaller, torch.full((4, 2), 4.0).double(), rtol=0.1)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(ledger, steps) of a run with clipping, decay and accumulation, over training pairs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ledger")
    args = {
        "max_steps": 8,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.4,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    train(folder, EntanglementCallback(6, every=8, ledger=True), args=args)
    return tuple(pd.read_parquet(folder / "entangle" / f"{kind}.parquet") for kind in ("ledger", "steps"))  # pyright: ignore[reportReturnType]


def test_a_runs_parts_add_up_and_chain(kept: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    ledger, steps = kept
    assert len(ledger) == 8 * 6 * 2
    assert (ledger[list(PARTS)].sum(axis=1) - ledger["measured"]).abs().max() < 1e-12
    assert ledger["remainder"].abs().max() < 0.1 * ledger["measured"].abs().max()
    assert ledger["clipping"].abs().min() > 0 and ledger["decay"].abs().max() > 0
    trained = ledger[ledger["side"] == "chosen"].groupby("index")["in_batch"].sum()
    assert trained.tolist() == [2] * 6  # 8 steps of 4 pairs are two epochs
    away = ledger[~ledger["in_batch"]]
    assert not away["own"].any() and not away["partner"].any()
    sums = cumulate(ledger)
    assert sums["unaccounted"].abs().max() < 1e-9
    for side in ("chosen", "rejected"):
        by_step = steps.set_index(["step", "index"])[f"logps_{side}"]
        change = by_step.loc[8] - by_step.loc[0]
        total = sums[sums["side"] == side].set_index("index")["total"]
        assert (total - change).abs().max() < 1e-4


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_alone_in_the_batch_a_pair_has_no_others(optim: str, tmp_path: Path) -> None:
    """Upstream gradients carry every scale of the loss: with copies of one pair nothing is left for others."""
    one = runs.pairs(1)
    data = Dataset.from_list([one[0]] * 8)
    args = {
        "optim": optim,
        "max_steps": 2,
        "max_grad_norm": 0.3,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
    }
    train(tmp_path, EntanglementCallback(1, ledger=True), args=args, train_dataset=data)
    ledger = pd.read_parquet(tmp_path / "entangle" / "ledger.parquet")
    assert ledger["in_batch"].all() and ledger["own"].abs().min() > 0
    assert (ledger["others"].abs() < 1e-4 * ledger["own"].abs() + 1e-7).all()


def test_skipped_steps_are_unaccounted_for(tmp_path: Path) -> None:
    train(tmp_path, EntanglementCallback(3, every=6, ledger=True, ledger_every=2))
    ledger, steps = (
        pd.read_parquet(tmp_path / "entangle" / f"{kind}.parquet") for kind in ("ledger", "steps")
    )
    assert ledger["step"].unique().tolist() == [2, 4, 6]
    sums = cumulate(ledger)
    assert sums["unaccounted"].abs().min() > 1e-3
    last = ledger[ledger["step"] == 6].set_index(["index", "side"])
    end = steps[steps["step"] == 6].set_index("index")["logps_chosen"]
    reached = (last["logps"] + last["measured"]).xs("chosen", level="side")
    assert (reached - end).abs().max() < 1e-4
    assert "doesn't cover" in describe_change(ledger)


def test_what_the_ledger_cant_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="weighs tokens"):
        train(tmp_path, EntanglementCallback(2, ledger=True), loss={"name": "ld_dpo", "alpha": 0.5})
    with pytest.raises(TrainingError, match="Adagrad"):
        train(tmp_path, EntanglementCallback(2, ledger=True), args={"optim": "adagrad"})


def made_up() -> pd.DataFrame:
    """Two pairs, two steps: pair 7's chosen log-prob falls by 3, mostly through its partner."""
    rows = []
    for step in (1, 2):
        for index, partner in ((7, -2.0), (8, 0.5)):
            for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
                parts = dict.fromkeys(PARTS, 0.0) | {"own": 0.5 * sign, "partner": partner * sign}
                measured = sum(parts.values())
                logps = -10.0 + (step - 1) * measured
                facts = {"step": step, "index": index, "side": side, "in_batch": step == 1, "logps": logps}
                rows.append(facts | {"measured": measured} | parts)
    return pd.DataFrame(rows)


def test_sums_and_sentence() -> None:
    ledger = made_up()
    pair = ledger[ledger["index"] == 7]
    assert cumulate(pair)[["total", "partner", "steps"]].values.tolist() == [[-3.0, -4.0, 2], [3.0, 4.0, 2]]
    assert describe_change(pair) == (
        "The chosen log-prob (pair 7) fell by 3 nats in 2 steps: -4 from its partner (the other response of its pair), "
        "+1 from its own score."
    )
    assert describe_change(ledger, "rejected").startswith(
        "The rejected log-prob (2 pairs, on average) rose by 0.5 nats"
    )
    assert over_time(ledger, "chosen")["partner"].tolist() == [-0.75, -1.5]


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ledger = made_up()
    axes = stacked(new_axes(), ledger[ledger["index"] == 7], "chosen")
    line = axes.lines[0]
    assert line.get_xdata().tolist() == [0, 1, 2] and line.get_ydata().tolist() == [0.0, -1.5, -3.0]
    assert "pair 7" in axes.get_title(loc="left")
    labels = [text.get_text() for text in figure_of(axes).legends[0].get_texts()]
    assert len(labels) == 3 and "momentum" not in " ".join(labels)
    for name in write_figures(ledger, tmp_path):
        assert (tmp_path / name).stat().st_size > 1000

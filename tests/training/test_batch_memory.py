"""Products across batches: unbiased for the set's block where a batch's own block isn't, and exact on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor

from entangle.analysis.cross_batch import EFFECTS, WINDOW, live_course, window_geometry
from entangle.analysis.sets import SetGeometry
from entangle.scores.terms import Dense, OneHot, Outer
from entangle.training.live import BatchRecorder
from entangle.training.memory import BatchMemory, batch_memory
from entangle.training.optimizer_steps import innermost
from tests.training import runs

WIDTH, BATCH = 8, 4
MEANS = torch.stack([torch.linspace(0.2, 1.0, WIDTH), torch.linspace(1.0, -0.4, WIDTH)])
METRIC = torch.linspace(0.5, 2.0, WIDTH)


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores `(2n, WIDTH)` of fresh pairs, noisy around `MEANS`, and weights: all known, incentives 0.5 and 0.25."""
    noise = 3.0 * torch.randn(2, BATCH, WIDTH, generator=generator)
    scores = (MEANS[:, None] + noise).flatten(0, 1)
    applied = torch.tensor([0.5, 0.25]).repeat_interleave(BATCH) / BATCH
    return scores, torch.stack([torch.ones(2 * BATCH), applied])


def linear_run(steps: int, seed: int, forget: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """E of every step of a run on a linear model, and the batches' own blocks."""
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.zeros(WIDTH, 1)
    memory = BatchMemory({"theta": parameter}, 0.9, lambda name: METRIC)
    across, own = [], []
    for step in range(steps):
        scores, weights = batch(generator)
        if forget and step % forget == 0:
            memory.forget()
        memory.count(BATCH)
        memory.add("theta", [Dense(scores[..., None])], weights)
        means = scores.view(2, BATCH, WIDTH).mean(1)
        own.append((means * METRIC) @ (means * torch.tensor([[0.5], [0.25]])).T)
        if (found := memory.close()) is not None:
            assert found[0] == BATCH
            across.append(torch.tensor(found[1]))
    return across, own


def test_products_across_batches_are_unbiased_and_a_batchs_own_are_not() -> None:
    """The exact block is <mean S, P mean d S>; the batch's own one adds the scores' variance over the batch."""
    across, own = linear_run(4000, seed=1)
    exact = (MEANS * METRIC) @ (MEANS * torch.tensor([[0.5], [0.25]])).T
    assert len(across) == 3999
    values = torch.stack(across)
    error = values.std(0) / len(values) ** 0.5 * 4  # M is common to neighbours
    assert ((values.mean(0) - exact).abs() < 4 * error).all()
    assert error.max() < 0.2
    biased = torch.stack(own).mean(0) - exact
    variance = 9.0 / BATCH * METRIC.sum() * torch.tensor([0.5, 0.25])
    assert torch.allclose(biased.diagonal(), variance.to(biased), rtol=0.1)


def test_the_memory_is_the_average_of_earlier_steps() -> None:
    """E by hand from M = sum_s (1 - b) b^(t-1-s) G_s over its weights; an epoch's end empties it."""
    across, _ = linear_run(6, seed=2)
    generator = torch.Generator().manual_seed(2)
    drawn = [batch(generator) for _ in range(6)]
    halves = [(w[1, :, None] * s).view(2, BATCH, WIDTH).sum(1) for s, w in drawn]
    for step in range(1, 6):
        shares = torch.tensor([0.9 ** (step - 1 - s) for s in range(step)])
        memory = torch.einsum("s,sdp->dp", shares / shares.sum(), torch.stack(halves[:step]))
        means = drawn[step][0].view(2, BATCH, WIDTH).mean(1)
        assert torch.allclose(across[step - 1], (means * METRIC) @ memory.T, rtol=1e-4)
    assert len(linear_run(9, seed=2, forget=3)[0]) == 6  # the first step of each epoch has no memory


def test_intervals_of_a_window_cover_the_effect_of_its_memory() -> None:
    """Drift intervals of 200 simulated windows hold the drift of a fixed memory about 95 times in 100."""
    generator = np.random.default_rng(0)
    block = np.array([[1.0, 0.6], [0.6, 1.1]])
    chosen, rejected = block[0] @ (1, -1), block[1] @ (1, -1)
    exact = (chosen + rejected) / (2 * (chosen - rejected))
    held = []
    for _ in range(200):
        values = block + 0.15 * generator.standard_normal((WINDOW, 2, 2))
        rows = pd.DataFrame(values.reshape(WINDOW, 4), columns=list(EFFECTS))
        geometry = window_geometry(rows.assign(step=range(WINDOW), pairs=4))
        assert geometry is not None
        drift = geometry.move(1.0, 1.0).drift
        held.append(drift.low <= exact <= drift.high)
    assert 0.91 <= np.mean(held) <= 0.99


def test_a_windows_numbers_by_hand() -> None:
    """Means over steps weighted by pairs; Student's interval; rows and columns of E where they belong."""
    rows = pd.DataFrame([[2.0, 1.0, 0.5, 4.0]] * 5 + [[4.0, 1.0, 0.5, 4.0]] * 5, columns=list(EFFECTS))
    rows = rows.assign(step=[1, 2, 3, 4, 5] * 2, pairs=[1] * 5 + [3] * 5)  # two processes
    geometry = window_geometry(rows)
    assert geometry is not None
    assert geometry.products.flatten().tolist() == pytest.approx([3.5, 1.0, 0.5, 4.0])
    assert geometry.pairs == 20
    assert [end.value for end in geometry.band] == pytest.approx([1.0 / 3.5, 8.0])
    move = geometry.move(1.0, 1.0)
    assert [move.chosen.value, move.rejected.value] == pytest.approx([2.5, -3.5])
    assert move.drift.value == pytest.approx(-1 / 12)
    assert window_geometry(rows[rows["step"] < 4]) is None and live_course(rows)["step"].tolist() == [4, 5]
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    blocks = values[:, None, None] * torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    found = SetGeometry.from_batches(blocks, torch.full((4,), 7)).move(1.0, 0.0).chosen
    half = stats.t.ppf(0.975, 3) * values.std().item() / 2
    assert (found.low, found.high) == (pytest.approx(4.0 - half), pytest.approx(4.0 + half))


@pytest.mark.parametrize("form", ["outer", "one_hot", "one_hot_right"])
def test_factored_scores_count_as_written_out_ones(form: str) -> None:
    generator = torch.Generator().manual_seed(4)
    left = torch.randn(4, 5, 3, generator=generator)
    right = torch.randn(4, 5, 6, generator=generator)
    index = OneHot(torch.randint(3, (4, 5), generator=generator), 3)
    term = {
        "outer": Outer(left, right),
        "one_hot": Outer(index, right),
        "one_hot_right": Outer(right, index),
    }[form]
    shape = (term.left.shape[-1], term.right.shape[-1])
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.5, 0.1, 0.2, 0.3]])
    found = []
    for terms in ([term], [Dense(term.write_out(0, shape[0]))]):
        memory = BatchMemory({"w": torch.zeros(shape)}, 0.5, lambda name: None)
        for _ in range(2):
            memory.count(2)
            memory.add("w", terms, weights)
            closed = memory.close()
        assert closed is not None
        found.append(torch.tensor(closed[1]))
    assert torch.allclose(*found, rtol=1e-5)


def gradients(done: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Scores of all rows of a batch by plain autograd, `(2n, parameters)`."""
    logps, _ = runs.plain_logps(done.model, inputs)
    trained = [p for p in done.model.parameters() if p.requires_grad]
    return torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(logp, trained, retain_graph=True)])
            for logp in logps
        ]
    )


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_effects_on_a_real_model_are_those_of_plain_autograd(optim: str, tmp_path: Path) -> None:
    """Two steps of accumulation 2 with TRL's trainer; the second step's E from autograd and the optimiser's state."""
    done: Any = runs.trainer(tmp_path, args={"optim": optim, "gradient_accumulation_steps": 2})
    done.create_optimizer_and_scheduler(2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in done.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    done.current_gradient_accumulation_steps = 2
    done.model.train()
    optimizer = innermost(done.optimizer)
    memory = batch_memory(done.model, optimizer)
    assert memory is not None and memory.decay == 0.9
    recorder = BatchRecorder(done.model, geometry=False, memory=memory)
    forward = done.model.__dict__.get("forward")
    halves, found = torch.zeros(2, 1), None
    signs = torch.tensor([-1.0, 1.0])
    for step, batches in enumerate(([[0, 3], [5, 9]], [[1, 2, 4], [6, 7, 8]])):
        scores, applied = [], []
        for rows in batches:
            inputs = runs.collated(done, rows)
            with recorder.paused():
                done.model.__dict__.pop("forward", None)
                scores.append(gradients(done, inputs))
                done.model.zero_grad()
            if forward is not None:
                done.model.forward = forward
        for rows in batches:
            done.training_step(done.accelerator.prepare_model(done.model), dict(runs.collated(done, rows)))
        for seen in recorder.take():
            assert seen.upstream is not None
            applied.append(seen.upstream)
        found = memory.close()
        mine = [s.view(2, -1, s.shape[1]) for s in scores]
        if step == 0:
            assert found is None
            parts = zip(applied, mine, strict=True)
            halves = torch.stack(
                [torch.einsum("s,sn,snp->sp", signs, u.view(2, -1), s) for u, s in parts]
            ).sum(0)
            optimizer.step()
            optimizer.zero_grad()
            continue
        assert found is not None and found[0] == 6
        means = torch.cat(mine, 1).mean(1)
        trained = [p for p in done.model.parameters() if p.requires_grad]
        metric = torch.ones(means.shape[1])
        if optim == "adamw_torch":
            squares = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in trained])
            metric = 1 / ((squares / (1 - 0.999)).sqrt() + 1e-8)
        expected = (means * metric) @ halves.T
        assert torch.allclose(torch.tensor(found[1]).float(), expected, rtol=2e-3, atol=1e-6)
    recorder.remove()

"""Steered steps: the optimiser's own where nothing is corrected, the law's where it is, and resumable to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from entangle.analysis.cross_batch import (
    centre_factor,
    common_share,
    drift_factor,
    edge_factor,
    steady_factor,
)
from entangle.analysis.mitigations import DriftFree, Mitigation, SetBand, Steering, build_mitigation
from entangle.analysis.sets import SetGeometry
from entangle.errors import ConfigError
from entangle.scores.terms import Dense
from entangle.training.mitigated import MitigatedTrainer
from entangle.training.optimizer_steps import innermost
from entangle.training.steering import HALF, Steered
from tests.processes import run_on_two
from tests.training import runs

ABSTAINING = SetBand(window=10**6)
"""Decides nothing before `FEWEST` steps, and its window never ends."""


def geometry(blocks: Tensor) -> SetGeometry:
    return SetGeometry.from_batches(blocks, torch.ones(len(blocks), dtype=torch.int64))


def effects(block: Tensor, k: float) -> tuple[float, float]:
    """What a step with the chosen half times k does to the mean chosen and the mean rejected log-prob."""
    (a, b), (c, d) = block.tolist()
    return k * a - b, k * c - d


# --- the controller's mathematics ---


def test_factors_keep_a_set_in_its_band() -> None:
    """Random blocks of 2 x 2 products of mean scores: inside the band both move as they should, at every target."""
    generator = torch.Generator().manual_seed(0)
    closed = 0
    for _ in range(300):
        means = torch.rand(1, 5, generator=generator) + 0.6 * torch.randn(2, 5, generator=generator)
        block = (means @ means.T).double() * torch.tensor([0.05, 0.07], dtype=torch.float64)
        for k in (edge_factor(block), centre_factor(block)):
            up, down = effects(block, k)
            assert up > -1e-9 and down < 1e-9
        (a, b), (c, d) = block.tolist()
        if b > 0:
            low, high = b / a, d / c
            assert centre_factor(block) == pytest.approx(math.sqrt(low * high))
            inset = math.log(high / low) / 4
            edge = math.log(edge_factor(block))
            assert math.log(low) + inset - 1e-9 <= edge <= math.log(high) - inset + 1e-9
            is_inside = math.log(low) + inset <= 0 <= math.log(high) - inset
            assert (edge == 0) is is_inside
            closed += not is_inside
            for drift in (-0.3, 0.0, 0.4):
                up, down = effects(block, drift_factor(block, drift))
                assert (up + down) / (2 * (up - down)) == pytest.approx(drift, abs=1e-6)
    assert 50 < closed < 250


def test_a_closed_band_has_a_middle_and_a_broken_one_none() -> None:
    closed = torch.tensor(
        [[1.0, 2.0], [2.0, 1.0]]
    ).double()  # low 2, high 1/2: below Cauchy's reach, by noise
    assert edge_factor(closed) == centre_factor(closed) == pytest.approx(1.0)
    for block in ([[-1.0, 2.0], [2.0, 1.0]], [[1.0, 2.0], [2.0, -1.0]]):
        assert math.isnan(edge_factor(torch.tensor(block))) and math.isnan(centre_factor(torch.tensor(block)))


def test_it_abstains_while_the_interval_covers_everything() -> None:
    block = torch.tensor([[1.0, 1.5], [1.2, 2.4]]).double()
    noise = torch.randn(8, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    assert steady_factor(centre_factor, geometry(block + 0.01 * noise)) == pytest.approx(
        math.sqrt(1.5 * 2.0), rel=0.02
    )
    assert steady_factor(centre_factor, geometry(block + 3 * noise)) == 1.0
    far = block * torch.tensor([[1.0, 9.0], [1.0, 9.0]]) + 0.01 * noise
    assert steady_factor(centre_factor, geometry(far)) == pytest.approx(4.0)


def test_the_common_share_stops_what_it_is_asked_to() -> None:
    """D - a G sums to zero over both means, or leaves the chosen one where it is; nothing where it rises anyway."""
    block = torch.tensor([[1.0, 1.6, 2.0, 1.0], [1.2, 2.4, 1.5, 1.1]]).double()
    noise = 1e-3 * torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(1)).double()
    found = geometry(block + noise)
    step, gain = block[:, 0] - block[:, 1], block[:, 2] + block[:, 3]
    assert common_share(found, of_chosen=False) == pytest.approx(float(step.sum() / gain.sum()), rel=1e-2)
    assert common_share(found, of_chosen=True) == pytest.approx(float(step[0] / gain[0]), rel=1e-2)
    rising = block.clone()
    rising[0, 0] = 5.0
    assert common_share(geometry(rising + noise), of_chosen=True) == 0.0
    assert common_share(geometry(block + 1e4 * noise), of_chosen=False) == 0.0


def test_options_that_make_no_sense_are_refused() -> None:
    for spec in ("set_band:target=middle", "set_band:window=3", "drift_free:of=rejected"):
        with pytest.raises(ConfigError):
            build_mitigation(spec)
    assert build_mitigation("set_band:target=drift,drift=0.2") == SetBand(target="drift", drift=0.2)
    assert build_mitigation("drift_free:of=chosen") == DriftFree(of="chosen")


# --- the optimiser's step in two halves ---


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "adam": lambda p: Adam(p, lr=0.01, betas=(0.8, 0.99)),
    "sgd": lambda p: SGD(p, lr=0.01),
    "momentum": lambda p: SGD(p, lr=0.01, momentum=0.9, dampening=0.2),
    "nesterov": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True),
}


class Linear(nn.Module):
    """A model whose log-probs are linear in its one parameter, so that scores are what we say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1, bias=False)
        self.layer.weight.data = torch.linspace(-1, 1, width)[None]

    @property
    def theta(self) -> Any:
        """The parameter."""
        return self.layer.weight


class Forced(SetBand):
    """Takes a k of 1.7, whatever the products say."""

    def factor(self, geometry: SetGeometry) -> float:
        return 1.7


class ForcedShare(DriftFree):
    """Takes out 0.2 of the common direction, whatever the products say."""

    def share(self, geometry: SetGeometry) -> float:
        return 0.02


def feed(steered: Steered, model: Linear, scores: Tensor, d: tuple[float, float]) -> dict[str, float]:
    """A step's backward pass on pairs of these scores `(2, n, width)`: its gradient, and what is told of it."""
    n = scores.shape[1]
    applied = torch.tensor(d).repeat_interleave(n) / n
    model.theta.grad = (
        -(applied.view(2, n, 1) * scores * torch.tensor([1.0, -1.0])[:, None, None]).sum((0, 1))
    )[None]
    steered.memory.count(n)
    steered.memory.add(
        "layer.weight", [Dense(scores.flatten(0, 1)[:, None])], torch.stack([torch.ones(2 * n), applied])
    )
    steered._recorder.take = lambda: [None]  # pyright: ignore  # the batch was told of by hand
    return steered.prepare(1.0, lambda value: value)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_that_of_the_weighted_momentum(name: str) -> None:
    """From the fifth step on theta moves by the optimiser's rule for k m_chosen + m_rejected, under the plain v."""
    generator = torch.Generator().manual_seed(5)
    model, plain = Linear(6), Linear(6)
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](plain.parameters())
    steered = Steered(Forced(), optimizer, model, {})
    chosen_halves, gradients = [], []
    for step in range(7):
        scores = torch.randn(2, 3, 6, generator=generator) + 1.0
        found = feed(steered, model, scores, (0.5, 0.3))
        chosen_halves.append(-0.5 * scores[0].mean(0))
        assert model.theta.grad is not None
        gradients.append(model.theta.grad[0].clone())
        before = model.theta.detach().clone()
        plain.theta.data.copy_(before)
        plain.theta.grad = model.theta.grad.clone()
        optimizer.step()
        other.step()
        k = 1.7 if step >= 4 else 1.0  # the first step has no memory, the next three make a window
        assert found["set/k"] == pytest.approx(k)
        if k == 1.0:
            assert torch.equal(model.theta, plain.theta)
            continue
        group = optimizer.param_groups[0]
        if "betas" in group:
            b1, b2 = group["betas"]
            m = sum((1 - b1) * b1 ** (step - s) * h for s, h in enumerate(chosen_halves))
            v = sum((1 - b2) * b2 ** (step - s) * g**2 for s, g in enumerate(gradients))
            t = step + 1
            along = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"])
        else:
            mu, share = group["momentum"], 1 - group["dampening"]
            buffer = chosen_halves[0]
            for h in chosen_halves[1:]:
                buffer = mu * buffer + share * h
            along = chosen_halves[-1] + mu * buffer if group["nesterov"] or not mu else buffer
        expected = plain.theta[0] - 0.01 * 0.7 * along
        torch.testing.assert_close(model.theta[0], expected, rtol=1e-5, atol=1e-6)
    steered.remove()


def test_the_memory_is_of_one_epoch() -> None:
    """Micro-batches of the epoch go on with it, the first one of the next forgets it once; the window stays."""
    model, state = Linear(6), {}
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    steered = Steered(SetBand(), optimizer, model, state)
    weights = []
    for epoch in (0, 0, 1, 1, 1):
        steered.enter(epoch)
        weights.append(steered.memory.weight)
        feed(steered, model, torch.ones(2, 3, 6), (0.5, 0.3))
        optimizer.step()
    assert weights == pytest.approx([0.0, 0.1, 0.0, 0.1, 0.19])
    assert len(state["window"]) == 3
    resumed = Steered(SetBand(), optimizer, model, state)
    resumed.enter(1)
    assert resumed.memory.weight == steered.memory.weight and resumed.memory.averages
    resumed.enter(2)
    assert resumed.memory.weight == 0.0 and not resumed.memory.averages


POPULATION = 64


def population() -> Tensor:
    """Scores of a population of pairs, `(2, POPULATION, 12)`: mean scores nearly parallel, the rejected one longer."""
    generator = torch.Generator().manual_seed(8)
    common = torch.randn(12, generator=generator)
    apart = 0.25 * torch.randn(2, 12, generator=generator)
    means = torch.stack([common, 1.5 * common]) + apart
    return means[:, None] + 0.7 * torch.randn(2, POPULATION, 12, generator=generator)


def mean_effects(rule: Steering | None, optimizer: str, steps: int = 300) -> Tensor:
    """What the steps of a run did to both mean log-probs of the population, nats per step, exactly; after 50 steps."""
    scores, generator = population(), torch.Generator().manual_seed(9)
    model, means = Linear(12), scores.mean(1)
    made = OPTIMIZERS[optimizer](model.parameters())
    steered = Steered(rule or ABSTAINING, made, model, {})
    if rule is None:
        steered._decide = dict  # pyright: ignore[reportAttributeAccessIssue]  # never corrects
    total = torch.zeros(2)
    for step in range(steps):
        if step % (POPULATION // 4) == 0:
            order = torch.randperm(POPULATION, generator=generator)
        here = order[4 * (step % (POPULATION // 4)) :][:4]  # pyright: ignore[reportPossiblyUnboundVariable]
        steered.enter(step // (POPULATION // 4))
        feed(steered, model, scores[:, here], (0.05, 0.05))
        before = model.theta.detach().clone()
        made.step()
        if step >= 50:
            total += means @ (model.theta.detach() - before)[0]
    return total / (steps - 50)


@pytest.mark.parametrize("optimizer", ["fused", "adam", "sgd", "momentum"])
def test_real_steps_move_the_populations_means_as_promised(optimizer: str) -> None:
    """Plainly both means fall; in the band they part; at a drift of 0.3 they do that; drift-free they mirror."""
    up, down = mean_effects(None, optimizer).tolist()
    assert up < 0 and down < 0
    margin = up - down
    for target in ("edge", "centre"):
        up, down = mean_effects(SetBand(target=target, window=16), optimizer).tolist()
        assert up > 0 > down
    up, down = mean_effects(SetBand(target="drift", drift=0.3, window=16), optimizer).tolist()
    assert (up + down) / (2 * (up - down)) == pytest.approx(0.3, abs=0.2)
    up, down = mean_effects(DriftFree(window=16), optimizer).tolist()
    assert up - down > 0.2 * margin and abs(up + down) / (2 * (up - down)) < 0.2
    up, down = mean_effects(DriftFree(of="chosen", window=16), optimizer).tolist()
    assert down < 0 and abs(up) < 0.1 * abs(down)


# --- in TRL's trainer ---


def trained(folder: Path, rule: Mitigation | None, resume: Any = None, **args: Any) -> Any:
    options: dict[str, Any] = {"max_steps": 9, "per_device_train_batch_size": 2} | args
    if rule is None:
        done: Any = runs.trainer(folder, args=options)
    else:
        done = runs.trainer(folder, MitigatedTrainer, mitigation=rule, args=options)
    done.train(resume_from_checkpoint=resume)
    return done


@pytest.mark.parametrize(
    "args",
    [
        {"optim": "adamw_torch"},
        {"optim": "adamw_torch_fused", "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"optim": "sgd", "optim_args": "momentum=0.9", "bf16": True, "gradient_checkpointing": True},
    ],
    ids=["adamw", "accumulation", "sgd"],
)
def test_a_run_that_corrects_nothing_is_the_plain_run(args: dict[str, Any], tmp_path: Path) -> None:
    """Up to the fourth step with a memory nothing is known: equal bits. Later the steered run is another one."""
    plain = trained(tmp_path / "plain", None, **args | {"max_steps": 4})
    quiet = trained(tmp_path / "quiet", SetBand(), **args | {"max_steps": 4})
    assert runs.digest(plain.model) == runs.digest(quiet.model)
    assert runs.logged(quiet, "entangle/set/k") == [1.0] * 4
    assert runs.logged(plain, "loss") == runs.logged(quiet, "loss")
    for rule in (SetBand(target="drift", drift=0.4, window=4), DriftFree(window=4)):
        steered = trained(tmp_path / "steered", rule, **args)
        whole = trained(tmp_path / "whole", None, **args)
        name = "entangle/set/k" if isinstance(rule, SetBand) else "entangle/set/common_share"
        is_corrected = any(value != (name == "entangle/set/k") for value in runs.logged(steered, name))
        assert is_corrected is (runs.digest(steered.model) != runs.digest(whole.model))
    assert not any(m._forward_hooks for n, m in quiet.model.named_modules() if n.endswith("lora_A.default"))


@pytest.mark.parametrize("rule", [Forced(window=4), ForcedShare(window=4)], ids=["set_band", "drift_free"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_a_resumed_run_equals_an_unbroken_one(rule: Mitigation, optim: str, tmp_path: Path) -> None:
    """Resumed in the middle of an epoch and after one: weights, window and halves are those of the unbroken run."""
    args = {"optim": optim, "save_strategy": "steps", "save_steps": 5, "max_steps": 14}
    whole = trained(tmp_path, rule, **args)
    for step in (5, 10):
        resumed = trained(tmp_path, rule, str(tmp_path / f"checkpoint-{step}"), **args)
        assert runs.digest(resumed.model) == runs.digest(whole.model)
        kept = [done.state.stateful_callbacks[rule.name] for done in (whole, resumed)]
        assert kept[0] == kept[1] and len(kept[0]["window"]) == 4
    plain = trained(tmp_path / "plain", None, **args | {"save_strategy": "no"})
    assert runs.digest(whole.model) != runs.digest(plain.model)
    if isinstance(rule, SetBand):
        state = innermost(whole.optimizer).state
        assert all(HALF in state[p] for p in whole.model.parameters() if p.requires_grad)


def test_the_chosen_half_is_the_gradients(tmp_path: Path) -> None:
    """With clipping and accumulation: chosen half and what is left add up to the clipped gradient of SFT-like parts."""
    rule = SetBand()
    done: Any = runs.trainer(
        tmp_path,
        MitigatedTrainer,
        mitigation=rule,
        args={"max_steps": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "optim": "sgd"},
    )
    batches = [dict(runs.collated(done, rows)) for rows in ([0, 1, 2], [3, 4, 5])]
    trained = [p for p in done.model.parameters() if p.requires_grad]
    done.model.train()
    halves = []
    for side in (0, 1):
        total = [torch.zeros_like(p) for p in trained]
        for inputs in batches:
            logps, _ = runs.plain_logps(done.model, inputs)  # at the reference d = beta / 2 of every pair
            value = -(0.05 * logps.chunk(2)[side]).mean() / 2
            grads = torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True)
            total = [a + b for a, b in zip(total, grads, strict=True)]
        halves.append(total)
    norm = torch.stack([(a - b).norm() for a, b in zip(*halves, strict=True)]).norm()
    done.create_optimizer_and_scheduler(1)
    done.current_gradient_accumulation_steps = 2
    for number, inputs in enumerate(batches):
        done.accelerator.gradient_state._set_sync_gradients(number == 1)
        done.training_step(done.accelerator.prepare_model(done.model), inputs)
    names = [name for name, p in done.model.named_parameters() if p.requires_grad]
    found = [done._steered._chosen[name] for name in names]
    for mine, half in zip(found, halves[0], strict=True):
        torch.testing.assert_close(mine.view_as(half), half * 0.05 / float(norm), rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_two_processes_steer_as_one(tmp_path: Path) -> None:
    """DDP on gloo: equal weights on both ranks, and k is that of one process with the same batches."""
    import json

    run_on_two("tests.training.ddp_steering_run", str(tmp_path))
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert len({digest for digest, _ in answer}) == 1
    single = trained(
        tmp_path / "single", SetBand(window=4), gradient_accumulation_steps=2, dataloader_drop_last=True
    )
    for _, factors in answer:
        assert factors == pytest.approx(runs.logged(single, "entangle/set/k"), rel=0.05)

"""From a loss to the parameters and back: incentives rebuild its gradient, and real steps go where they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from entangle.measure.verification import pair_logps
from entangle.scores import AutogradEngine, row_logps, token_logps
from entangle.scores.rows import RowBatch
from losses import CATALOGUE, DPO, PreferenceLoss, SimPO, build
from tests.architectures import random_batch, tiny_model

PAIRS = 4
LOSSES = [loss for loss in map(build, CATALOGUE) if not loss.needs_tokens]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """GPT-2 shaped: float64 all the way through."""
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def batch() -> RowBatch:
    return random_batch(prompts=PAIRS, seed=4)


@pytest.fixture(scope="module")
def reference(model: nn.Module, batch: RowBatch) -> Tensor:
    """Log-probs of a reference somewhat apart from the policy, so that no loss sits on a kink."""
    noise = torch.randn(2 * PAIRS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return row_logps(model, batch) + noise


def mean_loss(model: nn.Module, batch: RowBatch, reference: Tensor, loss: PreferenceLoss) -> Tensor:
    logps = token_logps(model, batch).sum(1, dtype=torch.float64)
    return loss.per_pair(pair_logps(batch, logps, reference)).mean()


def signed_incentives(model: nn.Module, batch: RowBatch, reference: Tensor, loss: PreferenceLoss) -> Tensor:
    """The vector u = (d_w, -d_l) / N, `(2N,)`, in the order of the rows."""
    incentives = loss.incentives(pair_logps(batch, row_logps(model, batch), reference))
    return torch.cat([incentives.chosen, -incentives.rejected]) / PAIRS


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_gradient_of_the_loss_is_minus_the_scores_times_the_incentives(loss, model, batch, reference):
    """The law grad loss = -G^T u for a batch of pairs, to 1e-12 of its size; u^T K u = |grad loss|^2."""
    parameters = dict(model.named_parameters())
    gradient = torch.autograd.grad(
        mean_loss(model, batch, reference, loss), list(parameters.values()), allow_unused=True
    )
    u = signed_incentives(model, batch, reference, loss)
    engine = AutogradEngine(model, parameters)
    scores = engine.scores(batch)
    square = 0.0
    for (name, parameter), actual in zip(parameters.items(), gradient, strict=True):
        expected = -(u @ scores[name]).view_as(parameter)
        actual = torch.zeros_like(parameter) if actual is None else actual
        size = max(float(expected.abs().max()), float(u.abs().max() * scores[name].abs().max()), 1e-300)
        assert float((actual - expected).abs().max()) <= 1e-12 * size
        square += float((actual * actual).sum())
    assert float(u @ engine.gram(batch) @ u) == pytest.approx(square, rel=1e-9)


def sgd(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate)


def adamw(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate / 30, eps=1e-3)


@pytest.mark.parametrize("loss", [DPO(beta=1.0), SimPO(beta=2.0)], ids=lambda loss: loss.name)
@pytest.mark.parametrize("optimiser", [sgd, adamw])
def test_error_of_the_prediction_falls_by_four_when_the_true_step_is_halved(
    loss, optimiser, batch, reference
):
    """For any optimiser: <score, delta> along its true step delta, and along half of it, in [3.8, 4.2]."""
    model = tiny_model("gpt2")
    delta = true_step(model, optimiser, lambda: mean_loss(model, batch, reference, loss))
    predicted = AutogradEngine(model, dict(model.named_parameters())).products(batch, delta)
    before = row_logps(model, batch)

    def error(scale: float) -> Tensor:
        moved = {name: p.detach() + scale * delta[name] for name, p in model.named_parameters()}
        return row_logps_at(model, moved, batch) - before - scale * predicted

    full, half = error(1.0), error(0.5)
    assert float(predicted.abs().min()) > 0 and float(full.abs().max()) > 1e-9
    assert 3.8 < float(full.norm() / half.norm()) < 4.2


def true_step(model: nn.Module, optimiser: Callable, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """theta_new - theta_old of one optimiser step; the model is left as it was."""
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss().backward()
    optimiser(list(model.parameters()), 1e-3).step()
    delta = {name: p.detach() - old[name] for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(old[name])
            p.grad = None
    return delta


def row_logps_at(model: nn.Module, parameters: dict[str, Tensor], batch: RowBatch) -> Tensor:
    """Row log-probs of the model with other parameters."""

    class At(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return row_logps(self.model, batch)

    with torch.no_grad():
        return functional_call(At(), {f"model.{name}": value for name, value in parameters.items()})

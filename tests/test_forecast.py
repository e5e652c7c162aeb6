"""The recursion over log-probs is training itself, where log-probs are linear in the parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from entangle.analysis.forecast import Forecast, Momentum, draw_batches, forecast
from losses import AOT, DPO, IPO, TDPO1, DPOShift, MissingTokens, PairLogps, PreferenceLoss, SimPO

N, HELD_OUT, STEPS = 12, 4, 50


def problem() -> tuple[Tensor, Tensor, PairLogps]:
    """Scores `(2N, 40)`, start of the log-probs `(2N,)`, and the same as a batch of pairs."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2 * N, 40, generator=generator).double()
    start = -20 * torch.rand(2 * N, generator=generator).double()
    reference = start + 0.1 * torch.randn(2 * N, generator=generator).double()
    lengths = torch.randint(3, 9, (2, N), generator=generator)
    return scores, start, PairLogps(start[:N], start[N:], *lengths, reference[:N], reference[N:])


def trained(
    loss: PreferenceLoss,
    batches: list[Tensor],
    optimiser: Callable[[Tensor], torch.optim.Optimizer],
    metric: Tensor,
) -> Tensor:
    """Log-probs `(T + 1, 2N)` of training theta by torch's own optimiser on log-probs start + S P^(1/2) theta."""
    scores, start, logps = problem()
    scores = scores * metric.sqrt()
    theta = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    steps, path = optimiser(theta), [start]
    for batch in batches:
        steps.zero_grad()
        at = start + scores @ theta
        rows = logps[batch]
        now = PairLogps(
            at[batch],
            at[N + batch],
            rows.length_chosen,
            rows.length_rejected,
            rows.ref_chosen,
            rows.ref_rejected,
        )
        loss.per_pair(now).mean().backward()
        steps.step()
        path.append((start + scores @ theta).detach())
    return torch.stack(path)


class Average(torch.optim.Optimizer):
    """Adam's first moment alone, its start corrected; P is in the scores."""

    def __init__(self, parameters: list[Tensor], lr: float, beta1: float) -> None:
        super().__init__(parameters, {"lr": lr, "beta1": beta1})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["m"] = group["beta1"] * state.get("m", 0.0) + (1 - group["beta1"]) * p.grad
                state["t"] = state.get("t", 0) + 1
                p -= group["lr"] * state["m"] / (1 - group["beta1"] ** state["t"])


CASES = {
    "sgd": (Momentum.sgd(), lambda lr: lambda p: torch.optim.SGD([p], lr)),
    "momentum": (Momentum.sgd(0.9), lambda lr: lambda p: torch.optim.SGD([p], lr, momentum=0.9)),
    "adam": (Momentum.adam(0.9), lambda lr: lambda p: Average([p], lr, 0.9)),
}


@pytest.mark.parametrize(
    "loss", [DPO(beta=0.5), SimPO(), IPO(), DPOShift(), AOT()], ids=lambda loss: loss.name
)
@pytest.mark.parametrize("case", list(CASES))
def test_is_training_where_log_probs_are_linear(case: str, loss: PreferenceLoss) -> None:
    """50 steps, held-out rows included, in a metric that isn't 1; batch-coupled losses too."""
    momentum, optimiser = CASES[case]
    scores, _, logps = problem()
    metric = torch.rand(40, generator=torch.Generator().manual_seed(1)).double() + 0.5
    batches = draw_batches(torch.arange(N - HELD_OUT), 3, STEPS)
    wanted = trained(loss, batches, optimiser(1e-3), metric)
    found = forecast(scores * metric @ scores.T, logps, loss, batches, learning_rate=1e-3, momentum=momentum)
    path = torch.cat([found.chosen, found.rejected], 1)
    assert (path - wanted).abs().max() < 1e-12 * wanted.abs().max()
    assert (path[-1] - path[0]).abs().max() > 1e-3
    assert found.is_trained.tolist() == [True] * (N - HELD_OUT) + [False] * HELD_OUT


def test_a_schedule_and_a_pair_twice_in_a_batch() -> None:
    scores, _, logps = problem()
    batches = [torch.tensor([0, 0, 1])] * 4
    rates = [1e-3, 5e-4, 0.0, 1e-3]
    found = forecast(scores @ scores.T, logps, DPO(), batches, learning_rate=rates)
    assert torch.equal(found.chosen[2], found.chosen[3])
    theta, at = torch.zeros(40).double(), torch.cat([logps.chosen, logps.rejected])
    for rate in rates:
        now = PairLogps(
            at[:N], at[N:], logps.length_chosen, logps.length_rejected, logps.ref_chosen, logps.ref_rejected
        )
        push = DPO().incentives(now)
        for pair in (0, 0, 1):
            theta = theta + rate / 3 * (
                push.chosen[pair] * scores[pair] - push.rejected[pair] * scores[N + pair]
            )
        at = torch.cat([logps.chosen, logps.rejected]) + scores @ theta
    torch.testing.assert_close(torch.cat([found.chosen[-1], found.rejected[-1]]), at, rtol=1e-12, atol=1e-12)


def test_means_of_trained_and_held_out_pairs() -> None:
    path = torch.tensor([[1.0, 3.0, 8.0], [2.0, 4.0, 9.0]]).double()
    found = Forecast(path, -path, torch.tensor([True, True, False]))
    assert found.means()[0].tolist() == [2, 3] and found.means(held_out=True)[1].tolist() == [-8, -9]


def test_batches_are_epochs() -> None:
    pairs = torch.arange(10) + 5
    batches = draw_batches(pairs, 3, 7, seed=1)
    assert len(batches) == 7 and len(torch.cat(batches[:3]).unique()) == 9
    assert set(torch.cat(batches).tolist()) <= set(pairs.tolist())
    assert all(map(torch.equal, batches, draw_batches(pairs, 3, 7, seed=1)))
    assert not torch.equal(batches[0], draw_batches(pairs, 3, 7, seed=2)[0])


def test_refusals() -> None:
    scores, _, logps = problem()
    gram, batches = scores @ scores.T, draw_batches(torch.arange(N), 2, 3)
    with pytest.raises(ValueError, match=r"Gram matrix \(24, 24\) and 3 learning rates; got \(23, 24\)"):
        forecast(gram[1:], logps, DPO(), batches, learning_rate=1e-3)
    with pytest.raises(ValueError, match="and 2"):
        forecast(gram, logps, DPO(), batches, learning_rate=[1e-3, 1e-3])
    with pytest.raises(ValueError, match="decay in"):
        Momentum.sgd(1.0)
    with pytest.raises(ValueError, match="from 1 to the 12 pairs; got 13"):
        draw_batches(torch.arange(N), 13, 1)
    with pytest.raises(MissingTokens):
        forecast(gram, logps, TDPO1(), batches, learning_rate=1e-3)

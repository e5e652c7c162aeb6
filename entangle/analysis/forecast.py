"""Training in function space: what a run would do to all log-probs, from a Gram matrix alone.

With K = S P S^T over the rows (chosen and rejected responses of all pairs, held-out ones too) and f their log-probs, a
step of an optimiser with momentum on a batch of b pairs is

    u = (d_w, -d_l)(f) / b on the batch's rows        h <- mu h + nu K u        f <- f + lr h

which is exact as long as log-probs are linear in the parameters along the way: **it holds while the kernel holds**.
The kernel of a real model moves: at usual learning rates it may be another within a handful of steps, and while LoRA's
B = 0 half of it is still to come. How far a forecast can be believed must be shown by a real run beside it; without one
it is a what-if of the first steps (`HORIZON`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entangle.errors import ConfigError
from losses import PairLogps, PreferenceLoss

HORIZON = 1.0
"""Nats that the trained pairs' mean log-probs and margin may have moved: up to there forecasts agreed with real runs
(`experiments/forecast`, SGD and AdamW, fresh and trained LoRA, held-out means within 20 %), and at a high learning rate
no longer beyond."""


@dataclass(frozen=True)
class Momentum:
    """How an optimiser turns gradients into steps, apart from its metric P.

    Args:
        decay: share of the memory that is kept from step to step.
        is_mean: whether the memory is a moving average with its start corrected, as Adam's first moment, instead of
            PyTorch's sum as in SGD.

    Raises:
        ValueError: decay isn't in [0, 1).
    """

    decay: float = 0.0
    is_mean: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"Momentum needs a decay in [0, 1); got {self.decay}.")

    @classmethod
    def sgd(cls, momentum: float = 0.0) -> Momentum:
        """torch.optim.SGD: m <- momentum m + g."""
        return cls(momentum)

    @classmethod
    def adam(cls, beta1: float = 0.9) -> Momentum:
        """AdamW's first moment under a frozen P: m <- beta1 m + (1 - beta1) g, divided by 1 - beta1^t."""
        return cls(beta1, is_mean=True)


PLAIN = Momentum()
"""No memory: the step is the gradient's."""


@dataclass(frozen=True)
class Forecast:
    """Log-probs of N pairs before every step and after the last one.

    Args:
        chosen: `(T + 1, N)` float64, nats.
        rejected: the same for the rejected responses.
        is_trained: `(N,)` bool; the others are held out.
    """

    chosen: Tensor
    rejected: Tensor
    is_trained: Tensor

    def means(self, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Mean chosen and rejected log-prob, `(T + 1,)` each, of the trained or the held-out pairs; NaN without any."""
        pairs = self.is_trained != held_out
        return self.chosen[:, pairs].mean(1), self.rejected[:, pairs].mean(1)


def forecast(
    gram: Tensor,
    logps: PairLogps,
    loss: PreferenceLoss,
    batches: Sequence[Tensor],
    *,
    learning_rate: float | Sequence[float],
    momentum: Momentum = PLAIN,
) -> Forecast:
    """Train on `batches` in function space.

    Weight decay and gradient clipping aren't in it; loss hyper-parameters are the loss's own.

    Args:
        gram: K, `(2N, 2N)`, in the optimiser's metric: chosen rows first, then rejected.
        logps: where the run starts, with reference, lengths and what else the loss reads; `(N,)` each.
        loss: any loss on summed log-probs.
        batches: pairs of every step, int64 (see `draw_batches`); pairs in none of them are held out.
        learning_rate: of all steps, or of each.
        momentum: see `Momentum`.

    Raises:
        ValueError: shapes don't fit.
        losses.MissingTokens: the loss weighs tokens, whose scores K doesn't hold.

    Examples:
        >>> import torch
        >>> from losses import DPO, PairLogps
        >>> at, lengths = torch.tensor([-9.0]), torch.tensor([5])
        >>> pair = PairLogps(at, at - 1, lengths, lengths, at, at - 1)
        >>> kernel = torch.tensor([[2.0, 1.3], [1.3, 1.0]])  # both will rise: A > c > B
        >>> found = forecast(kernel, pair, DPO(), [torch.tensor([0])] * 2, learning_rate=1.0)
        >>> [[round(value, 4) for value in curve.tolist()] for curve in found.means()]
        [[-9.0, -8.965, -8.93], [-10.0, -9.985, -9.97]]
    """
    n, steps = len(logps.chosen), len(batches)
    rates = [learning_rate] * steps if isinstance(learning_rate, int | float) else list(learning_rate)
    if gram.shape != (2 * n, 2 * n) or len(rates) != steps:
        raise ValueError(
            f"Expected a Gram matrix {(2 * n, 2 * n)} and {steps} learning rates; got {tuple(gram.shape)} and "
            f"{len(rates)}."
        )
    kernel, at = gram.double(), torch.cat([logps.chosen, logps.rejected]).double()
    memory, path = torch.zeros_like(at), [at]
    is_trained = torch.zeros(n, dtype=torch.bool)
    gain = 1 - momentum.decay if momentum.is_mean else 1.0
    for step, (batch, rate) in enumerate(zip(batches, rates, strict=True), start=1):
        now = replace(logps[batch], chosen=at[batch], rejected=at[n + batch])
        incentives = loss.incentives(now)
        upstream = torch.zeros_like(at)
        upstream.index_add_(0, batch, incentives.chosen.double() / len(batch))
        upstream.index_add_(0, n + batch, -incentives.rejected.double() / len(batch))
        memory = momentum.decay * memory + gain * (kernel @ upstream)
        correction = 1 - momentum.decay**step if momentum.is_mean else 1.0
        at = at + rate / correction * memory
        path.append(at)
        is_trained[batch] = True
    chosen, rejected = torch.stack(path).split(n, 1)
    return Forecast(chosen, rejected, is_trained)


def rate_for_margin(
    gram: Tensor,
    logps: PairLogps,
    loss: PreferenceLoss,
    pairs: Tensor,
    steps: int,
    momentum: Momentum = PLAIN,
    nats: float = 1.0,
) -> float:
    """The learning rate at which the trained pairs' mean margin would grow by `nats`, at its first speed.

    With u of one step on all M trained pairs: nats / (T mean(K u on chosen rows - K u on rejected rows)), and with a
    momentum that sums (1 - decay) times that.

    Args:
        gram: K, `(2N, 2N)`.
        logps: where the run starts, `(N,)` each.
        loss: any loss on summed log-probs.
        pairs: `(M,)` int64, those that are trained on.
        steps: T.
        momentum: of the optimiser.
        nats: growth of log pi(chosen) - log pi(rejected).

    Raises:
        ConfigError: under this loss the mean margin doesn't grow.
    """
    n = len(logps.chosen)
    incentives = loss.incentives(logps[pairs])
    upstream = torch.zeros(2 * n, dtype=torch.float64)
    upstream[pairs] = incentives.chosen.double() / len(pairs)
    upstream[n + pairs] = -incentives.rejected.double() / len(pairs)
    chosen, rejected = (gram.double() @ upstream).split(n)
    speed = float((chosen - rejected)[pairs].mean())
    if not speed > 0:
        raise ConfigError(
            f"Under {loss.label} the mean margin doesn't grow at the start, so no learning rate makes it grow. Give "
            "--learning_rate."
        )
    return nats / (steps * speed) * (1.0 if momentum.is_mean else 1 - momentum.decay)


def draw_batches(pairs: Tensor, batch_size: int, steps: int, seed: int = 0) -> list[Tensor]:
    """Batches of pairs without replacement, epoch after epoch, each shuffled anew; an epoch's remainder is left out.

    Args:
        pairs: `(M,)` int64, the pairs to train on.
        batch_size: pairs per step, at most M.
        steps: T.
        seed: of the shuffling.

    Raises:
        ValueError: a batch would hold more pairs than there are.
    """
    if not 0 < batch_size <= len(pairs):
        raise ValueError(f"Expected a batch size from 1 to the {len(pairs)} pairs; got {batch_size}.")
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        order = pairs[torch.randperm(len(pairs), generator=generator)]
        batches += [batch for batch in order.split(batch_size) if len(batch) == batch_size]
    return batches[:steps]

"""TRL's trainer with a mitigation: what `entangle.analysis.mitigations` says, put into a training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from entangle.analysis.mitigations import (
    Mitigation,
    Rescaling,
    Select,
    Sequential,
    Side,
    Splitting,
    Steering,
    TokenMasking,
    Vector,
    VirtualSplitting,
    backward_scaled,
    kept_tokens,
)
from entangle.scores import Engine, make_engine
from entangle.scores.rows import RowBatch
from entangle.scores.tokens import token_products
from entangle.training.metrics import incentives
from entangle.training.optimizer_steps import innermost
from entangle.training.steering import Steered
from entangle.training.trainer import PreferenceTrainer, TrainingError
from entangle.training.virtual_adamw import VirtualAdamW
from losses import Incentives, PairLogps, PreferenceLoss


class MitigatedTrainer(PreferenceTrainer):
    """PreferenceTrainer with one mitigation. The loss's value and the logged metrics stay those of the loss.

    Scores (for norms and token masks) are exact and come from a pass of the engine over the micro-batch before its
    forward pass. Every process works on its own pairs; a moving average is one for all processes. Logged in addition,
    as means over pairs: `entangle/log_factor_chosen` and `entangle/log_factor_rejected` (rescaling),
    `entangle/dropped_tokens` (masking, share); of a steered step `entangle/set/k` or `entangle/set/common_share`, and
    `entangle/set/step_drift`, what it is then foretold to do to fresh pairs, nats of both log-probs per nat of margin.

    Args:
        arguments: as for PreferenceTrainer.
        mitigation: what is changed.
        options: as for PreferenceTrainer.

    Raises:
        TrainingError: the mitigation doesn't fit the loss, the optimiser or the way of training.
    """

    def __init__(self, *arguments: Any, mitigation: Mitigation, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.mitigation = mitigation
        check_mitigations([mitigation], self.loss, self.args)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise TrainingError(f"{mitigation.name} needs whole parameters: not FSDP, not DeepSpeed.")
        self._norms: tuple[Tensor, Tensor] | None = None
        self._kept: Tensor | None = None
        self._window: list[tuple[dict[str, Any], Incentives]] = []
        self._steered: Steered | None = None

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As in TRL; the hooks of a steered run are taken off at its end."""
        try:
            return super().train(*arguments, **options)
        finally:
            if self._steered is not None:
                self._steered.remove()
                self._steered = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        """As in PreferenceTrainer; in training, scores are measured first."""
        self._norms = self._kept = None
        if self._is_training:
            if isinstance(self.mitigation, Rescaling):
                geometry = self._engine.pairs(row_batch(inputs)).geometry
                self._norms = geometry.sq_chosen.sqrt(), geometry.sq_rejected.sqrt()
            elif isinstance(self.mitigation, TokenMasking):
                self._kept = masked_tokens(self._engine, row_batch(inputs), self.mitigation)
        return super().compute_loss(model, inputs, *rest, **options)

    def _pair_logps(self, output: Any, inputs: dict[str, Any]) -> PairLogps:
        if self._kept is not None:
            rows = output.log_probs[:, -self._kept.shape[1] :]
            output.log_probs = backward_scaled(rows, self._kept.to(rows))
            scored = row_batch(inputs).scored
            self._note("dropped_tokens", 1 - self._kept[scored.cpu()].float().mean())
        logps = super()._pair_logps(output, inputs)
        if not self._is_training or isinstance(self.mitigation, TokenMasking | Steering):
            return logps
        found = incentives(self.loss, logps)
        if isinstance(self.mitigation, Splitting):
            self._window.append((inputs, found))
            return logps
        assert isinstance(self.mitigation, Rescaling) and self._norms is not None
        # kept in the trainer's state, so that a checkpoint has it
        state = self.state.stateful_callbacks.setdefault(self.mitigation.name, {})  # pyright: ignore
        norms = [norm.to(logps.chosen) for norm in self._norms]
        chosen, rejected = self.mitigation.factors(found, norms[0], norms[1], state, self._total)
        self._note("log_factor_chosen", chosen.log().mean())
        self._note("log_factor_rejected", rejected.log().mean())
        return replace(
            logps,
            chosen=backward_scaled(logps.chosen, chosen),
            rejected=backward_scaled(logps.rejected, rejected),
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Tensor:
        """As in TRL; after a step's last micro-batch its gradient is put in place, or its correction worked out."""
        if isinstance(self.mitigation, Steering):
            return self._steered_step(self.mitigation, model, inputs, *rest, **options)
        loss = super().training_step(model, inputs, *rest, **options)
        if isinstance(self.mitigation, Splitting) and self.accelerator.sync_gradients:
            self._split(self.mitigation)
            self._window = []
        return loss

    def _steered_step(self, rule: Steering, model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
        policy: Any = self.model
        if self._steered is None:  # the optimiser is there by now, and so is what a checkpoint kept
            state = self.state.stateful_callbacks.setdefault(rule.name, {})  # pyright: ignore
            self._steered = Steered(rule, innermost(self.optimizer), policy, state)
        self._steered.enter(int(self.state.epoch or 0))
        loss = super().training_step(model, *arguments, **options)
        if self.accelerator.sync_gradients:
            gradient = [p.grad for p in policy.parameters() if p.grad is not None]
            clip = clipped_share(gradient, self.args.max_grad_norm)
            for name, value in self._steered.prepare(clip, self._mean).items():
                self._metrics["train"][f"entangle/{name}"].append(value)
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """TRL's optimiser, or the one that virtual splitting needs with its parameter groups."""
        optimizer = super().create_optimizer(model)
        if isinstance(self.mitigation, VirtualSplitting) and self.mitigation.k != 0:
            optimizer = self.optimizer = self._virtual = VirtualAdamW(optimizer.param_groups)
        return optimizer

    @property
    def _is_training(self) -> bool:
        policy: Any = self.model
        return policy.training

    @cached_property
    def _engine(self) -> Engine:
        policy: Any = self.model
        return make_engine(policy, {n: p for n, p in policy.named_parameters() if p.requires_grad})

    def _total(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum")  # pyright: ignore[reportReturnType]

    def _mean(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        total: Any = self.accelerator.reduce(value.to(self.accelerator.device), "mean")
        return total.to(value.device)

    def _note(self, name: str, value: Tensor) -> None:
        self._metrics["train"][f"entangle/{name}"].append(float(value))

    def _split(self, mitigation: Splitting) -> None:
        """Replace the window's gradient by the split step's (sequential), or tell the optimiser q_stage (virtual)."""
        policy: Any = self.model
        trained = [p for p in policy.parameters() if p.grad is not None]
        total, rate = [p.grad for p in trained], self._get_learning_rate()

        def gradient(side: Side, displacement: Vector | None) -> Vector:
            with displaced(trained, displacement):
                return self._half_gradient(side, trained)

        if isinstance(mitigation, Sequential):
            coin = Random(f"{self.args.seed} {self.state.global_step}")
            for parameter, part in zip(
                trained, mitigation.step_gradient(total, gradient, rate, coin), strict=True
            ):
                parameter.grad = part
        elif isinstance(mitigation, VirtualSplitting) and mitigation.k != 0:
            stage = mitigation.stage(total, gradient, rate)
            share = clipped_share(
                total, self.args.max_grad_norm
            )  # what the trainer will do to q, done to q_stage
            self._virtual.stage = {p: share * part for p, part in zip(trained, stage, strict=True)}

    def _half_gradient(self, side: Side, trained: Sequence[nn.Parameter]) -> Vector:
        """g+ or g- of the window's batch at the parameters as they are, the incentives being frozen."""
        total = [torch.zeros_like(p) for p in trained]
        policy: Any = self.model
        for inputs, found in self._window:
            with self.compute_loss_context_manager():
                rows = self._forward(policy, inputs).log_probs[:, -(inputs["input_ids"].shape[1] - 1) :]
            halves = rows.sum(1).chunk(2)
            value = (found.chosen * halves[0]) if side == "chosen" else (found.rejected * halves[1])
            grads = torch.autograd.grad(
                -value.mean() / len(self._window), trained, allow_unused=True, materialize_grads=True
            )
            total = [part + more for part, more in zip(total, grads, strict=True)]
        if self.accelerator.num_processes > 1:
            total = [self.accelerator.reduce(part, "mean") for part in total]  # pyright: ignore
        return total  # pyright: ignore[reportReturnType]


def check_mitigations(
    mitigations: Sequence[Mitigation], loss: PreferenceLoss, args: TrainingArguments
) -> Mitigation | None:
    """The one mitigation that changes gradients, if there is one; refuses what makes no sense together.

    Args:
        mitigations: what a run asks for.
        loss: the trained loss.
        args: the trainer's.

    Raises:
        TrainingError: names what doesn't fit, and what would.
    """
    changing = [item for item in mitigations if not isinstance(item, Select)]
    if len(changing) > 1 or len(mitigations) - len(changing) > 1:
        raise TrainingError(
            "At most one mitigation that changes gradients, and one select; got "
            f"{', '.join(item.name for item in mitigations)}."
        )
    if not changing:
        return None
    (mitigation,) = changing
    if loss.needs_tokens and not isinstance(mitigation, TokenMasking):
        raise TrainingError(
            f"{mitigation.name} acts on a pair's two incentives, and {loss.label} has one for every token. Take "
            "token_masking, or a loss without token weights."
        )
    if not loss.needs_tokens and not _has_rejected_half(loss):
        raise TrainingError(
            f"{mitigation.name} weighs chosen against rejected; {loss.label} has no rejected half."
        )
    if isinstance(mitigation, Splitting | Steering):
        _check_optimizer(mitigation, args)
    return mitigation


def _check_optimizer(mitigation: Splitting | Steering, args: TrainingArguments) -> None:
    optim = str(getattr(args.optim, "value", args.optim))
    if not optim.startswith(mitigation.optimizers):
        raise TrainingError(
            f"{mitigation.name} is made for optim {', '.join(mitigation.optimizers)}; got {optim!r}. "
            "sequential belongs to SGD, virtual_splitting to Adam, set_band and drift_free to either."
        )
    if args.fp16:
        raise TrainingError(
            f"{mitigation.name} needs unscaled gradients; fp16 scales them. Take bf16 or float32."
        )


def clipped_share(gradient: Vector, max_norm: float) -> float:
    """The factor min(1, C / (|gradient| + 1e-6)) that clipping multiplies by; 1 where C = 0 means no clipping.

    Args:
        gradient: a tensor per parameter.
        max_norm: C.
    """
    norm = torch.stack([part.norm() for part in gradient]).norm()
    return min(1.0, max_norm / (float(norm) + 1e-6)) if max_norm else 1.0


def _has_rejected_half(loss: PreferenceLoss) -> bool:
    """Whether the loss has an incentive in the rejected response at some ordinary pair."""
    chosen, rejected = torch.linspace(-30.0, -10.0, 5), torch.linspace(-12.0, -25.0, 5)
    lengths = torch.full((5,), 8)
    pairs = PairLogps(chosen, rejected, lengths, lengths, chosen - 1, rejected - 1, score_gap=torch.ones(5))
    return bool(loss.incentives(pairs).rejected.any())


def row_batch(inputs: Mapping[str, Any]) -> RowBatch:
    """A batch of TRL's collator as the engines take it."""
    mask = inputs["completion_mask"]
    prompt_length = (inputs["attention_mask"] * (1 - mask)).sum(1)[: len(mask) // 2]
    return RowBatch(inputs["input_ids"], inputs["attention_mask"], mask, prompt_length)


def masked_tokens(engine: Engine, batch: RowBatch, rule: TokenMasking) -> Tensor:
    """Which tokens take part in the backward pass, `(rows, T - 1)` bool on the CPU; see `TokenMasking`.

    Args:
        engine: of the trained parameters.
        batch: B pairs: chosen rows first, then rejected.
        rule: how many may be dropped, and in how many rounds.
    """
    count = len(batch.prompt_length)
    kept = batch.scored.cpu()
    todo = [i for i in _entangled(engine, batch) if bool(batch.lengths[i] and batch.lengths[count + i])]
    contributions = {i: _contributions(engine, batch, i) for i in todo}
    for share in rule.shares():
        if not todo:
            break
        for i in todo:
            for row, values in zip((i, count + i), contributions[i], strict=True):
                kept[row, batch.scored[row].cpu().nonzero()[:, 0]] = kept_tokens(values, share)
        scored = nn.functional.pad(kept, (1, 0)).to(batch.completion_mask)
        left = _pairs_of(replace(batch, completion_mask=batch.completion_mask * scored), todo)
        still = _entangled(engine, left)
        todo = [todo[i] for i in still]
    return kept


def _entangled(engine: Engine, batch: RowBatch) -> list[int]:
    """Pairs with c >= min(A, B)."""
    geometry = engine.pairs(batch).geometry
    return (torch.minimum(geometry.gap_chosen, geometry.gap_rejected) <= 0).nonzero()[:, 0].tolist()


def _contributions(engine: Engine, batch: RowBatch, pair: int) -> tuple[Tensor, Tensor]:
    """What each scored token adds to c, chosen and rejected, `(T_w,)` and `(T_l,)`."""
    found = token_products(engine.model, engine.parameters, _pairs_of(batch, [pair]))
    return found.chosen.along_rejected.cpu(), found.rejected.along_chosen.cpu()


def _pairs_of(batch: RowBatch, pairs: Sequence[int]) -> RowBatch:
    """Some of a batch's pairs."""
    rows = [*pairs, *(len(batch.prompt_length) + i for i in pairs)]
    return RowBatch(
        batch.input_ids[rows],
        batch.attention_mask[rows],
        batch.completion_mask[rows],
        batch.prompt_length[list(pairs)],
    )


@contextmanager
def displaced(parameters: Sequence[Tensor], displacement: Vector | None) -> Iterator[None]:
    """Within: the parameters are moved; afterwards they are as before, bit for bit.

    Args:
        parameters: those that are moved, in place.
        displacement: by how much, a tensor each; None: not at all.
    """
    if displacement is None:
        yield
        return
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, step in zip(parameters, displacement, strict=True):
            parameter.add_(step)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)

"""The training batch's own geometry, read off the training step's own backward pass.

The step computes G_a = u_a S_a for every row a of its batch, where S_a is the row's score and u_a = d loss / d logp_a
its upstream gradient: the one that reaches the row's log-prob, with the batch mean and the accumulation in it. Rows
don't mix, so the layers' inputs and output gradients give each G_a (`entangle.scores.rules`), and u_a is the gradient
that arrives at the model's output. So the scores' Gram blocks cost no forward and no backward of their own.

What they are scores of is what is trained: with live dropout the thinned network, under autocast in its precision.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from entangle.analysis.geometry import RESOLUTION, PairGeometry
from entangle.data import TokenizedPair
from entangle.scores.base import unstack_geometry
from entangle.scores.factored import matrix_shape
from entangle.scores.fused import describe_fused, fused_calls
from entangle.scores.lora import lora_sites
from entangle.scores.reduce import pair_block
from entangle.scores.rules import Call
from entangle.scores.sites import Site, detached, find_sites
from entangle.scores.terms import Dense, Outer, Score, Term
from entangle.training.memory import BatchMemory
from entangle.training.trainer import TrainingError

SMALLEST_UPSTREAM = 1e-20
"""A row whose upstream gradient is smaller leaves no digits of its score in float32; it is marked unknown."""

EVENNESS = 1e-4
"""Relative spread of a row's upstream gradients over its tokens above which the loss counts as weighing tokens."""


@dataclass
class _Tap:
    """A recorded call of a module; its inputs come with the recomputation where the layer is checkpointed."""

    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    grad: Tensor | None = None


@dataclass
class MicroBatch:
    """What a training step's forward and backward over n pairs have told: chosen rows first, then rejected rows.

    Args:
        input_ids: `(2n, T)`.
        attention_mask: `(2n, T)`.
        labels: `(2n, T)`, -100 on what isn't scored.
        logps: `(2n,)`, summed log-probs as the step computed them, nats.
        upstream: `(2n,)`, u = d loss / d logp of every row, as it was backpropagated; NaN where the loss weighs tokens,
            so that a row has no single upstream gradient. None until the backward pass.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    logps: Tensor | None = None
    upstream: Tensor | None = None
    _inverse: Tensor | None = None
    _taps: dict[Site, list[_Tap]] = field(default_factory=lambda: defaultdict(list))
    _terms: dict[str, list[Term]] = field(default_factory=lambda: defaultdict(list))
    _blocks: dict[str, Tensor] = field(default_factory=dict)
    _dtypes: set[torch.dtype] = field(default_factory=set)
    _weights: Tensor | None = None

    @property
    def pairs(self) -> int:
        """The number of pairs, n."""
        return len(self.input_ids) // 2

    @property
    def scored(self) -> Tensor:
        """`(2n, T - 1)` bool: position t predicts token t + 1, and that token is scored."""
        return self.labels[:, 1:] != -100

    @property
    def weighs_tokens(self) -> bool:
        """Whether a row has no single upstream gradient."""
        return self.upstream is not None and bool(self.upstream.isnan().any())

    @property
    def is_known(self) -> Tensor:
        """`(2n,)` bool: the row's score can be read off, because the step had a gradient in it."""
        assert self.upstream is not None
        return self.upstream.abs() > SMALLEST_UPSTREAM  # NaN isn't

    def keys(self) -> list[str]:
        """What tells the pairs apart, as `pair_key` gives it."""
        columns = (x.tolist() for x in (self.input_ids, self.attention_mask, self.labels))
        rows = [
            (
                [i for i, is_real in zip(ids, real, strict=True) if is_real],
                sum(label != -100 for label in labels),
            )
            for ids, real, labels in zip(*columns, strict=True)
        ]
        return [_digest(*rows[i], *rows[self.pairs + i]) for i in range(self.pairs)]

    @property
    def geometry(self) -> PairGeometry:
        """Gram blocks of the pairs' scores; NaN where a row isn't known."""
        block = torch.stack([part.cpu() for part in self._blocks.values()]).sum(0)
        chosen, rejected = self.is_known.cpu().chunk(2)
        both = chosen & rejected
        known = torch.stack([chosen, rejected, both, both, both])
        resolution = max(RESOLUTION[dtype] for dtype in self._dtypes)
        return unstack_geometry(torch.where(known, block, torch.nan), resolution)


def pair_key(pair: TokenizedPair) -> str:
    """What tells a pair apart from others in a batch: a hash of both rows' tokens and of what is scored."""
    chosen, rejected = pair.chosen_ids, pair.rejected_ids
    return _digest(pair.prompt_ids + chosen, len(chosen), pair.prompt_ids + rejected, len(rejected))


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


class BatchRecorder:
    """Hooks on a model in training that note every micro-batch: log-probs, upstream gradients, and their geometry.

    Law: with or without the hooks the training computes the same bits.

    Args:
        model: the policy, whose forward returns `log_probs` (TRL's fused head) and is given `labels`.
        geometry: whether the Gram blocks are wanted.
        memory: what is told of every micro-batch's scores; None: nothing. Without it and without `geometry` nothing in
            the layers is hooked.
        asked: what the user has asked for, for messages.

    Raises:
        TrainingError: a trained parameter has no rule, or its layer isn't called (fused LoRA kernels), so that its part
            of the scores can't be read off.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        geometry: bool,
        memory: BatchMemory | None = None,
        asked: str = "live=True",
    ) -> None:
        self._asked = asked
        self._current: MicroBatch | None = None
        self._done: list[MicroBatch] = []
        self._is_paused = False
        self._refilled: set[Site] = set()
        self._shapes: dict[str, tuple[int, int]] = {}
        self._handles = [
            model.register_forward_pre_hook(self._begins, with_kwargs=True),
            model.register_forward_hook(self._ends),
        ]
        self._wants_blocks, self._memory = geometry, memory
        if geometry or memory is not None:
            self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self._hook_layers(model)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within: passes of the model aren't the training's and aren't noted."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @property
    def _batch(self) -> MicroBatch | None:
        return None if self._is_paused else self._current

    def take(self) -> list[MicroBatch]:
        """The micro-batches since the last time; call when their backward passes are over.

        Raises:
            TrainingError: a parameter was trained through something else than its layer.
        """
        done, self._done, self._current = self._done, [], None
        for batch in done:
            self._finish(batch)
        return done

    def _begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_paused or not (model.training and torch.is_grad_enabled()):
            return
        self._current = None
        wanted = ("input_ids", "attention_mask", "labels")
        if all(isinstance(kwargs.get(name), Tensor) for name in wanted) and len(kwargs["input_ids"]) % 2 == 0:
            self._current = MicroBatch(*(kwargs[name] for name in wanted))

    def _ends(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        batch, logps = self._batch, getattr(output, "log_probs", None)
        if batch is None or logps is None or not logps.requires_grad:
            return
        if self._shapes and getattr(output, "aux_loss", None) is not None:
            raise TrainingError(
                f"{self._asked} reads scores off the backward pass, and here a router's auxiliary loss adds gradients "
                "of its own. Set router_aux_loss_coef to 0, or use a probe set (pairs=...) instead."
            )
        scored = batch.scored
        batch.logps = (logps.detach()[:, -scored.shape[1] :] * scored).sum(1)
        logps.register_hook(lambda grad: self._arrived(batch, grad.detach()))
        self._done.append(batch)

    def _arrived(self, batch: MicroBatch, grad: Tensor) -> None:
        """The first thing that happens in a backward pass: the gradient in the log-probs themselves."""
        scored = batch.scored
        grad = grad[:, -scored.shape[1] :].float()
        mean = (grad * scored).sum(1) / scored.sum(1).clamp(min=1)
        spread = ((grad - mean[:, None]).abs() * scored).amax(1)
        batch.upstream = torch.where(spread <= EVENNESS * mean.abs(), mean, torch.nan)
        batch._inverse = torch.where(batch.is_known, 1 / batch.upstream, 0)
        if self._memory is not None:
            both = batch.is_known.view(2, -1).all(0).repeat(2)
            sign = torch.ones_like(batch.upstream)
            sign[: batch.pairs] = -1.0
            applied = torch.where(batch.is_known, sign * batch.upstream, 0)  # d_w and d_l
            batch._weights = torch.stack([both.to(applied), applied])
            self._memory.count(int(both.sum()) // 2)

    def _hook_layers(self, model: nn.Module) -> None:
        if fused := fused_calls(model):
            raise TrainingError(
                f"{self._asked} reads scores off the calls of layers, and here {describe_fused(fused)}. Or use a probe "
                "set alone (pairs=...), for which the plain path is put back."
            )
        self._shapes = {name: matrix_shape(p) for name, p in self._parameters.items()}
        adapted, left = lora_sites(model, [], self._parameters)
        sites, uncovered = find_sites(model, left) if left else ([], set())
        if uncovered:
            few = ", ".join(sorted(uncovered)[:3])
            raise TrainingError(
                f"{self._asked} can't read the scores of {len(uncovered)} trained parameters, such as {few}: their "
                "layers have no rule. Train LoRA on linear layers, or use a probe set (pairs=...) instead."
            )
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        layer_of = {part: layer for layer in layers for part in layer.modules()}
        self._owners: dict[str, int] = defaultdict(int)
        for site in [*adapted, *sites]:
            for name in site.parameters.values():
                self._owners[name] += 1
            before, after = self._layer_hooks(site, layer_of.get(site.module))
            self._handles += [
                site.module.register_forward_pre_hook(before, with_kwargs=True),
                site.module.register_forward_hook(after, with_kwargs=True),
            ]

    def _layer_hooks(self, site: Site, layer: Any) -> tuple[Callable[..., None], Callable[..., None]]:
        """Hooks before and after a layer's call.

        Under gradient checkpointing a layer runs twice: in the forward pass, whose graph is the one that gradients
        come through, and again in the backward pass, for what that graph has saved. Inputs are kept from the second
        run only, so that nothing is held which checkpointing lets go. (With `use_reentrant` the first run has no
        graph at all, and the second one is like any other.)
        """

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._refilled.discard(site)
            batch = self._batch
            if batch is None or batch.upstream is None:  # not in a backward pass
                return
            for tap in batch._taps[site]:
                if tap.inputs is None:
                    tap.inputs = detached(args), detached(kwargs)
                    self._refilled.add(site)
                    self._enter(batch, site, tap)
                    return

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            batch = self._batch
            if batch is None or not torch.is_grad_enabled() or site in self._refilled:
                return
            comes_again = layer is not None and layer.gradient_checkpointing and layer.training
            is_first_run = comes_again and batch.upstream is None
            tap = _Tap(None if is_first_run else (detached(args), detached(kwargs)))
            batch._taps[site].append(tap)

            def arrived(grad: Tensor) -> None:
                tap.grad = grad.detach()
                self._enter(batch, site, tap)

            output.register_hook(arrived)

        return before, after

    def _enter(self, batch: MicroBatch, site: Site, tap: _Tap) -> None:
        """Turn a call whose inputs and gradient are both there into terms of the scores."""
        if tap.inputs is None or tap.grad is None or batch._inverse is None:
            return
        batch._dtypes.add(tap.grad.dtype)
        call = Call(*tap.inputs, (tap.grad,), len(batch.input_ids))
        tap.inputs, tap.grad = ((), {}), None
        with torch.no_grad(), torch.autocast(call.input.device.type, enabled=False):
            for local, term in site.rule(site.module, call).items():
                if (name := site.parameters.get(local)) is not None:
                    term = term.as_matrices(self._shapes[name]).compact()
                    batch._terms[name].append(_scaled(term, batch._inverse))
                    if self._owners[name] == len(batch._taps[site]) == 1:
                        self._reduce(batch, name)

    def _reduce(self, batch: MicroBatch, name: str) -> None:
        terms, n = batch._terms.pop(name), batch.pairs
        if self._memory is not None and batch._weights is not None:
            self._memory.add(name, terms, batch._weights)
        if not self._wants_blocks:
            batch._blocks[name] = torch.empty(0)
            return
        members = tuple(term[:n] for term in terms), tuple(term[n:] for term in terms)
        batch._blocks[name] = pair_block(Score(members, self._shapes[name]), None)

    def _finish(self, batch: MicroBatch) -> None:
        """Reduce what had to wait for further calls; every parameter that got a gradient must be there."""
        with torch.no_grad():
            for name in list(batch._terms):
                self._reduce(batch, name)
        batch._taps.clear()
        trained = [name for name in self._shapes if self._parameters[name].grad is not None]
        missing = [name for name in trained if name not in batch._blocks]
        if missing:
            raise TrainingError(
                f"{self._asked} found no pass through the layers of {len(missing)} trained parameters, such as "
                f"{missing[0]}, yet they got gradients: TRL's fused head reads the LM head's weight past its layer. "
                "Train LoRA on other layers, or use a probe set (pairs=...) instead."
            )


def _scaled(term: Term, weights: Tensor) -> Term:
    """A term with every row multiplied by its weight."""
    shape = (-1, 1, 1)
    if isinstance(term, Dense):
        return Dense(term.value * weights.view(shape))
    if isinstance(term.left, Tensor):
        return Outer(term.left * weights.view(shape), term.right)
    assert isinstance(term.right, Tensor)
    return Outer(term.left, term.right * weights.view(shape))

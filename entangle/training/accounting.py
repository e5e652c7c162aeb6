"""The ledger of a run in the making: every step is taken apart just before it's taken, and measured after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from entangle.analysis.ledger import Products, account, products
from entangle.models import undisturbed
from entangle.scores import row_logps
from entangle.training.live import BatchRecorder, MicroBatch, pair_key
from entangle.training.optimizer_steps import check_optimizer, read_step
from entangle.training.probing import ProbeSet
from entangle.training.trainer import TrainingError

SCORE_BYTES = 2**30
"""Most bytes of written-out scores that a pass holds; at least one pair's."""


class ClipRecorder:
    """Notes by how much accelerate clips gradients: the only place where the unclipped norm is to be had.

    Args:
        accelerator: the trainer's.
    """

    def __init__(self, accelerator: Any) -> None:
        self.factor = 1.0
        self._accelerator = accelerator
        clip = accelerator.clip_grad_norm_

        def noted(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
            norm = clip(parameters, max_norm, norm_type=norm_type)
            self.factor = min(1.0, max_norm / (float(norm) + 1e-6))  # torch.nn.utils.clip_grad_norm_
            return norm

        accelerator.clip_grad_norm_ = noted

    def remove(self) -> None:
        """Give the accelerator its own method back."""
        del self._accelerator.clip_grad_norm_


class LedgerRecorder:
    """Accounts for steps of a run: `before` the optimiser's step, then `after` it gives rows.

    Cost per accounted step: one forward and backward over the pairs for their scores, and one forward for the new
    log-probs (another for the old ones after a step that wasn't accounted for).

    Args:
        probe: the pairs.
        recorder: the hooks that tell the batch's upstream gradients.
        optimizer: the run's.
        accelerator: the run's.

    Raises:
        TrainingError: the optimiser isn't known, gradients are scaled (fp16), or DeepSpeed holds them.
    """

    def __init__(self, probe: ProbeSet, recorder: BatchRecorder, optimizer: Any, accelerator: Any) -> None:
        if accelerator.scaler is not None or accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise TrainingError(
                "ledger=True needs plain gradients on the parameters themselves: neither scaled ones (fp16; use bf16 "
                "or float32) nor DeepSpeed's."
            )
        self._optimizer = check_optimizer(optimizer)
        self._clip = ClipRecorder(accelerator)
        self._processes: int = accelerator.num_processes
        self._batches, self._probe = recorder, probe
        row_bytes = 4 * sum(p.numel() for p in probe.policy.parameters.values())
        self._most = max(1, SCORE_BYTES // (2 * row_bytes))
        self._known = {pair_key(pair): index for index, pair in probe.pairs.items()}
        self._logps: tuple[int, Tensor] | None = None  # after how many steps, and what they were
        self._found: list[tuple[list[int], Products]] = []
        self._upstream: dict[int, Tensor] = {}

    def remove(self) -> None:
        """Take the hooks off."""
        self._clip.remove()

    def before(self, step: int, batches: Sequence[MicroBatch]) -> None:
        """Take the coming step apart; every process calls.

        Args:
            step: steps taken so far.
            batches: this process's micro-batches of the coming step, after their backward passes.
        """
        self._upstream = self._upstream_gradients(batches)
        coming = read_step(self._optimizer, self._probe.policy.parameters)
        if self._logps is None or self._logps[0] != step:
            self._logps = step, self._measure()
        self._found = []
        with self._batches.paused(), undisturbed(self._probe.policy.model):
            for pairs, rows in self._probe.passes(self._most):
                found = products(self._probe.engine.scores(rows), coming)
                self._found.append(([pair.index for pair in pairs], found))

    def after(self, step: int) -> list[dict[str, Any]]:
        """This process's rows of the step that was taken; `step` counts it."""
        assert self._logps is not None
        old, new = self._logps[1], self._measure()
        self._logps = step, new
        rows, start = [], 0
        for indices, found in self._found:
            here = slice(start, start + len(indices))
            start = here.stop
            upstream = torch.stack([self._upstream.get(index, torch.zeros(2)) for index in indices]).double()
            measured = new[here] - old[here]
            parts = account(found, upstream, self._clip.factor, measured) | {
                "measured": measured,
                "logps": old[here],
            }
            rows += [
                {"step": step, "index": index, "side": side, "in_batch": index in self._upstream}
                | {name: float(value[i, k]) for name, value in parts.items()}
                for i, index in enumerate(indices)
                for k, side in enumerate(("chosen", "rejected"))
            ]
        return rows

    def _measure(self) -> Tensor:
        """Log-probs of this process's pairs, `(n, 2)` float64."""
        with self._batches.paused(), undisturbed(self._probe.policy.model):
            passes = [
                row_logps(self._probe.policy.model, rows).view(2, -1).T
                for _, rows in self._probe.passes(self._most)
            ]
        return torch.cat([logps.cpu() for logps in passes]) if passes else torch.zeros(0, 2).double()

    def _upstream_gradients(self, batches: Sequence[MicroBatch]) -> dict[int, Tensor]:
        """The upstream gradients u of every known pair in the step's batch, over all micro-batches and processes."""
        own = []
        for batch in batches:
            assert batch.upstream is not None
            if batch.weighs_tokens:
                raise TrainingError(
                    "ledger=True needs one upstream gradient per response, and this loss weighs tokens. Leave the "
                    "ledger out."
                )
            chosen, rejected = (upstream.tolist() for upstream in batch.upstream.cpu().chunk(2))
            own += [
                (self._known[key], both)
                for key, *both in zip(batch.keys(), chosen, rejected, strict=True)
                if key in self._known
            ]
        sums: dict[int, Tensor] = defaultdict(lambda: torch.zeros(2))
        for index, upstream in gather_object(own) if self._processes > 1 else own:
            sums[index] += torch.tensor(upstream) / self._processes
        return dict(sums)

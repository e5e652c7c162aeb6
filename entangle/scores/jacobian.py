"""The Jacobian norm gamma of the paper's bound, estimated by power iteration.

gamma is the largest spectral norm, over outputs and positions, of the Jacobian J of the next-token logits in
the parameters (arXiv 2310.20703). Power iteration converges to ||J|| from below, and a maximum over sampled
positions is below the maximum over all of them: the estimate is always too small, so a bound with it isn't
certified.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from entangle.scores.base import studying
from entangle.scores.logps import forward

STEPS = 12
"""Power iterations per position: a Jacobian with a gap between its largest singular values needs few."""


def jacobian_norm(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    ids: Tensor,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> float:
    """Spectral norm of d logits(next token after `ids`) / d parameters, from below.

    One step is a vector-Jacobian product J^T u and a Jacobian-vector product J v; the latter is the gradient
    of <J^T u, v> in u, so plain reverse mode is enough.

    Args:
        model: a causal language model of transformers.
        parameters: the parameters by name.
        ids: `(T,)` int64, the tokens before the one that is predicted.
        steps: iterations; the estimate grows with them.
        seed: of the first vector.
    """
    trained = list(parameters.values())
    with (
        studying(model, parameters),
        sdpa_kernel(SDPBackend.MATH),
    ):  # the fused kernels have no second derivative
        logits = forward(model, {"input_ids": ids[None], "use_cache": False}).logits[0, -1]
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(logits.shape, generator=generator).to(logits)
        probe = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(logits, trained, probe, create_graph=True, allow_unused=True)
        used = [grad for grad in pulled if grad is not None]
        norm = 0.0
        for _ in range(steps):
            u = u / u.norm()
            v = torch.autograd.grad(logits, trained, u, retain_graph=True, allow_unused=True)
            kept = [
                entry for entry, grad in zip(v, pulled, strict=True) if grad is not None and entry is not None
            ]
            norm = float(torch.stack([entry.double().square().sum() for entry in kept]).sum().sqrt())
            if norm == 0.0:
                return 0.0
            (u,) = torch.autograd.grad(used, probe, kept, retain_graph=True)
    return norm

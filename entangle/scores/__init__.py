"""Scores of responses: gradients of log-probs, met only through their dot products.

Start with `make_engine(model, parameters)`, parameters by name; then, for a `RowBatch`,

- `engine.pairs(batch)`: log-probs and Gram block of every pair, `PairScores`;
- `engine.gram(batch)`: all dot products of the batch's scores, `(rows, rows)`;
- `engine.products(batch, direction)`: first-order change of every log-prob along a step, `(rows,)`;
- `score_gram(engine, batches)`: the Gram matrix of more rows than fit one batch;
- `Directions`, `HeldScores`: that matrix times given weights, without the matrix;
- `with fast_gemm():` around any of it: a faster float32 matrix product on some CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import nn

from entangle.scores.autograd import AutogradEngine
from entangle.scores.base import Engine, Metric, PairScores, UncoveredParameter
from entangle.scores.directions import Directions, HeldScores
from entangle.scores.factored import FactoredEngine
from entangle.scores.gemm import fast_gemm
from entangle.scores.gram import score_gram
from entangle.scores.logps import row_logps, token_logps
from entangle.scores.rules import RULES, Call, register_rule

__all__ = [
    "RULES",
    "AutogradEngine",
    "Call",
    "Directions",
    "Engine",
    "FactoredEngine",
    "HeldScores",
    "Metric",
    "PairScores",
    "UncoveredParameter",
    "fast_gemm",
    "make_engine",
    "register_rule",
    "row_logps",
    "score_gram",
    "token_logps",
]


def make_engine(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    engine: Literal["auto", "factored", "autograd"] = "auto",
) -> Engine:
    """An engine for the scores of `model` in `parameters`.

    Args:
        model: a causal language model of transformers, plain or with a PEFT adapter.
        parameters: the probed parameters by name.
        engine: `factored` (fast; refuses parameters without a rule), `autograd` (slow, for anything), `auto`
            (factored, and autograd for what has no rule; `Engine.notes` says which).

    Raises:
        UncoveredParameter: `factored` was asked for, and a parameter has no rule.
        ValueError: no such engine.
    """
    if engine == "autograd":
        return AutogradEngine(model, parameters)
    if engine not in ("auto", "factored"):
        raise ValueError(f"Unknown engine {engine!r}. Known engines: auto, factored, autograd.")
    return FactoredEngine(model, parameters, fallback=engine == "auto")

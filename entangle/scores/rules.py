"""Rules: how a layer's input and output gradient give the scores of its parameters.

A rule is a function `(module, call) -> {parameter name in the module: Term}`, one per layer kind. `call` is
one call of the module in the forward pass: its input, and the gradient of the sum of all rows' log-probs in
its output. Rows don't mix inside a model in eval mode, so the gradient at a row's positions belongs to that
row's log-prob alone.

To add a layer kind: write its rule and register it; every kind of result and the engine's self-check follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from entangle.scores.terms import Dense, OneHot, Outer, Term


@dataclass(frozen=True)
class Call:
    """One call of a module: what went in, and the gradient of the rows' log-probs in what came out.

    Args:
        args: positional arguments; tensors detached.
        kwargs: keyword arguments; tensors detached.
        grads: gradient in each tensor of the output; None where no log-prob depends on it.
        rows: rows of the call; every per-token tensor starts with rows, or with rows * positions.
        memo: shared by the calls that differ in their gradients only (see `once`).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grads: tuple[Tensor | None, ...]
    rows: int
    memo: dict[str, Tensor] = field(default_factory=dict)

    def once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """What depends on the input alone: computed for the first gradient, the very same tensor for others.

        Args:
            name: of the quantity, one for every rule that shares it.
            compute: its value.
        """
        if name not in self.memo:
            self.memo[name] = compute()
        return self.memo[name]

    @property
    def input(self) -> Tensor:
        """First input as it came."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    @property
    def x(self) -> Tensor:
        """First input, `(rows, S, features)`, in float32 at least."""
        return self.once("x", lambda: self.by_row(self.input))

    @property
    def g(self) -> Tensor:
        """Gradient in the (first) output, `(rows, S, features)`, in float32 at least."""
        if self.grads[0] is None:
            raise RuntimeError("No log-prob depends on this call's output.")
        return self.by_row(self.grads[0])

    def by_row(self, value: Tensor) -> Tensor:
        """`(rows, S, features)` whether tokens came flat or not; heads count as positions."""
        if value.shape[0] % self.rows or value.ndim < 2:
            raise RuntimeError(
                "A per-token tensor must start with rows or rows * positions; got shape "
                f"{tuple(value.shape)} for {self.rows} rows."
            )
        return upcast(value).reshape(self.rows, -1, value.shape[-1])


Rule = Callable[[Any, Call], dict[str, Term]]


@dataclass(frozen=True)
class RuleEntry:
    """A rule and the parameters that it covers; None: all of the module's own."""

    rule: Rule
    covers: frozenset[str] | None


RULES: dict[type[nn.Module] | str, RuleEntry] = {}
"""Rules by layer class, or by the class's name where importing it would cost too much.

A class's rule holds for a subclass too as long as that doesn't change `forward`.
"""


def register_rule(kind: type[nn.Module] | str, covers: Iterable[str] | None = None) -> Callable[[Rule], Rule]:
    """Register a rule for a layer class (or class name) and the parameters that it covers (None: all).

    Args:
        kind: the class of layers, or its name.
        covers: local names of its parameters; None: all.

    Examples:
        >>> @register_rule(torch.nn.Bilinear, covers=["bias"])
        ... def bilinear_bias(module, call):
        ...     return {"bias": vector(call.g.sum(1))}
        >>> del RULES[torch.nn.Bilinear]
    """

    def register(rule: Rule) -> Rule:
        RULES[kind] = RuleEntry(rule, None if covers is None else frozenset(covers))
        return rule

    return register


def find_rule(module: nn.Module) -> RuleEntry | None:
    """The rule that is exact for this module, or None."""
    if (named := RULES.get(type(module).__name__)) is not None:
        return named
    for kind in type(module).__mro__:
        if kind in RULES:
            if type(module).forward is kind.forward:
                return RULES[kind]
            break
    if is_norm(module):
        return RuleEntry(elementwise_affine, None)
    return RuleEntry(recompute, None) if is_routed(module) else None


@register_rule("FalconLinear", covers=["weight", "bias"])
@register_rule(nn.Linear, covers=["weight", "bias"])
def linear(module: nn.Linear, call: Call) -> dict[str, Term]:
    """A linear layer, y = x W^T + b: dW = sum_s g_s x_s^T, db = sum_s g_s.

    Args:
        module: a linear layer.
        call: what it was called with, and the gradient at its output.
    """
    return {"weight": Outer(call.g, call.x), "bias": vector(call.g.sum(1))}


@register_rule(Conv1D, covers=["weight", "bias"])
def conv1d(module: Conv1D, call: Call) -> dict[str, Term]:
    """GPT-2's linear layer, y = x W + b: dW = sum_s x_s g_s^T, db = sum_s g_s.

    Args:
        module: GPT-2's layer.
        call: what it was called with, and the gradient at its output.
    """
    return {"weight": Outer(call.x, call.g), "bias": vector(call.g.sum(1))}


@register_rule(nn.Embedding, covers=["weight"])
def embedding(module: nn.Embedding, call: Call) -> dict[str, Term]:
    """An embedding, y = W[id]: dW = sum_s e_id(s) g_s^T; the padding token's row has no gradient.

    Args:
        module: an embedding.
        call: what it was called with, and the gradient at its output.
    """
    index, g = call.input.reshape(call.rows, -1), call.g
    if module.padding_idx is not None:
        g = g * (index != module.padding_idx)[..., None]
    return {"weight": Outer(OneHot(index, module.num_embeddings), g)}


@register_rule("GemmaTextScaledWordEmbedding", covers=["weight"])
@register_rule("Gemma2TextScaledWordEmbedding", covers=["weight"])
@register_rule("Gemma3TextScaledWordEmbedding", covers=["weight"])
def scaled_embedding(module: Any, call: Call) -> dict[str, Term]:
    """Gemma's embedding, y = scale * W[id].

    Args:
        module: an embedding with a scale.
        call: what it was called with, and the gradient at its output.
    """
    (term,) = embedding(module, call).values()
    assert isinstance(term, Outer) and isinstance(term.right, Tensor)
    scale = module.embed_scale.to(module.weight.dtype)
    return {"weight": Outer(term.left, term.right * scale)}


def elementwise_affine(module: nn.Module, call: Call) -> dict[str, Term]:
    """Norms, y = w * n(x) + b or (1 + w) * n(x) + b: dw = sum_s g_s * n(x_s), db = sum_s g_s.

    n is read off the module itself as f(w = 1) - f(w = 0), which holds for both conventions.

    Args:
        module: a norm with a weight, a bias or both.
        call: what it was called with, and the gradient at its output.
    """
    own = dict(module.named_parameters(recurse=False))
    ones = {name: torch.ones_like(p) for name, p in own.items()}
    zeros = ones | {"weight": torch.zeros_like(own["weight"])}

    def normalised() -> Tensor:
        with torch.no_grad():
            at_one, at_zero = (functional_call(module, w, call.args, call.kwargs) for w in (ones, zeros))
        return call.by_row(at_one - at_zero)

    unit, g = call.once("unit", normalised), call.g
    return {"weight": vector((g * unit).sum(1)), "bias": vector(g.sum(1))}


@register_rule("OPTLearnedPositionalEmbedding")
@register_rule("DoraLinearLayer")
def recompute(module: nn.Module, call: Call) -> dict[str, Term]:
    """Any module whose rows don't mix: run it again, row by row, and let autograd take its own parameters.

    Exact, and far cheaper than a backward pass through the model, but every row's score is written out.

    Args:
        module: the layer.
        call: what it was called with, and the gradient at its output.
    """
    own = {name: p.detach().requires_grad_() for name, p in module.named_parameters(recurse=False)}
    scores = []
    for row in range(call.rows):
        args, kwargs, grads = (
            _row_of(value, row, call.rows) for value in (call.args, call.kwargs, call.grads)
        )
        with torch.enable_grad():
            outputs = output_tensors(functional_call(module, own, args, kwargs))
        used = [
            (out, g) for out, g in zip(outputs, grads, strict=True) if g is not None and out.requires_grad
        ]
        scores.append(
            torch.autograd.grad(
                [out for out, _ in used],
                list(own.values()),
                [g.reshape(out.shape) for out, g in used],
                allow_unused=True,
                materialize_grads=True,
            )
        )
    return {
        name: Dense(torch.stack(values)) for name, values in zip(own, zip(*scores, strict=True), strict=True)
    }


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with at most a weight and a bias, both vectors over the last axis."""
    own = dict(module.named_parameters(recurse=False))
    named = isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith("Norm")
    vectors = all(p.ndim == 1 for p in own.values()) and len({p.numel() for p in own.values()}) == 1
    return named and vectors and "weight" in own and set(own) <= {"weight", "bias"}


def is_routed(module: nn.Module) -> bool:
    """Whether a module is a bank of experts or its router, as transformers writes them: token by token."""
    return type(module).__name__.endswith(("Experts", "Router"))


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a module's output, in order."""
    values = output if isinstance(output, tuple | list) else (output,)
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def vector(value: Tensor) -> Dense:
    """A written-out score of a vector parameter, `(rows, d)`."""
    return Dense(value)


def upcast(value: Tensor) -> Tensor:
    """Half precision as float32; anything else unchanged."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def _row_of(value: Any, row: int, rows: int) -> Any:
    """The part of an argument that belongs to one row."""
    if isinstance(value, dict):
        return {key: _row_of(item, row, rows) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_row_of(item, row, rows) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0 or len(value) % rows:
        raise RuntimeError(
            f"Can't tell rows apart in an argument of shape {tuple(value.shape)} ({rows} rows)."
        )
    size = len(value) // rows
    return value[row * size : (row + 1) * size]

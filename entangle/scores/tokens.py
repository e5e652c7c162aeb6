"""Scores of single tokens: what every token of a pair adds to A, B and c, and to the predicted changes.

The score of a response is the sum of its tokens' scores, g_w = sum_t g_w,t, so A, B and c are sums over tokens:

    M[t, t'] = <g_w,t, g_l,t'>      sum M = c      R_t = sum_t' M[t, t'] = <g_w,t, g_l>      S_t = <g_w,t, g_w>

and a step theta += eta (d_w g_w - d_l g_l) changes the log-prob of chosen token t by eta (d_w S_t - d_l R_t).

All R_t (or S_t) are one product J u of the Jacobian J of the row's token log-probs with a direction u. The
backward pass with weights v gives J^T v, which is linear in v; differentiating <J^T v, u> in v gives J u. So a
pair costs one forward, one backward per row (both scores, g_w and g_l), and per direction as much as another
forward, instead of one backward per token. The prompt is evaluated once for both rows where that is worth it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from entangle.analysis.geometry import RESOLUTION, PairGeometry
from entangle.errors import UserError
from entangle.scores.base import Metric, stack_geometry, studying, unstack_geometry
from entangle.scores.logps import (
    Rows,
    forward,
    gather_positions,
    head_at,
    rows_for,
    scored_logps,
    target_logps,
)
from entangle.scores.prefix import NoSplit, Split, prefix_pass, split_for
from entangle.scores.reduce import dots
from entangle.scores.rows import RowBatch


@dataclass(frozen=True)
class TokenSide:
    """The scored tokens of one response; every field `(T,)`, products in float64.

    Args:
        ids: the tokens.
        logps: their log-probs, nats.
        along_chosen: <g_t, g_w>, first-order change of the token's log-prob per unit step along g_w.
        along_rejected: <g_t, g_l>.
        along_difference: <g_t, g_w - g_l>, from that direction itself: its digits survive where g_w is almost g_l.
    """

    ids: Tensor
    logps: Tensor
    along_chosen: Tensor
    along_rejected: Tensor
    along_difference: Tensor


@dataclass(frozen=True)
class TokenProducts:
    """Products of every token's score with both scores of its pair, and with every other token's.

    Laws: summed over tokens, `chosen.along_chosen` is A, `chosen.along_rejected` and `rejected.along_chosen` are
    c, `rejected.along_rejected` is B; they are also the row and column sums of the matrices. Tokens of the
    shared prefix have the same numbers on both sides.

    Args:
        chosen: tokens of the chosen response.
        rejected: tokens of the rejected response.
        geometry: the pair's Gram block `(1,)`, from its two whole scores.
        matrix: <g_t, g_t'> over the chosen tokens, then the rejected ones, `(T_w + T_l, T_w + T_l)` float64; None
            unless asked for.
        notes: what the user should know about how the numbers came about.
    """

    chosen: TokenSide
    rejected: TokenSide
    geometry: PairGeometry
    matrix: Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def shared_prefix(self) -> int:
        """Tokens that both responses begin with."""
        return _common(self.chosen.ids, self.rejected.ids)

    @property
    def shared_suffix(self) -> int:
        """Tokens that both responses end with, after the shared prefix."""
        start = self.shared_prefix
        return _common(self.chosen.ids[start:].flip(0), self.rejected.ids[start:].flip(0))

    @property
    def chosen_rejected(self) -> Tensor | None:
        """M[t, t'] = <g_w,t, g_l,t'>, `(T_w, T_l)`; it sums to c."""
        return self._block(slice(None, self._cut), slice(self._cut, None))

    @property
    def chosen_chosen(self) -> Tensor | None:
        """<g_w,t, g_w,t'>, `(T_w, T_w)`; it sums to A."""
        return self._block(slice(None, self._cut), slice(None, self._cut))

    @property
    def rejected_rejected(self) -> Tensor | None:
        """<g_l,t, g_l,t'>, `(T_l, T_l)`; it sums to B."""
        return self._block(slice(self._cut, None), slice(self._cut, None))

    @property
    def cosines(self) -> Tensor | None:
        """M[t, t'] / (|g_w,t| |g_l,t'|), `(T_w, T_l)`, in [-1, 1]; NaN where a token has no gradient."""
        if self.matrix is None:
            return None
        norms = self.matrix.diagonal().clamp(min=0).sqrt()
        cut = self._cut
        return self.matrix[:cut, cut:] / (norms[:cut, None] * norms[None, cut:])

    def changes(self, chosen: float, rejected: float) -> tuple[Tensor, Tensor]:
        """First-order change of every token's log-prob per unit learning rate, nats: `(T_w,)` and `(T_l,)`.

        <g_t, d_w g_w - d_l g_l>, formed from the difference as the pair's changes are (see `regimes.predict`), to
        which they sum.

        Args:
            chosen: the incentive d_w.
            rejected: the incentive d_l.
        """
        excess = chosen - rejected
        return (
            excess * self.chosen.along_chosen + rejected * self.chosen.along_difference,
            excess * self.rejected.along_rejected + chosen * self.rejected.along_difference,
        )

    @property
    def _cut(self) -> int:
        return len(self.chosen.ids)

    def _block(self, rows: slice, columns: slice) -> Tensor | None:
        return None if self.matrix is None else self.matrix[rows, columns]


def token_products(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: RowBatch,
    *,
    full: bool = False,
    share_prompt: bool = True,
    metric: Metric | None = None,
) -> TokenProducts:
    """Products of token scores of one pair, exact.

    The model runs in eval mode and is left as it was found. Attention runs on PyTorch's plain kernel: the fused
    ones can be differentiated once only.

    Args:
        model: a causal language model of transformers, plain or with a PEFT adapter.
        parameters: the probed parameters by name.
        batch: one pair, two rows, padded on either side.
        full: also all token-by-token products, at about the cost of one backward pass per token.
        share_prompt: evaluate the prompt once for both rows where it is long enough for that.
        metric: an optimiser's diagonal metric P, by parameter: every product is <g, P g'>; None is P = 1.

    Raises:
        ValueError: the batch isn't one pair with scored tokens in both rows.
        UserError: the model has an operation that can be differentiated neither twice nor forwards.
    """
    if len(batch.input_ids) != 2 or batch.group_size != 2 or not bool((batch.lengths > 0).all()):
        raise ValueError(
            f"token_products takes one pair, a chosen and a rejected row with scored tokens; got "
            f"{len(batch.input_ids)} rows, group_size {batch.group_size}, scored tokens {batch.lengths.tolist()}."
        )
    rows = rows_for(model, batch)
    split = split_for(model, rows, 2) if share_prompt else None
    notes: list[str] = []
    with studying(model, parameters), sdpa_kernel(SDPBackend.MATH):
        passes = linearise(model, parameters, rows, split, metric)
        products = _products(model, parameters, rows, passes, notes)
    cut = len(passes.logps[0])
    chosen, rejected = (
        TokenSide(rows.targets[i][rows.valid[i]].cpu(), passes.logps[i], *products[:, part].unbind())
        for i, part in enumerate((slice(None, cut), slice(cut, None)))
    )
    matrix = token_matrix(model, parameters, batch, metric=metric) if full else None
    return TokenProducts(chosen, rejected, passes.geometry, matrix, tuple(notes))


def tokens_along(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: RowBatch, direction: Mapping[str, Tensor]
) -> list[Tensor]:
    """<g_t, direction> for the scored tokens of every row, `(T,)` float64 each: one pass in forward mode.

    Law: a row's products add up to that of its whole score, `Engine.products`.

    Args:
        model: see `token_products`.
        parameters: see `token_products`.
        batch: any rows.
        direction: by parameter name, in its shape; names that are absent don't move.

    Raises:
        UserError: an operation of the model has no forward-mode rule.
    """
    rows = rows_for(model, batch)
    moves = [direction.get(name, torch.zeros_like(p)) for name, p in parameters.items()]
    with studying(model, parameters), sdpa_kernel(SDPBackend.MATH):
        (products,) = _forward_products(model, parameters, rows, [moves])
    return list(products.split(rows.valid.sum(1).tolist()))


def token_matrix(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: RowBatch,
    *,
    memory: int = 2**31,
    metric: Metric | None = None,
) -> Tensor:
    """<g_t, g_t'> for all scored tokens of all rows, row after row, `(T, T)` float64.

    Symmetric, positive semi-definite. One forward pass per row and one backward pass per token, again for every
    group of parameters whose scores don't fit in memory together.

    Args:
        model: see `token_products`.
        parameters: see `token_products`.
        batch: the rows.
        memory: bytes of scores to hold at a time; at least one parameter's are held.
        metric: see `token_products`.
    """
    rows = rows_for(model, batch)
    with studying(model, parameters):
        values = [value for i in range(len(rows)) for value in scored_logps(model, rows[i : i + 1])[0]]
        gram = torch.zeros(len(values), len(values), dtype=torch.float64)
        roots = dict(zip(parameters.values(), _roots(parameters, metric), strict=True))
        for group in _groups(list(parameters.values()), memory // len(values)):
            scores = [p.new_empty(len(values), p.numel()) for p in group]
            for t, value in enumerate(values):
                gradients = torch.autograd.grad(
                    value, group, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for score, gradient, p in zip(scores, gradients, group, strict=True):
                    score[t] = (gradient * roots[p]).flatten()
            gram += torch.stack([dots(score, score).cpu() for score in scores]).sum(0)
    return gram


def _groups(parameters: list[nn.Parameter], memory: int) -> Iterator[list[nn.Parameter]]:
    """Parameters in their order, as many at a time as have `memory` bytes, at least one."""
    group: list[nn.Parameter] = []
    for parameter in parameters:
        if group and sum(p.numel() * p.element_size() for p in [*group, parameter]) > memory:
            yield group
            group = []
        group.append(parameter)
    if group:
        yield group


def _common(a: Tensor, b: Tensor) -> int:
    shortest = min(len(a), len(b))
    return int((a[:shortest] == b[:shortest]).long().cumprod(0).sum())


# --- products J u -------------------------------------------------------------------------------------------

Gradients = Sequence[Tensor]
"""A tensor per probed parameter."""


def _roots(parameters: Mapping[str, nn.Parameter], metric: Metric | None) -> list[Tensor | float]:
    """The root of the metric in every parameter; 1 without one."""
    if metric is None:
        return [1.0] * len(parameters)
    return [metric[name].to(p).sqrt() for name, p in parameters.items()]


def _products(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], rows: Rows, passes: Passes, notes: list[str]
) -> Tensor:
    """Products of all tokens with g_w, g_l and g_w - g_l (under the metric), `(3, T_w + T_l)` float64.

    Taken along the difference and the shorter of the two scores; the third follows, with its own digits.
    """
    chosen, rejected = passes.steps
    chosen_is_shorter = bool(passes.geometry.sq_chosen <= passes.geometry.sq_rejected)
    difference = [a - b for a, b in zip(chosen, rejected, strict=True)]
    directions = [chosen if chosen_is_shorter else rejected, difference]
    try:
        found = torch.stack([passes.products(u) for u in directions])
        trusted = _sums_agree(found[0], passes, chosen_is_shorter)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):
        found, trusted = torch.empty(0), False
    if not trusted:
        notes.append(
            "An operation of this model can't be differentiated twice: products by forward-mode differentiation."
        )
        found = _forward_products(model, parameters, rows, directions)
        if not _sums_agree(found[0], passes, chosen_is_shorter):
            raise UserError(
                "Expected the products of a pair's tokens to sum to those of the pair; they don't, neither by "
                "differentiating twice nor in forward mode. Load the model in float32, without quantisation."
            )
    shorter, along_difference = found
    if chosen_is_shorter:
        return torch.stack([shorter, shorter - along_difference, along_difference])
    return torch.stack([shorter + along_difference, shorter, along_difference])


def _sums_agree(along: Tensor, passes: Passes, chosen_is_shorter: bool) -> bool:
    """Whether products along one of the scores sum to entries of the Gram block; NaN and inf are the pair's own."""
    block = passes.geometry
    expected = torch.cat(
        [block.sq_chosen, block.inner] if chosen_is_shorter else [block.inner, block.sq_rejected]
    )
    if not expected.isfinite().all():
        return True
    own = block.sq_chosen if chosen_is_shorter else block.sq_rejected
    scale = (own * torch.cat([block.sq_chosen, block.sq_rejected])).sqrt()
    cut = len(passes.logps[0])
    sums = torch.stack([along[:cut].sum(), along[cut:].sum()])
    return bool(((sums - expected).abs() <= max(1e-3, 20 * block.resolution) * scale).all())


@dataclass(frozen=True)
class Linear:
    """A backward pass J^T v as a function of its weights v: linear, with the graph of that function.

    Args:
        outputs: J^T v, a tensor per input of the forward pass.
        weights: v, a tensor per output of the forward pass.
    """

    outputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, values: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Linear:
        """The backward pass from `values` to `inputs`, taken at `weights`.

        Args:
            values: what is differentiated.
            inputs: by what; in its graph.
            weights: one per value, in its shape.
        """
        free = tuple(weight.detach().clone().requires_grad_(True) for weight in weights)
        outputs = torch.autograd.grad(
            values, inputs, free, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return cls(outputs, free)

    def apply(self, direction: Gradients) -> tuple[Tensor, ...]:
        """J u for a direction u shaped like the inputs, exactly: the gradient of <J^T v, u> in v."""
        terms = [(o, u) for o, u in zip(self.outputs, direction, strict=True) if o.requires_grad]
        if not terms:
            return tuple(torch.zeros_like(weight) for weight in self.weights)
        outputs, directions = zip(*terms, strict=True)
        return torch.autograd.grad(
            outputs, self.weights, directions, retain_graph=True, allow_unused=True, materialize_grads=True
        )


@dataclass(frozen=True)
class Passes:
    """One evaluation of a pair: its log-probs, its scores, and its backward passes as linear maps.

    Args:
        logps: `(T_w,)` and `(T_l,)` float64, nats.
        steps: P g_w and P g_l; the scores themselves without a metric.
        geometry: the scores' Gram block under the metric, `(1,)`.
        rows: for the chosen and the rejected row, the pass from its token log-probs to the parameters, then to the
            prompt's keys and values.
        prompt: the pass from the prompt's keys and values to the parameters; None without a shared prompt.
    """

    logps: tuple[Tensor, Tensor]
    steps: tuple[Gradients, Gradients]
    geometry: PairGeometry
    rows: tuple[Linear, Linear]
    prompt: Linear | None

    def products(self, direction: Gradients) -> Tensor:
        """<g_t, direction> of all tokens, the chosen ones first, `(T_w + T_l,)` float64.

        The prompt moves once, for both rows: its keys and values change by their J u.
        """
        moved = () if self.prompt is None else self.prompt.apply(direction)
        return torch.cat([row.apply([*direction, *moved])[0][0] for row in self.rows]).double().cpu()


def linearise(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rows: Rows,
    split: Split | None,
    metric: Metric | None = None,
) -> Passes:
    """Evaluate a pair forwards and backwards, keeping the graph of the backward passes.

    Args:
        model: the model.
        parameters: the probed ones, by name.
        rows: a pair: chosen, then rejected.
        split: the pair with its prompt apart; None: both rows whole.
        metric: by parameter; None: P = 1.
    """
    theta = list(parameters.values())
    kept: list[Tensor] = []
    if split is not None:
        try:
            kept = prefix_pass(model, split)
        except NoSplit:
            split = None
    leaves = [state.detach().requires_grad_(state.requires_grad) for state in kept]
    values = [  # a row at a time: a backward pass of one row through a batch of two would compute both
        scored_logps(model, rows[i : i + 1]) if split is None else _after_prompt(model, split, i, leaves)
        for i in range(2)
    ]
    states = [state for state in kept if state.requires_grad]
    inputs = [*theta, *(leaf for leaf in leaves if leaf.requires_grad)]
    passes = [Linear.of([row], inputs, [torch.ones_like(row)]) for row in values]
    scores = [[g.detach() for g in row.outputs[: len(theta)]] for row in passes]
    prompt = None
    if states:
        prompt = Linear.of(states, theta, passes[0].outputs[len(theta) :])
        through = torch.autograd.grad(
            states,
            theta,
            [g.detach() for g in passes[1].outputs[len(theta) :]],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        scores[0] = [g + h.detach() for g, h in zip(scores[0], prompt.outputs, strict=True)]
        scores[1] = [g + h for g, h in zip(scores[1], through, strict=True)]
    roots = _roots(parameters, metric)
    scaled = [[g * root for g, root in zip(score, roots, strict=True)] for score in scores]
    steps = [[g * root for g, root in zip(score, roots, strict=True)] for score in scaled]
    return Passes(
        logps=(values[0].detach()[0].double().cpu(), values[1].detach()[0].double().cpu()),
        steps=(steps[0], steps[1]),
        geometry=_geometry(*scaled),
        rows=(passes[0], passes[1]),
        prompt=prompt,
    )


def _after_prompt(model: nn.Module, split: Split, row: int, states: Sequence[Tensor]) -> Tensor:
    """Token log-probs of one row, `(1, S)`, given the prompt's keys and values."""
    rest = split.rest[row : row + 1]
    one = Split(split.prefix_ids, split.prefix_lengths, rest, group_size=1)
    cache = DynamicCache()
    for layer in range(len(states) // 2):
        cache.update(states[2 * layer], states[2 * layer + 1], layer)
    inputs = one.response_inputs() | {"past_key_values": cache, "use_cache": True}
    with head_at(model, rest.index):
        logits = forward(model, inputs).logits
    if logits.shape[1] != rest.index.shape[1]:
        logits = gather_positions(logits, rest.index)
    return target_logps(logits, rest.targets, rest.valid)


def _geometry(chosen: Gradients, rejected: Gradients) -> PairGeometry:
    """The Gram block of two scores, summed over parameters in float64."""
    columns = torch.zeros(5, 1, dtype=torch.float64)
    for a, b in zip(chosen, rejected, strict=True):
        block = PairGeometry.from_scores(a.double().reshape(1, -1), b.double().reshape(1, -1))
        columns += stack_geometry(block).cpu()
    return unstack_geometry(columns, max(RESOLUTION[g.dtype] for g in chosen))


def _forward_products(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], rows: Rows, directions: Sequence[Gradients]
) -> Tensor:
    """<g_t, u> of all tokens for every direction u, `(directions, T_w + T_l)` float64, by forward mode.

    Raises:
        UserError: an operation of the model has no forward-mode rule.
    """
    names = {id(p): f"model.{name}" for name, p in model.named_parameters()}
    logps = _TokenLogps(model)
    found = []
    try:
        for direction in directions:
            with torch.no_grad(), forward_ad.dual_level():
                moving = {
                    names[id(p)]: forward_ad.make_dual(p.detach(), u.to(p))
                    for p, u in zip(parameters.values(), direction, strict=True)
                }
                values = forward_ad.unpack_dual(functional_call(logps, moving, (rows,)))
                found.append(torch.zeros_like(values.primal) if values.tangent is None else values.tangent)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            "Products of single tokens need a model that can be differentiated twice, or in forward mode; this one "
            f"can't ({str(error).splitlines()[0]}). Load it without quantisation, or with --attn_implementation eager."
        ) from error
    return torch.stack(found)[:, rows.valid].double().cpu()


class _TokenLogps(nn.Module):
    """`scored_logps` of a model as a module, so that its parameters can be replaced for a call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Rows) -> Tensor:
        return scored_logps(self.model, rows)

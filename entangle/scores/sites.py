"""Sites: the modules where a pass is tapped, and the hooks that tap it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from entangle.errors import UserError
from entangle.scores.float64 import keeping_float64
from entangle.scores.rules import Call, Rule, find_rule, output_tensors
from entangle.scores.terms import Score, Term


@dataclass(frozen=True, eq=False)
class Site:
    """A module whose calls give the scores of some probed parameters.

    Args:
        module: the module to hook.
        rule: from its calls to terms by local name.
        parameters: probed parameters by the rule's local name: their names in the engine.
    """

    module: nn.Module
    rule: Rule
    parameters: Mapping[str, str]


class RuleFailed(UserError):
    """A rule can't be applied to a call of its module.

    Args:
        site: where.
        error: what was raised.
    """

    def __init__(self, site: Site, error: Exception) -> None:
        self.site = site
        super().__init__(
            f"The fast rule for {type(site.module).__name__} can't be applied here ({type(error).__name__}: "
            f"{str(error)[:200]}). Use --engine autograd: a forward and a backward pass per response."
        )


def find_sites(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[list[Site], set[str]]:
    """Sites that give the scores of `parameters`, and the names that no rule covers.

    A parameter with several owners (tied weights) is covered only if each owner has a rule for it.

    Args:
        model: the model.
        parameters: the wanted ones, by name.
    """
    names = {id(p): name for name, p in parameters.items()}
    candidates: list[Site] = []
    uncovered = set(parameters)
    refused: set[str] = set()
    unreachable = {
        part for module in model.modules() if type(module) is ParamWrapper for part in module.modules()
    }
    for module in model.modules():
        if module in unreachable:  # PEFT reads these layers' weights and never calls them
            continue
        own = {local: names[id(p)] for local, p in module._parameters.items() if id(p) in names}
        entry = find_rule(module) if own else None
        covers = entry.covers if entry and entry.covers is not None else frozenset(own)
        known = {local: name for local, name in own.items() if entry and local in covers}
        if entry and known:
            candidates.append(Site(module, entry.rule, known))
        uncovered -= set(known.values())
        refused |= set(own.values()) - set(known.values())
    uncovered |= refused
    sites = [
        Site(site.module, site.rule, {k: v for k, v in site.parameters.items() if v not in uncovered})
        for site in candidates
    ]
    return [site for site in sites if site.parameters], uncovered


@dataclass(eq=False)
class Tap:
    """A recorded call: `passes` gradients are expected for each of its outputs, one per backward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int
    passes: int
    grads: list[list[Tensor]]  # by output, then by pass
    device: str
    memo: dict[str, Tensor] = field(default_factory=dict)
    taken: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether every gradient has arrived."""
        return all(len(grads) == self.passes for grads in self.grads)

    def take_calls(self) -> list[tuple[int, Call]]:
        """(pass, call) of the backward passes that arrived since the last time; their gradients are let go."""
        arrived = max((len(grads) for grads in self.grads), default=0)
        if any(len(grads) not in (0, arrived) for grads in self.grads):
            raise RuntimeError(f"A backward pass missed an output: {[len(g) for g in self.grads]} gradients.")
        calls = []
        for k in range(self.taken, arrived):
            by_output = tuple(grads[k] if grads else None for grads in self.grads)
            calls.append((k, Call(self.args, self.kwargs, by_output, self.rows, self.memo)))
            for grads in filter(None, self.grads):
                grads[k] = grads[k].new_empty(0)
        self.taken = arrived
        return calls


class Recorder:
    """Hooks on the sites' modules; hands over a parameter's scores as soon as they are complete.

    Args:
        sites: where to tap.
        shapes: matrix shape (a, b) of every parameter.
        group_size: K; passes record either all K * n rows, or n prompts for K backward passes.
        take: called once per parameter that was used, with its scores.
        know: told the rows' log-probs before any scores.

    Attributes:
        dtypes: precisions in which gradients arrived.
    """

    def __init__(
        self,
        sites: list[Site],
        shapes: Mapping[str, tuple[int, int]],
        group_size: int,
        take: Callable[[str, Score], None],
        know: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.dtypes: set[torch.dtype] = set()
        self._sites, self._shapes, self._group_size = sites, shapes, group_size
        self._take, self._know = take, know
        self._taps: dict[Site, list[Tap]] = defaultdict(list)
        self._terms: dict[str, list[list[Term]]] = defaultdict(lambda: [[] for _ in range(group_size)])
        self._owners: dict[str, list[Site]] = defaultdict(list)
        for site in sites:
            for name in site.parameters.values():
                self._owners[name].append(site)

    @contextmanager
    def recording(self, rows: int, passes: int = 1) -> Iterator[None]:
        """Within: forward passes over `rows` rows are recorded, for `passes` backward passes each.

        Args:
            rows: rows of the forward passes.
            passes: backward passes for each.
        """
        handles = [
            site.module.register_forward_hook(self._hook(site, rows, passes), with_kwargs=True)
            for site in self._sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def know(self, logps: Tensor) -> None:
        """Pass on the rows' log-probs; to be called before their backward pass."""
        if self._know is not None:
            self._know(logps)

    def flush(self) -> None:
        """Hand over what is still waiting for gradients that don't come."""
        for site in self._sites:
            self._finish(site)

    def _hook(self, site: Site, rows: int, passes: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled():  # not part of the graph
                return output
            output = _outside(output)
            outputs = output_tensors(output)
            tap = Tap(
                detached(args), detached(kwargs), rows, passes, [[] for _ in outputs], outputs[0].device.type
            )
            for out, grads in zip(outputs, tap.grads, strict=True):
                out.register_hook(self._arrival(site, tap, grads))
            self._taps[site].append(tap)
            return output

        return hook

    def _arrival(self, site: Site, tap: Tap, grads: list[Tensor]) -> Callable[[Tensor], None]:
        def arrived(grad: Tensor) -> None:
            grads.append(grad.detach())
            self.dtypes.add(grad.dtype)
            if len(tap.grads) == 1:
                self._enter(site, tap)
            if all(other.is_complete for other in self._taps[site]):
                self._finish(site)

        return arrived

    def _enter(self, site: Site, tap: Tap) -> None:
        """Turn what has arrived at a tap into terms.

        Raises:
            RuleFailed: the rule can't.
        """
        try:
            self._add_terms(site, tap)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a rule, and what it runs again, may fail in any way
            raise RuleFailed(site, error) from error

    def _add_terms(self, site: Site, tap: Tap) -> None:
        """Terms of what has arrived at a tap: one member's if a pass is, else every member's."""
        with torch.no_grad(), torch.autocast(tap.device, enabled=False):  # dot products keep their digits
            for k, call in tap.take_calls():
                with keeping_float64(
                    site.module
                ):  # a hook of the backward pass has left that of the forward one
                    found = site.rule(site.module, call)
                for local, term in found.items():
                    if (name := site.parameters.get(local)) is None:
                        continue
                    term = term.as_matrices(self._shapes[name]).compact()
                    if tap.passes == self._group_size:
                        self._terms[name][k].append(term)
                        continue
                    n = len(term) // self._group_size
                    for member, terms in enumerate(self._terms[name]):
                        terms.append(term[member * n : (member + 1) * n])

    def _finish(self, site: Site) -> None:
        """Hand over every parameter of the site all of whose sites are done."""
        for tap in self._taps.pop(site, []):
            self._enter(site, tap)
        for name in site.parameters.values():
            if name in self._terms and not any(owner in self._taps for owner in self._owners[name]):
                score = Score(tuple(map(tuple, self._terms.pop(name))), self._shapes[name])
                with torch.no_grad(), torch.autocast(score.device.type, enabled=False):
                    self._take(name, score)


def _outside(output: Any) -> Any:
    """The output as what comes after the module sees it, requiring a gradient.

    If nothing below is probed the graph starts here. One of several outputs may also feed another (a router's
    logits its weights); a clone takes the gradient from outside alone, and allows in-place steps on it.
    """
    if isinstance(output, tuple):
        return tuple(_cloned(value) for value in output)
    return output if output.requires_grad else _cloned(output)


def _cloned(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.clone() if value.requires_grad else _Root.apply(value, torch.zeros((), requires_grad=True))


class _Root(torch.autograd.Function):
    """A copy of a tensor at which the graph starts.

    Not a leaf: a leaf would sum up the gradients of all backward passes, in place, in the very storage that a
    recorded gradient shares.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def detached(value: Any) -> Any:
    """Arguments of a module with their tensors outside the graph; dictionaries and tuples are walked."""
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(detached(item) for item in value)
    return value.detach() if isinstance(value, Tensor) else value

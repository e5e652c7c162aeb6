"""What a probe would cost, before it starts: from the model's configuration, without its weights.

A model is a stack of equal layers. Random models of two and of four layers, of the configured shape, run the
engine on two of the planned passes; the difference is two layers, the rest is embedding and head, and every pass
then costs what its tokens do. Memory is counted the same way: the most that a pass holds at a time.
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from peft import get_peft_model
from rich.text import Text
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from entangle.config import ProbeConfig
from entangle.data import TokenizedPair, collate, tokenize_pair
from entangle.inputs import load_pairs_of, model_options
from entangle.models import (
    Loading,
    Origin,
    adapter_config,
    check_positions,
    choose_parameters,
    find_origin,
    fresh_lora,
    load_tokenizer,
)
from entangle.probe import Plan, is_scorable, longest
from entangle.scores import fast_gemm, make_engine, row_logps


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes of one pass."""

    seconds: float
    bytes: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.seconds - other.seconds, self.bytes - other.bytes)

    def plus(self, other: Cost, times: float) -> Cost:
        """This and `times` of another."""
        return Cost(self.seconds + times * other.seconds, self.bytes + times * other.bytes)


@dataclass(frozen=True)
class Estimate:
    """What a probe would compute and cost.

    Args:
        pairs: pairs read, of which `scored` have scores.
        scored: pairs that go through the model.
        passes: forward and backward passes.
        tokens: tokens of all rows.
        seconds: time of the passes.
        weight_bytes: memory of the weights.
        pass_bytes: memory of the largest pass beside the weights.
    """

    pairs: int
    scored: int
    passes: int
    tokens: int
    seconds: float
    weight_bytes: float
    pass_bytes: float

    def __rich__(self) -> Text:
        return Text(
            f"{self.pairs} pairs, {self.scored} to be scored, {self.tokens:,} tokens in {self.passes} passes.\n"
            f"About {_duration(self.seconds)} of passes on this machine, and "
            f"{_size(self.weight_bytes + self.pass_bytes)} of memory: {_size(self.weight_bytes)} of weights and "
            f"{_size(self.pass_bytes)} for the largest pass. Nothing was computed or written."
        )


def estimate(config: ProbeConfig) -> Estimate:
    """What `run_probe` with these options would compute and cost; loads the tokenizer and the data, no weights.

    What --verify and --diagnostics add isn't counted, and a quantised base is counted as if it weren't.

    Raises:
        UserError: an option or the data can't be used, or no pair has anything to score.
    """
    options = model_options(config)
    loading = Loading(
        dtype=config.dtype, score_dtype=config.score_dtype, device=config.device,
        attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    origin = find_origin(
        options["model_name_or_path"], config.model_revision, options["adapter_name_or_path"]
    )
    pairs = load_pairs_of(config)
    tokenizer = load_tokenizer(origin, loading)
    tokenized = [tokenize_pair(tokenizer, pair, config.max_length) for pair in pairs]
    plan = Plan.make(tokenized, config)
    passes = [batch for shard in range(len(plan.shards)) for batch in plan.passes(shard)]
    shape = AutoConfig.from_pretrained(
        origin.base,
        revision=origin.base_revision,
        trust_remote_code=loading.trust_remote_code,
        dtype=loading.computing,
    )
    weights = _weight_bytes(shape) * (1 if config.ref_model_name_or_path is None else 2)
    if not passes:
        return Estimate(len(pairs), 0, 0, 0, 0.0, weights, 0.0)
    stack = Stack(shape, loading, config, origin)
    ordered = sorted(passes, key=_padded)
    middle, largest = ordered[len(ordered) // 2], ordered[-1]
    first = stack.cost(middle)
    costs = [first, first if largest is middle else stack.cost(largest)]
    seconds = sum(_interpolate(_padded(batch), (middle, largest), costs) for batch in passes)
    return Estimate(
        pairs=len(pairs), scored=sum(map(is_scorable, tokenized)), passes=len(passes),
        tokens=sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in tokenized),
        seconds=seconds, weight_bytes=weights, pass_bytes=costs[1].bytes,
    )  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """The configured model as a stack of layers, measured on random ones."""

    shape: PretrainedConfig
    loading: Loading
    config: ProbeConfig
    origin: Origin

    def cost(self, batch: Sequence[TokenizedPair]) -> Cost:
        """Cost of one pass through the whole stack: up to four layers as they are, further ones like the last two."""
        layers = self.shape.num_hidden_layers
        if layers <= 4:
            return self._measure(layers, batch)
        two, four = (self._measure(count, batch) for count in (2, 4))
        return four.plus(four - two, (layers - 4) / 2)

    def _measure(self, layers: int, batch: Sequence[TokenizedPair]) -> Cost:
        model = self._random(layers)
        engine = make_engine(model, choose_parameters(model, self.config.parameters), self.config.engine)
        check_positions(model, max(map(longest, batch)))
        rows = collate(batch, 0).to(self.loading.target)
        with_reference = self.origin.adapter is not None or self.config.use_peft
        metric = {name: torch.ones_like(p) for name, p in engine.parameters.items()}
        options: dict[str, Any] = {"modules": self.config.modules}
        options["metric"] = metric if self.config.metric != "sgd" else None

        def compute() -> None:
            engine.pairs(rows, **options)
            if with_reference:
                row_logps(model, rows)

        with fast_gemm() if self.config.fast_matmul else nullcontext():
            compute()  # the first pass checks itself too
            return Cost((_seconds(compute) + _seconds(compute)) / 2, peak_bytes(compute, self.loading.target))

    def _random(self, layers: int) -> nn.Module:
        shape = copy.deepcopy(self.shape)
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[:layers]
        shape.num_hidden_layers = layers
        model = AutoModelForCausalLM.from_config(
            shape, attn_implementation=self.loading.attn_implementation,
            trust_remote_code=self.loading.trust_remote_code,
        ).to(self.loading.target, self.loading.computing).eval()  # fmt: skip
        if self.origin.adapter:
            adapter = adapter_config(self.origin.adapter, self.origin.adapter_revision)
            adapter.base_model_name_or_path, adapter.inference_mode = None, False  # no name; to be probed
            return get_peft_model(model, adapter).eval()
        if self.config.use_peft:
            options = self.config.lora_r, self.config.lora_alpha, self.config.lora_target_modules, 0
            return fresh_lora(model, *options).eval()
        return model


def peak_bytes(compute: Callable[[], None], device: torch.device) -> float:
    """The most memory that `compute` holds on a device at a time, beyond what is held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        compute()
        return float(torch.cuda.max_memory_allocated(device) - before)
    with _Held() as held:
        compute()
    return float(held.peak)


class _Held(TorchDispatchMode):
    """Counts the bytes of the tensors made within it, until each is let go; for the CPU, which keeps no count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {
            id(storage) for storage in map(_storage, tree_leaves((args, kwargs))) if storage is not None
        }
        for storage in filter(None, map(_storage, tree_leaves(result))):
            if id(storage) not in before and storage not in self._known:
                self._known.add(storage)
                weakref.finalize(storage, self._let_go, storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    def _let_go(self, size: int) -> None:
        self.now -= size


def _storage(value: Any) -> torch.UntypedStorage | None:
    return value.untyped_storage() if isinstance(value, torch.Tensor) else None


def _seconds(compute: Callable[[], None]) -> float:
    started = time.perf_counter()
    compute()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _weight_bytes(shape: PretrainedConfig) -> float:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    return float(sum(p.numel() * p.element_size() for p in model.parameters()))


def _padded(batch: Sequence[TokenizedPair]) -> int:
    """Tokens of a pass with its padding."""
    return 2 * len(batch) * max(map(longest, batch))


def _interpolate(tokens: int, batches: Sequence[Sequence[TokenizedPair]], costs: Sequence[Cost]) -> float:
    """Seconds of a pass of so many tokens, on the line through two measured ones."""
    (x0, x1), (y0, y1) = map(_padded, batches), (cost.seconds for cost in costs)
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else y0 / x0
    return max(y0 + slope * (tokens - x0), 0.0)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

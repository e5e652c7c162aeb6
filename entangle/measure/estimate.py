"""What a probe would cost, before it starts: from the model's configuration, without its weights.

A random model of the configured shape runs the engine on three of the planned passes, and every other pass costs what
its tokens do. A large model is a stack of equal layers: two and four of them are run, the difference is two layers,
the rest is embedding and head. Memory is counted the same way: the most that a pass holds at a time. The first pass is
measured on its own, since the engine checks itself there.
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from rich.text import Text
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from entangle.config import ProbeConfig
from entangle.data import TokenizedPair, tokenize_pairs
from entangle.measure.inputs import load_pairs_of
from entangle.measure.passes import Measurement, column_functions, rows_of_pass
from entangle.measure.plan import Plan, is_scorable, longest
from entangle.measure.sets import affordable_groups
from entangle.models import (
    Loading,
    Origin,
    Policy,
    adapter_config,
    check_positions,
    choose_parameters,
    find_origin,
    fresh_lora,
    load_tokenizer,
)
from entangle.models.parameters import is_adapter_parameter
from entangle.models.reference import make_reference
from entangle.scores import fast_gemm, make_engine
from entangle.scores.sums import memory

WHOLE = 2.5e8
"""Bytes of weights up to which a model is measured with all of its layers."""


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes of one pass."""

    seconds: float
    bytes: float

    def deeper(self, other: Cost, times: float) -> Cost:
        """The cost of a stack that is `times` as much deeper than the `other`'s as the other is than this one's."""
        return Cost(
            other.seconds + times * (other.seconds - self.seconds),
            other.bytes + times * (other.bytes - self.bytes),
        )


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
        sum_bytes: memory of the sums of scores that the set's block is made of.
    """

    pairs: int
    scored: int
    passes: int
    tokens: int
    seconds: float
    weight_bytes: float
    pass_bytes: float
    sum_bytes: float = 0.0

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.weight_bytes + self.pass_bytes + self.sum_bytes

    def __rich__(self) -> Text:
        return Text(
            f"{self.pairs} pairs, {self.scored} to be scored, {self.tokens:,} tokens in {self.passes} passes.\n"
            f"About {_duration(self.seconds)} of passes on this machine, and "
            f"{_size(self.bytes)} of memory: {_size(self.weight_bytes)} of weights, {_size(self.pass_bytes)} for the "
            f"largest pass, {_size(self.sum_bytes)} for sums over the set. Nothing was computed or written."
        )


def estimate(config: ProbeConfig) -> Estimate:
    """What `run_probe` with these options would compute and cost; loads the tokenizer and the data, no weights.

    What --verify adds isn't counted, and a quantised base is counted as if it weren't.

    Raises:
        UserError: an option or the data can't be used, or no pair has anything to score.
    """
    options = config.located
    loading = Loading(
        dtype=config.dtype,
        score_dtype=config.score_dtype,
        device=config.device,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    origin = find_origin(options.model_name_or_path, config.model_revision, options.adapter_name_or_path)
    pairs = load_pairs_of(config)
    tokenizer = load_tokenizer(origin, loading)
    tokenized = tokenize_pairs(tokenizer, pairs, config.max_length, skip_invalid=config.skip_invalid).tokens
    plan = Plan.make(tokenized, config.shard_size, config.batch_size)
    passes = [batch for shard in range(len(plan.shards)) for batch in plan.passes(shard)]
    shape = AutoConfig.from_pretrained(
        origin.base,
        revision=origin.base_revision,
        trust_remote_code=loading.trust_remote_code,
        dtype=loading.computing,
    )
    stack = Stack(shape, loading, config, origin, tokenizer)
    weights = stack.weight_bytes
    if not passes:
        return Estimate(len(pairs), 0, 0, 0, 0.0, weights, 0.0)
    further = sorted(passes[1:], key=_padded)
    measured = (
        list({id(batch): batch for batch in (further[len(further) // 2], further[-1])}.values())
        if further
        else []
    )
    first, *costs = stack.costs(passes[0], measured)
    sizes, seconds = [0, *map(_padded, measured)], [0.0, *(cost.seconds for cost in costs)]
    rest = np.interp(list(map(_padded, further)), sizes, seconds)  # the last one measured is the largest
    return Estimate(
        pairs=len(pairs),
        scored=sum(map(is_scorable, tokenized)),
        passes=len(passes),
        tokens=sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in tokenized),
        seconds=first.seconds + float(rest.sum()),
        weight_bytes=weights,
        pass_bytes=resident(max(cost.bytes for cost in (first, *costs)), loading.target),
        sum_bytes=stack.sum_bytes,
    )


@dataclass(frozen=True)
class Stack:
    """The configured model as a stack of layers, measured on random ones."""

    shape: PretrainedConfig
    loading: Loading
    config: ProbeConfig
    origin: Origin
    tokenizer: PreTrainedTokenizerBase

    @property
    def weight_bytes(self) -> float:
        """Memory of the policy's weights, its adapter's among them, and of a second model's, taken to be as large."""
        model = self._random(self.shape.num_hidden_layers, torch.device("meta"))
        size = sum(p.nbytes for p in model.parameters())
        base = sum(p.nbytes for name, p in model.named_parameters() if not is_adapter_parameter(name))
        return float(size if self.config.ref_model_name_or_path is None else size + base)

    @property
    def sum_bytes(self) -> float:
        """Memory of the sums of scores over groups of pairs."""
        model = self._random(self.shape.num_hidden_layers, torch.device("meta"))
        parameters = choose_parameters(model, self.config.parameters)
        return float(memory(parameters, affordable_groups(parameters)))

    def costs(self, first: Sequence[TokenizedPair], further: Sequence[Sequence[TokenizedPair]]) -> list[Cost]:
        """Costs of a run's first pass, with the engine's check of itself, and of further ones.

        A stack of four layers or up to `WHOLE` bytes is measured as it is; in a larger one, every further layer costs
        what the last two of four do.
        """
        layers = self.shape.num_hidden_layers
        if layers <= 4 or self.weight_bytes <= WHOLE:
            return self._measure(layers, first, further)
        two, four = (self._measure(count, first, further) for count in (2, 4))
        return [a.deeper(b, (layers - 4) / 2) for a, b in zip(two, four, strict=True)]

    def _measure(
        self, layers: int, first: Sequence[TokenizedPair], further: Sequence[Sequence[TokenizedPair]]
    ) -> list[Cost]:
        device = self.loading.target
        model = self._random(layers, device)
        check_positions(model, max(map(longest, (*first, *chain(*further)))))
        second = model if self.config.ref_model_name_or_path else None
        policy = Policy(
            model,
            self.tokenizer,
            choose_parameters(model, self.config.parameters),
            make_reference(self.config.reference, model, second),
        )
        metric = {name: torch.ones_like(p) for name, p in policy.parameters.items()}

        def new() -> Measurement:
            engine = make_engine(model, policy.parameters, self.config.engine)
            weights = None if self.config.metric == "sgd" else metric
            return Measurement(
                policy, engine, column_functions(self.config.diagnostics), self.config.modules, weights
            )

        with fast_gemm() if self.config.fast_matmul else nullcontext():
            work = new()
            seconds = _seconds(partial(rows_of_pass, first, work))
            costs = [Cost(seconds, peak_bytes(lambda: rows_of_pass(first, new()), device))]
            for batch in further:
                compute = partial(rows_of_pass, batch, work)
                seconds = min(_seconds(compute), _seconds(compute))
                costs.append(Cost(seconds, peak_bytes(compute, device)))
        return costs

    def _random(self, layers: int, device: torch.device) -> PreTrainedModel | PeftModel:
        shape = copy.deepcopy(self.shape)
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[:layers]
        shape.num_hidden_layers = layers
        with device:
            model = AutoModelForCausalLM.from_config(
                shape,
                attn_implementation=self.loading.attn_implementation,
                trust_remote_code=self.loading.trust_remote_code,
            ).to(self.loading.computing)
            if self.origin.adapter:
                adapter = adapter_config(self.origin.adapter, self.origin.adapter_revision)
                adapter.base_model_name_or_path, adapter.inference_mode = None, False  # no name; to be probed
                model = get_peft_model(model, adapter)
                for name, parameter in model.named_parameters():
                    if ".lora_B" in name:  # a trained one isn't 0, so its policy isn't its reference
                        nn.init.normal_(parameter, std=0.02)
            elif self.config.use_peft:
                options = self.config.lora_r, self.config.lora_alpha, self.config.lora_target_modules, 0
                model = fresh_lora(model, *options)
        return model.eval()


def resident(held: float, device: torch.device) -> float:
    """Memory that a process takes while its tensors hold so much.

    The C allocator hands freed blocks back late and in pieces: 1.1 to 1.4 times of what is held was seen on the CPU
    (`benchmarks/estimate.py`), and some 20 MB for what the libraries allocate themselves.
    """
    return 1.25 * held + 2e7 if device.type == "cpu" else held


def peak_bytes(compute: Callable[[], object], device: torch.device) -> float:
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


def _seconds(compute: Callable[[], object]) -> float:
    started = time.perf_counter()
    compute()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _padded(batch: Sequence[TokenizedPair]) -> int:
    """Tokens of a pass with its padding."""
    return 2 * len(batch) * max(map(longest, batch))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

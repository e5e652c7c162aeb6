"""The policy, its adapter, its reference and its probed parameters, loaded and checked.

A `Policy` is ready to be measured: its probed parameters chosen, its reference named and provable. Weights are read
from safetensors only; nothing of a model is executed unless `trust_remote_code` says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from entangle.analysis.geometry import RESOLUTION, logp_resolution
from entangle.config import EMBEDDED, ModelOptions
from entangle.data import PreferencePair, TokenizedPair, TokenizedPairs, collate, tokenize_pairs
from entangle.errors import ConfigError, ModelError
from entangle.models.identity import commit_of, describe, identity_of
from entangle.models.loading import (
    Loading,
    check_vocabulary,
    coarsest_dtype,
    embedding_of,
    fresh_lora,
    load_adapter,
    load_base,
    load_second,
    load_start,
    load_tokenizer,
    pad_id,
    vocabulary_of,
)
from entangle.models.notes import is_zero_lora, notes_on
from entangle.models.origin import Origin, find_origin
from entangle.models.parameters import choose_parameters
from entangle.models.reference import (
    AdapterOff,
    Columns,
    Itself,
    Reference,
    SecondModel,
    adapter_off,
    check_reference_options,
    make_reference,
)
from entangle.models.start import Start, find_start
from entangle.models.state import lent, wanting_as_before
from entangle.scores.logps import causal_lm, evaluating, input_device, row_logps
from entangle.scores.rows import RowBatch


@dataclass(frozen=True)
class Policy:
    """A model that is ready to be probed.

    Args:
        model: from `load_policy`, in eval mode, with `requires_grad` set on the probed parameters and on no others;
            from `Policy.of`, as its owner has it, and within `ready` likewise.
        tokenizer: its tokenizer.
        parameters: the probed parameters, named as in `model.named_parameters()`.
        trained: names of the parameters that a training run would update: the adapter's, or all without one.
        reference: where reference log-probs come from.
        identity: hashes of what decides the numbers; a resumed run must find the same.
        description: names, sizes and precision, for people.
        notes: what the reader of the numbers should know.
        base_echo: `(V,)` logits of the base on fixed tokens, taken before the adapter was put on; None
            without an adapter.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    parameters: dict[str, nn.Parameter]
    reference: Reference
    trained: tuple[str, ...] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    base_echo: Tensor | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference: str | PreTrainedModel | PeftModel = "auto",
        parameters: str | None = None,
    ) -> Policy:
        """A policy from a model in memory, which stays as it is: its mode and `requires_grad` are left alone.

        What measures it puts it into eval mode, asks for gradients of the probed parameters, and gives it back as it
        was (`ready`), so that a model may be probed in the middle of its training. Scores have the precision of its
        weights. The description and the notes are of the model as it stands; after further training make another.

        Args:
            model: a causal language model of transformers, or a PEFT model on one; without wrappers (DDP, compile).
            tokenizer: its tokenizer.
            reference: `auto`: a PEFT model with its adapter off (or its adapter `ref`, which TRL keeps), for any other
                model the pairs' own columns, else the model itself; further `adapter_off`, `columns`, `self`, `none`,
                or a second model.
            parameters: the probed ones: `lora`, `full`, or a regular expression over names; None: those that want a
                gradient, and where none does those of the adapter, or without one all.

        Raises:
            ModelError: the model is wrapped or of another kind, the reference can't be had, or nothing is selected.
        """
        _check_bare(model, "model")
        second = None
        if not isinstance(reference, str):
            _check_bare(reference, "reference")
            second, reference = reference, "auto"
        has_adapter = isinstance(model, PeftModel)
        check_reference_options(reference, second is not None, has_adapter)
        source = make_reference(reference, model, second)
        if isinstance(source, AdapterOff):
            _check_base_untouched(source.model)
        base = causal_lm(model)
        assert isinstance(base, PreTrainedModel)
        check_vocabulary(tokenizer, base, type(base).__name__)
        with wanting_as_before(model):
            if isinstance(model, PeftModel) and not any(p.requires_grad for p in model.parameters()):
                # loaded for inference: its adapter is what could be trained
                model.set_adapter(cast(str, model.active_adapter))
            trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
            chosen = choose_parameters(model, parameters)
        if parameters is None and trained:
            chosen = {name: p for name, p in chosen.items() if name in trained}
        precision = str(coarsest_dtype(model)).removeprefix("torch.")
        loading = Loading(dtype=precision, score_dtype=precision)
        name = base.config.name_or_path or type(base).__name__
        names = {
            "model_name_or_path": name,
            "model_revision": commit_of(base),
            "adapter_name_or_path": None,
            "ref_model_name_or_path": None if second is None else type(causal_lm(second)).__name__,
            "reference": source.name,
        }
        return cls(
            model=model,
            tokenizer=tokenizer,
            parameters=chosen,
            reference=source,
            trained=trained,
            description=describe(base, model, chosen, names, loading),
            notes=notes_on(model, loading, Origin(name)),
        )

    @contextmanager
    def ready(self) -> Iterator[Policy]:
        """Within: the model is in eval mode and exactly the probed parameters want a gradient.

        Afterwards mode, `requires_grad`, `.grad` and random state are as before, so a training goes on bit for bit.
        """
        with lent(self.model, self.parameters.values()):
            yield self

    @property
    def device(self) -> torch.device:
        """Where the model takes its token ids."""
        return input_device(self.model)

    @property
    def pad_id(self) -> int:
        """A filler token: the tokenizer's pad, else its end of sequence, else 0. Masks decide what counts."""
        return pad_id(self.tokenizer, self.model)

    @property
    def score_dtype(self) -> torch.dtype:
        """The coarsest precision among the model's weights: what a score can be trusted to."""
        return coarsest_dtype(self.model)

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model's positions reach; a longer row is an error or outside its training."""
        return max_positions(self.model)

    @property
    def is_its_reference(self) -> bool:
        """Whether policy and reference are one function: the policy itself, or a LoRA whose every B is 0."""
        if isinstance(self.reference, AdapterOff | SecondModel):
            return is_zero_lora(self.model)  # `check_reference` proves it
        return isinstance(self.reference, Itself)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has embeddings for."""
        return vocabulary_of(self.model)

    def tokenize(
        self, pairs: Sequence[PreferencePair], max_length: int | None = 1024, *, skip_invalid: bool = False
    ) -> TokenizedPairs:
        """Pairs as token ids of this model, with notes (see `entangle.data.tokenize_pairs`)."""
        return tokenize_pairs(
            self.tokenizer, pairs, max_length, vocabulary=self.vocabulary, skip_invalid=skip_invalid
        )

    def collate(self, pairs: Sequence[TokenizedPair]) -> RowBatch:
        """Pairs as a batch on the model's device."""
        return collate(pairs, self.pad_id).to(self.device)


def settle_reference(policy: Policy, pairs: Sequence[PreferencePair]) -> Policy:
    """The policy with its reference decided, where the data decides it: the data's columns, or the policy itself.

    A model without adapter and without a second model is where a preference training would start, and TRL then takes
    a frozen copy of it as the reference: every log-ratio is 0.
    """
    if not isinstance(policy.reference, Columns) or policy.reference.required:
        return policy
    reference: Reference = Columns()
    notes = policy.notes
    if all(pair.ref_chosen_logps is None for pair in pairs):
        reference = Itself(policy.model)
        notes = (
            "The reference is the policy itself, as it stands (as in TRL at the start of a training): every log-ratio "
            "is 0. If this model is trained already, name what its training began from: --ref_model_name_or_path.",
            *notes,
        )
    description = dict(policy.description) | {"reference": reference.name}
    return replace(policy, reference=reference, description=description, notes=notes)


def load_policy(
    model: str | os.PathLike[str] | ModelOptions = EMBEDDED,
    *,
    seed: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Policy:
    """Load a policy, with its adapter and its reference, and choose what is probed.

    Args:
        model: the model or adapter by hub id or folder (`embedded`: the one that ships with the package), or all
            options in one. The scores of a bfloat16 model in float32 are those of the function that its weights stand
            for: the rounding inside its own forward and backward pass is left out.
        seed: of a fresh LoRA's A (42 if None). Its B is 0, so the policy equals its reference and the gradient in A is
            0.
        device: where to load, for a caller that has several; that of `ModelOptions` comes first.
        options: further fields of `entangle.config.ModelOptions`, where what each means stands: adapter_name_or_path,
            reference, parameters, dtype, use_peft, ...

    Raises:
        ConfigError: an option isn't known, or its value makes no sense.
        ModelError: something can't be found, loaded or fitted together.
    """
    _check_known(options)
    given = model if isinstance(model, ModelOptions) else ModelOptions(os.fspath(model))
    return _load(replace(given, **options).located, seed, device)


def _check_known(options: Mapping[str, Any]) -> None:
    known = [option.name for option in fields(ModelOptions)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(f"load_policy has no option {unknown[0]!r}. Known: {', '.join(known)}.")


def _load(options: ModelOptions, seed: int | None, device: str | None) -> Policy:
    adapter, second_name = options.adapter_name_or_path, options.ref_model_name_or_path
    loading = Loading(
        options.dtype,
        options.score_dtype,
        options.device or device,
        options.device_map,
        options.attn_implementation,
        options.trust_remote_code,
        options.load_in_4bit,
        options.load_in_8bit,
    )
    origin = find_origin(
        _name(options.model_name_or_path), options.model_revision, adapter and _name(adapter)
    )
    if options.use_peft and origin.adapter:
        raise ModelError(
            f"use_peft puts a fresh LoRA on the model, but there is an adapter already ({origin.adapter}). "
            "Drop one."
        )
    check_reference_options(
        options.reference, second_name is not None, options.use_peft or bool(origin.adapter)
    )
    start = find_start(origin, options.reference) if second_name is None else Start()
    base = load_base(origin, loading)
    tokenizer = load_tokenizer(origin, loading)
    check_vocabulary(tokenizer, base, origin.base)
    echo = _echo(base) if origin.adapter or options.use_peft else None
    model: PreTrainedModel | PeftModel = base
    if origin.adapter:
        model = load_adapter(base, origin.adapter, origin.adapter_revision)
    elif options.use_peft:
        model = fresh_lora(base, options.lora_r, options.lora_alpha, options.lora_target_modules, seed)
    model.eval()
    trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    chosen = choose_parameters(model, options.parameters)
    second = None
    if second_name is not None:
        second = load_second(_name(second_name), loading, tokenizer)
    elif start.adapter is not None:
        second = load_start(origin, start.adapter, loading)
    source = make_reference(options.reference, model, second)
    if isinstance(source, AdapterOff) and echo is not None:
        _check_echo(source.model, echo)
    names = {
        "model_name_or_path": origin.base,
        "model_revision": commit_of(base) or origin.base_revision,
        "adapter_name_or_path": origin.adapter,
        "ref_model_name_or_path": second_name or start.adapter,
        "reference": source.name,
    }
    return Policy(
        model=model,
        tokenizer=tokenizer,
        parameters=chosen,
        reference=source,
        trained=trained,
        identity=identity_of(origin.base, base, model, tokenizer),
        description=describe(base, model, chosen, names, loading),
        notes=(*filter(None, [start.note]), *notes_on(model, loading, origin)),
        base_echo=echo,
    )


def _check_bare(model: Any, role: str) -> None:
    """Refuse what isn't a model of transformers or PEFT itself."""
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise ModelError(
            f"Expected as {role} a PreTrainedModel or a PeftModel; got {type(model).__name__}. Take a model out of its "
            "wrapper first: accelerator.unwrap_model(model)."
        )


_MOVING = ("pissa", "olora", "corda", "loftq")
"""Beginnings of LoRA's initialisations that take something off the base's own weights."""


def _check_base_untouched(model: PeftModel) -> None:
    """Refuse the base with its adapter off as the reference where putting the adapter on has changed the base."""
    start = getattr(model.active_peft_config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_MOVING):
        raise ModelError(
            f"The adapter was initialised by {start}, which changes the base's own weights, so the model with its "
            "adapter off isn't what the training began from. Give that as the reference: reference=MODEL."
        )


def max_positions(model: nn.Module) -> int | None:
    """Tokens that a model's positions reach, as its configuration says; None where it doesn't."""
    config = causal_lm(model).config.get_text_config()  # pyright: ignore
    return getattr(config, "max_position_embeddings", None)


def check_positions(model: nn.Module, longest: int) -> list[str]:
    """Notes on rows of `longest` tokens beyond the positions that the model was made for.

    Raises:
        ModelError: positions are learned (GPT-2, OPT), so there are none beyond.
    """
    known = max_positions(model)
    if known is None or longest - 1 <= known:  # a row's last token is scored and never read
        return []
    words = set(embedding_of(model).modules())
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m not in words)
    if any(known <= table.num_embeddings <= known + 8 for table in tables):  # OPT keeps two rows for padding
        raise ModelError(
            f"The longest row has {longest} tokens, and {type(causal_lm(model)).__name__} has positions for {known}. "
            f"Give --max_length {known}: longer responses are cut at the right, and pairs with longer prompts dropped."
        )
    return [f"The longest row has {longest} tokens; the model was made for at most {known} positions."]


def _name(name: str) -> str:
    return os.path.expanduser(name)


def check_reference(policy: Policy, batch: RowBatch) -> None:
    """Prove on a batch that the reference is what it claims to be.

    - With the adapter off, the model gives the logits that the base gave before the adapter was put on.
    - While every B of a LoRA is 0, policy and reference agree: every log-ratio is 0.
    - Once a B isn't, switching the adapter off changes something.

    NaN agrees with NaN here: broken weights are reported per pair, not as a wrong reference.

    Raises:
        ModelError: one of these fails.
    """
    if not isinstance(policy.model, PeftModel) or not isinstance(policy.reference, AdapterOff | SecondModel):
        return
    is_off = isinstance(policy.reference, AdapterOff)
    if is_off and policy.base_echo is not None:
        _check_echo(policy.model, policy.base_echo)
    logps, reference = row_logps(policy.model, batch), policy.reference.logps(batch)
    if is_zero_lora(policy.model):
        tolerance = 10 * logp_resolution(RESOLUTION[policy.score_dtype])
        if not torch.allclose(logps, reference.to(logps), rtol=tolerance, atol=tolerance, equal_nan=True):
            raise ModelError(
                "The LoRA is untrained (every B is 0), so policy and reference should agree; their log-probs "
                f"differ by up to {_largest_difference(logps, reference):.3g} nats. The reference is another "
                "model than the policy's base (or it is quantised, or in another precision). Name the base, "
                "or drop ref_model_name_or_path so that the adapter is switched off."
            )
    elif is_off and torch.equal(logps, reference) and bool(logps.isfinite().all()):
        raise ModelError(
            "The adapter's weights aren't 0, yet switching it off changes no log-prob: the adapter isn't "
            "active, so policy and reference are one model. Check the adapter's target modules and its scale "
            "(lora_alpha)."
        )


def _check_echo(model: PeftModel, expected: Tensor) -> None:
    with adapter_off(model):
        echo = _echo(model)
    scale = float(expected.abs().max()) if expected.isfinite().all() else 1.0
    tolerance = 10 * logp_resolution(RESOLUTION[coarsest_dtype(model)]) * max(scale, 1.0)
    if not torch.allclose(echo, expected, rtol=0, atol=tolerance, equal_nan=True):
        raise ModelError(
            "With its adapter off the model isn't its base any more (logits differ by up to "
            f"{_largest_difference(echo, expected):.3g}): the adapter brings weights of the base itself "
            "(trained biases or embeddings, or an initialisation such as PiSSA). Give the base as "
            "ref_model_name_or_path."
        )


def _largest_difference(first: Tensor, second: Tensor) -> float:
    return float((first - second.to(first)).abs().nan_to_num(nan=float("inf")).max())


@torch.no_grad()
def _echo(model: nn.Module) -> Tensor:
    """Logits `(V,)` after sixteen fixed tokens: a fingerprint of the function that the model computes."""
    ids = torch.arange(16, device=input_device(model)) % vocabulary_of(model)
    with evaluating(model):
        return model(input_ids=ids[None], use_cache=False).logits[0, -1].float().cpu()

"""The policy, its adapter, its reference and its probed parameters, loaded and checked.

A `Policy` is ready to be measured: in eval mode, gradients wanted for exactly the probed parameters, its
reference named and provable. Weights are read from safetensors only; nothing of a model is executed unless
`trust_remote_code` says so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.hub import cached_file

from entangle.data import TokenizedPair, collate, is_local
from entangle.errors import UserError
from entangle.geometry import RESOLUTION
from entangle.rows import RowBatch
from entangle.scores.logps import evaluating, input_device, row_logps

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
REFERENCES = ("auto", "adapter_off", "model", "columns", "self", "none")

_LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)


class ModelError(UserError):
    """A model, adapter, reference or parameter choice can't be used: expected, came, what to do."""


# --- references ---------------------------------------------------------------------------------------------


class Reference(ABC):
    """Where the log-probs of the reference policy come from."""

    name: ClassVar[str]

    @abstractmethod
    def logps(self, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> Tensor | None:
        """Log pi_ref(response | prompt) of the batch's rows, `(rows,)` float64, nats; None: no reference.

        Args:
            batch: the rows.
            pairs: the pairs that the rows were collated from, in their order; only columns are read from
                them.
        """


@dataclass(frozen=True)
class AdapterOff(Reference):
    """The base that the adapter sits on: what DPO with LoRA starts from."""

    model: PeftModel
    name: ClassVar[str] = "adapter_off"

    def logps(self, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> Tensor:
        """Log-probs with the adapter switched off."""
        with adapter_off(self.model):
            return row_logps(self.model, batch)


@dataclass(frozen=True)
class SecondModel(Reference):
    """Another model with the same tokens."""

    model: nn.Module
    name: ClassVar[str] = "model"

    def logps(self, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> Tensor:
        """Log-probs under the second model."""
        return row_logps(self.model, batch)


@dataclass(frozen=True)
class Itself(Reference):
    """The policy as it is, frozen: every log-ratio is 0, as at the first step of a training run."""

    model: nn.Module
    name: ClassVar[str] = "self"

    def logps(self, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> Tensor:
        """Log-probs under the policy itself."""
        return row_logps(self.model, batch)


@dataclass(frozen=True)
class Columns(Reference):
    """Log-probs that the data set carries (`ref_chosen_logps`, `ref_rejected_logps`).

    Args:
        required: refuse pairs without them; otherwise data without them has no reference.
    """

    required: bool = True
    name: ClassVar[str] = "columns"

    def logps(self, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> Tensor | None:
        """The columns of the pairs.

        Raises:
            ModelError: a pair has none (unless no pair has and they aren't required), or a value is above 0.
        """
        values = [p.ref_chosen_logps for p in pairs] + [p.ref_rejected_logps for p in pairs]
        if not self.required and all(value is None for value in values):
            return None
        known = [value for value in values if value is not None]
        if len(known) < len(batch.input_ids):
            lacking = [p.index for p in pairs if p.ref_chosen_logps is None or p.ref_rejected_logps is None]
            raise ModelError(
                "Expected reference log-probs (ref_chosen_logps, ref_rejected_logps) for every pair; rows "
                f"without them: {lacking[:10]}. Complete the columns, or choose another reference."
            )
        logps = torch.tensor(known, dtype=torch.float64)
        if bool((logps > 0).any()):
            raise ModelError(
                f"ref_chosen_logps and ref_rejected_logps are summed log-probs, so none is above 0; got "
                f"{float(logps.max()):g}. Rewards or losses don't belong there."
            )
        return logps


@dataclass(frozen=True)
class NoReference(Reference):
    """There is none: only losses that don't compare with one can be judged."""

    name: ClassVar[str] = "none"

    def logps(self, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> None:
        """None."""
        return None


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Within: the model computes as its base does.

    PEFT marks every adapter parameter trainable when it switches the adapter on again; which ones want a
    gradient is restored here.
    """
    wanted = {p: p.requires_grad for p in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, needed in wanted.items():
            parameter.requires_grad_(needed)


# --- the policy ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """A model that is ready to be probed.

    Args:
        model: in eval mode, with `requires_grad` set on the probed parameters and on no others.
        tokenizer: its tokenizer.
        parameters: the probed parameters, named as in `model.named_parameters()`.
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
    identity: Mapping[str, Any] = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    base_echo: Tensor | None = None

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
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def collate(self, pairs: Sequence[TokenizedPair]) -> RowBatch:
        """Pairs as a batch on the model's device."""
        return collate(pairs, self.pad_id).to(self.device)


def pad_id(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> int:
    """The pad token's id, else the end-of-sequence token's, else 0; 0 too for an id that the model lacks."""
    vocabulary = _embedding(model).num_embeddings
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int) and 0 <= token < vocabulary:
            return token
    return 0


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point type of the model's weights with the largest rounding error."""
    dtypes = {p.dtype for p in model.parameters() if p.dtype in RESOLUTION}
    if not dtypes:
        found = sorted({str(p.dtype) for p in model.parameters()})
        raise ModelError(f"Expected weights in one of {', '.join(DTYPES)}; got {', '.join(found)}.")
    return max(dtypes, key=lambda dtype: RESOLUTION[dtype])


@dataclass(frozen=True)
class Loading:
    """How weights are read, the same for policy and reference."""

    dtype: str = "float32"
    device: str | None = None
    device_map: str | dict[str, Any] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ModelError(f"Unknown dtype {self.dtype!r}. Known: {', '.join(DTYPES)}.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ModelError("load_in_4bit and load_in_8bit exclude each other; both were given.")
        if self.is_quantised and importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(
                "Loading in 4 or 8 bits needs the package bitsandbytes, which isn't installed. "
                "Install it with: pip install 'entangle[quantization]'"
            )

    @property
    def is_quantised(self) -> bool:
        """Whether the base is loaded in 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def target(self) -> torch.device:
        """The device asked for; by default the GPU if there is one, else the CPU."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_policy(
    model_name_or_path: str | Path,
    *,
    adapter_name_or_path: str | Path | None = None,
    model_revision: str = "main",
    dtype: str = "float32",
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    use_peft: bool = False,
    lora_r: int = 16,
    lora_alpha: int = 32,
    lora_target_modules: str | Sequence[str] = "all-linear",
    parameters: str | None = None,
    reference: str = "auto",
    ref_model_name_or_path: str | Path | None = None,
    seed: int | None = None,
) -> Policy:
    """Load a policy, with its adapter and its reference, and choose what is probed.

    Args:
        model_name_or_path: a hub id or a folder; a folder or id of an adapter brings its own base.
        adapter_name_or_path: an adapter to put on the model (this also overrides the adapter's own base).
        model_revision: branch, tag or commit of a hub model.
        dtype: precision of the weights.
        device: where to load; by default the GPU if there is one.
        device_map: spread over devices, as in transformers; then `device` isn't used.
        attn_implementation: as in transformers.
        trust_remote_code: run code that comes with the model. Only for authors you trust.
        load_in_4bit: load the base in 4 bits (NF4), computing in `dtype`.
        load_in_8bit: load the base in 8 bits.
        use_peft: put a fresh LoRA on the model, as a training run would start. Its B is 0, so the policy
            equals its reference and the gradient in A is 0.
        lora_r: rank of a fresh LoRA.
        lora_alpha: its scale is lora_alpha / lora_r.
        lora_target_modules: modules it is put on.
        parameters: what is probed. None: the adapter's parameters, or all without an adapter. "lora": the
            adapter's factors. "full": every parameter that isn't the adapter's. Else a regular expression
            that is searched for in parameter names.
        reference: "adapter_off", "model" (`ref_model_name_or_path`), "columns" of the data, "self" or "none".
            "auto" is the second model if one is named, else the adapter switched off, else the columns where
            the data has them.
        ref_model_name_or_path: the second model.
        seed: of the fresh LoRA's A (42 if None).

    Raises:
        ModelError: something can't be found, loaded or fitted together.
    """
    loading = Loading(
        dtype,
        device,
        device_map,
        attn_implementation,
        trust_remote_code,
        load_in_4bit,
        load_in_8bit,
    )
    origin = find_origin(
        _name(model_name_or_path), model_revision, adapter_name_or_path and _name(adapter_name_or_path)
    )
    if use_peft and origin.adapter:
        raise ModelError(
            f"use_peft puts a fresh LoRA on the model, but there is an adapter already ({origin.adapter}). "
            "Drop one."
        )
    _check_reference_options(reference, ref_model_name_or_path is not None, use_peft or bool(origin.adapter))
    base = load_base(origin, loading)
    tokenizer = load_tokenizer(origin, loading)
    _check_vocabulary(tokenizer, base, origin.base)
    echo = _echo(base) if origin.adapter or use_peft else None
    model: PreTrainedModel | PeftModel = base
    if origin.adapter:
        model = load_adapter(base, origin.adapter, origin.adapter_revision)
    elif use_peft:
        model = fresh_lora(base, lora_r, lora_alpha, lora_target_modules, seed)
    model.eval()
    chosen = choose_parameters(model, parameters)
    second = None
    if ref_model_name_or_path is not None:
        second = _load_second(_name(ref_model_name_or_path), loading, tokenizer)
    source = _make_reference(reference, model, second)
    names = {
        "model_name_or_path": origin.base,
        "model_revision": _commit(base) or origin.base_revision,
        "adapter_name_or_path": origin.adapter,
        "ref_model_name_or_path": ref_model_name_or_path and str(ref_model_name_or_path),
        "reference": source.name,
    }
    return Policy(
        model=model,
        tokenizer=tokenizer,
        parameters=chosen,
        reference=source,
        identity=_identity(origin.base, base, model, tokenizer),
        description=_describe(base, model, chosen, names, loading),
        notes=_notes(model, loading),
        base_echo=echo,
    )


def _name(name: str | Path) -> str:
    return os.path.expanduser(str(name))


# --- names and folders --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """A base model and perhaps an adapter, each a folder or a hub id with its revision."""

    base: str
    base_revision: str = "main"
    adapter: str | None = None
    adapter_revision: str = "main"


def find_origin(name: str, revision: str = "main", adapter: str | None = None) -> Origin:
    """What the user named: an adapter's name stands for its base and itself.

    Raises:
        ModelError: there is no such folder, it holds neither model nor adapter, two adapters are named, or an
            adapter's base isn't where it says.
    """
    for given in filter(None, (name, adapter)):
        if is_local(given) and not Path(given).is_dir():
            raise ModelError(
                f"Expected a folder with a model or an adapter at {given}; there is none "
                f"(working folder: {Path.cwd()})."
            )
    if not _is_adapter(name, revision):
        return Origin(name, revision, adapter)
    if adapter is not None:
        raise ModelError(
            f"{name} holds an adapter, and a second one is given ({adapter}). Give the base model and one "
            "adapter."
        )
    config = _adapter_config(name, revision)
    base = config.base_model_name_or_path
    if not base or (is_local(base) and not Path(base).is_dir()):
        raise ModelError(
            f"The adapter {name} says that its base is {base!r}, and there is no such folder here. Give the "
            "base as model_name_or_path and this folder as adapter_name_or_path."
        )
    return Origin(base, config.revision or "main", name, revision)


def _is_adapter(name: str, revision: str) -> bool:
    if is_local(name):
        folder = Path(name)
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            there = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
            raise ModelError(
                f"Expected config.json (a model) or adapter_config.json (an adapter) in {name}; it holds "
                f"{there}. A run's checkpoints are usually in its checkpoint-* folders."
            )
    return _has_file(name, "adapter_config.json", revision)


def _has_file(name: str, file: str, revision: str) -> bool:
    """Whether a folder or a hub repository has a file; False too where the hub can't be reached."""
    if is_local(name):
        return (Path(name) / file).is_file()
    try:
        return cached_file(name, file, revision=revision) is not None
    except OSError:
        return False  # loading the model itself will say what is wrong


def _adapter_config(name: str, revision: str) -> PeftConfig:
    if is_local(name) and not (Path(name) / "adapter_config.json").is_file():
        raise ModelError(f"Expected adapter_config.json in {name}; there is none, so it isn't an adapter.")
    try:
        return PeftConfig.from_pretrained(name, revision=revision)
    except (*_LOADING_ERRORS, TypeError) as error:
        raise ModelError(f"Can't read the adapter {name}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The part of a library's message that a user can act on."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}{'...' if len(text) > 400 else ''}"


# --- loading ------------------------------------------------------------------------------------------------


def load_base(origin: Origin, loading: Loading) -> PreTrainedModel:
    """A causal language model without adapter, in eval mode, every weight of it from the checkpoint.

    Raises:
        ModelError: it can't be loaded, or the checkpoint lacks weights (transformers would invent them).
    """
    name = origin.base
    options: dict[str, Any] = {"device_map": loading.device_map}
    if loading.is_quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=loading.load_in_4bit,
            load_in_8bit=loading.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=DTYPES[loading.dtype],
        )
        options["device_map"] = loading.device_map or {"": loading.target}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=origin.base_revision,
            dtype=DTYPES[loading.dtype],
            attn_implementation=loading.attn_implementation,
            trust_remote_code=loading.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except _LOADING_ERRORS as error:
        where = "from its folder" if is_local(name) else "from the hub (there is no such folder here)"
        raise ModelError(
            f"Can't load the model {name!r} {where}: {_reason(error)} Expected a causal language model with "
            "safetensors weights; offline, a hub model must have been downloaded before."
        ) from error
    model, report = loaded
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ModelError(
            f"The checkpoint {name!r} lacks weights of {type(model).__name__} ({len(lacking)}, such as "
            f"{lacking[0]}): it isn't a whole causal language model."
        )
    if options["device_map"] is None:
        model.to(loading.target)
    return model.eval()


def load_tokenizer(origin: Origin, loading: Loading) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter (it has the chat template of the training), or else the base's."""
    name, revision = origin.base, origin.base_revision
    if origin.adapter and _has_file(origin.adapter, "tokenizer_config.json", origin.adapter_revision):
        name, revision = origin.adapter, origin.adapter_revision
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=loading.trust_remote_code
        )
    except _LOADING_ERRORS as error:
        raise ModelError(
            f"Can't load a tokenizer from {name!r}: {_reason(error)} Save the model's tokenizer in the same "
            "folder."
        ) from error


def load_adapter(base: PreTrainedModel, name: str, revision: str = "main") -> PeftModel:
    """The adapter `name` on `base`; changes `base` in place.

    Raises:
        ModelError: it can't be read, isn't a LoRA, or was made for another base: modules are missing on
            either side, or shapes differ (PEFT alone would fill missing ones with fresh weights).
    """
    config = _adapter_config(name, revision)
    if not isinstance(config, LoraConfig):
        kind = str(config.peft_type).removeprefix("PeftType.")
        raise ModelError(
            f"Expected a LoRA adapter in {name}; it is of the kind {kind}, which isn't supported."
        )
    if not _has_file(name, "adapter_model.safetensors", revision):
        raise ModelError(
            f"Expected adapter_model.safetensors in {name}; there is none (pickled weights aren't read). "
            "Save the adapter with safetensors."
        )
    try:
        with _quiet_peft():
            model = PeftModel.from_pretrained(base, name, is_trainable=True, revision=revision)
        saved = set(load_peft_weights(name, device="cpu", revision=revision))
    except (*_LOADING_ERRORS, TypeError) as error:
        raise ModelError(
            f"The adapter {name} doesn't load onto this base (it was made for "
            f"{config.base_model_name_or_path!r}): {_reason(error)}"
        ) from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    foreign = sorted((expected - saved) | {key for key in saved - expected if "lora_" in key})
    if foreign:
        raise ModelError(
            f"The adapter {name} was made for another base than this one (for "
            f"{config.base_model_name_or_path!r}): {len(foreign)} of its weights and this base's modules "
            f"have no counterpart, such as {foreign[0]}."
        )
    return model


def fresh_lora(
    base: PreTrainedModel, r: int, alpha: int, target_modules: str | Sequence[str], seed: int | None
) -> PeftModel:
    """A LoRA as a training run starts it: A random (by the seed), B = 0. Changes `base` in place."""
    modules = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=modules[0] if modules == ["all-linear"] else modules,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(), _quiet_peft():
            torch.manual_seed(42 if seed is None else seed)
            model = get_peft_model(base, config)
    except ValueError as error:
        raise ModelError(f"Can't put a LoRA on {type(base).__name__}: {_reason(error)}") from error
    assert isinstance(model, PeftModel)
    return model


@contextmanager
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused, not warned of
        # PEFT 0.21 asks transformers 5 by a name that it is renaming; nothing that a user could do about
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


def _load_second(name: str, loading: Loading, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The reference model, whole: with its adapter, if it has one. Frozen."""
    origin = find_origin(name)
    base = load_base(origin, loading)
    model = load_adapter(base, origin.adapter, origin.adapter_revision) if origin.adapter else base
    _check_vocabulary(tokenizer, model, name)
    theirs = load_tokenizer(origin, loading)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"The reference {name} has another tokenizer than the policy ({len(theirs)} and {len(tokenizer)} "
            "tokens, or the same ones with other ids): its log-probs of the same ids mean other texts."
        )
    return model.eval().requires_grad_(False)


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: nn.Module, name: str) -> None:
    known = _embedding(model).num_embeddings
    if tokenizer.vocab_size > known:
        raise ModelError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, but {name} has embeddings for {known}: they "
            "don't belong together."
        )


def _embedding(model: nn.Module) -> Any:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base.get_input_embeddings()


# --- parameters ---------------------------------------------------------------------------------------------


def choose_parameters(model: nn.Module, spec: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters to be probed, by name; marks exactly these as wanting a gradient.

    Args:
        model: the policy.
        spec: None, "lora", "full" or a regular expression (see `load_policy`).

    Raises:
        ModelError: nothing is selected, a selected one is quantised, or the expression is broken.
    """
    has_adapter = isinstance(model, PeftModel)
    # of several adapters, only the active one's parameters want a gradient
    named = {n: p for n, p in model.named_parameters() if not _is_adapter_parameter(n) or p.requires_grad}
    if spec is None:
        chosen = {n: p for n, p in named.items() if p.requires_grad or not has_adapter}
    elif spec == "lora":
        chosen = {n: p for n, p in named.items() if _is_adapter_parameter(n)}
    elif spec == "full":
        # PEFT keeps the original of a module that it saves with the adapter; only the copy is used
        chosen = {
            n: p for n, p in named.items() if not _is_adapter_parameter(n) and ".original_module." not in n
        }
    else:
        try:
            chosen = {n: p for n, p in named.items() if re.search(spec, n)}
        except re.error as error:
            raise ModelError(f"parameters={spec!r} isn't a regular expression: {error}.") from None
    if not chosen:
        some = ", ".join(list(named)[:: max(1, len(named) // 4)][:5])
        hint = " The model has no adapter." if spec == "lora" and not has_adapter else ""
        raise ModelError(
            f"parameters={spec!r} selects none of {len(named)} parameters, such as {some}.{hint}"
        )
    quantised = [n for n, p in chosen.items() if not p.is_floating_point()]
    if quantised:
        raise ModelError(
            f"{len(quantised)} of the probed parameters are quantised ({quantised[0]}, ...) and have no "
            "gradient. Probe an adapter (adapter_name_or_path or use_peft), or select others by a regular "
            "expression."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def _is_adapter_parameter(name: str) -> bool:
    return ".lora_" in name


# --- the reference and its proof ----------------------------------------------------------------------------


def _check_reference_options(reference: str, has_second: bool, has_adapter: bool) -> None:
    if reference not in REFERENCES:
        raise ModelError(f"Unknown reference {reference!r}. Known: {', '.join(REFERENCES)}.")
    if reference == "adapter_off" and not has_adapter:
        raise ModelError(
            "reference 'adapter_off' needs an adapter (adapter_name_or_path or use_peft); the model has none."
        )
    if reference == "model" and not has_second:
        raise ModelError("reference 'model' needs ref_model_name_or_path; none is given.")
    if has_second and reference not in ("auto", "model"):
        raise ModelError(
            f"ref_model_name_or_path is given, but the reference is {reference!r}. Drop one of them."
        )


def _make_reference(reference: str, model: nn.Module, second: nn.Module | None) -> Reference:
    if second is not None:
        return SecondModel(second)
    if reference in ("auto", "adapter_off") and isinstance(model, PeftModel):
        return AdapterOff(model)
    if reference in ("auto", "columns"):
        return Columns(required=reference == "columns")
    return Itself(model) if reference == "self" else NoReference()


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
    if _is_zero_lora(policy.model):
        tolerance = 10 * RESOLUTION[policy.score_dtype]
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
    tolerance = 10 * RESOLUTION[coarsest_dtype(model)] * max(scale, 1.0)
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
    ids = torch.arange(16, device=input_device(model)) % _embedding(model).num_embeddings
    with evaluating(model):
        return model(input_ids=ids[None], use_cache=False).logits[0, -1].float().cpu()


def _is_zero_lora(model: nn.Module) -> bool:
    """Whether the adapter is plain LoRA whose every B is 0, so that it adds nothing."""
    adapter = {n: p for n, p in model.named_parameters() if _is_adapter_parameter(n)}
    plain = all(".lora_A" in n or ".lora_B" in n for n in adapter)
    return bool(adapter) and plain and not any(bool(p.any()) for n, p in adapter.items() if ".lora_B" in n)


# --- provenance ---------------------------------------------------------------------------------------------


def _identity(
    base_name: str, base: PreTrainedModel, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    return {
        "model": _hash_weights(base_name) if is_local(base_name) else _commit(base),
        "adapter": _hash_adapter(model) if isinstance(model, PeftModel) else None,
        "tokenizer": _hash_tokenizer(tokenizer),
        "chat_template": _sha256(json.dumps(tokenizer.chat_template)) if tokenizer.chat_template else None,
    }


def _hash_weights(folder: str) -> str:
    """sha256 over the names and contents of a folder's configuration and safetensors files."""
    digest = hashlib.sha256()
    for file in sorted([Path(folder) / "config.json", *Path(folder).glob("*.safetensors")]):
        with file.open("rb") as content:
            digest.update(f"{file.name}:{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _hash_adapter(model: PeftModel) -> str:
    """sha256 over the names and values of the adapter's weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(get_peft_model_state_dict(model, save_embedding_layers=False).items()):
        content = weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode() + content)
    return digest.hexdigest()


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    content = tokenizer.backend_tokenizer.to_str() if fast else tokenizer.get_vocab()
    return _sha256(json.dumps([content, special], sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _notes(model: nn.Module, loading: Loading) -> tuple[str, ...]:
    notes = []
    if isinstance(model, PeftModel) and _is_zero_lora(model):
        notes.append("Every B of the LoRA is 0: the gradient in A is exactly 0, so scores lie in B alone.")
    if loading.is_quantised:
        notes.append(
            f"The base is in {4 if loading.load_in_4bit else 8} bits: scores are those of a rounded model."
        )
    return tuple(notes)


def _describe(
    base: PreTrainedModel,
    model: PreTrainedModel | PeftModel,
    chosen: Mapping[str, nn.Parameter],
    names: Mapping[str, str | None],
    loading: Loading,
) -> dict[str, Any]:
    in_adapter = [_is_adapter_parameter(name) for name in chosen]
    kind = "lora" if all(in_adapter) else "mixed" if any(in_adapter) else "full"
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return dict(names) | {
        "adapter_base": config.base_model_name_or_path if config else None,
        "lora_r": config.r if isinstance(config, LoraConfig) else None,
        "lora_alpha": config.lora_alpha if isinstance(config, LoraConfig) else None,
        "architecture": type(base).__name__,
        "attn_implementation": base.config._attn_implementation,
        "dtype": loading.dtype,
        "bits": 4 if loading.load_in_4bit else 8 if loading.load_in_8bit else None,
        "device": str(input_device(model)),
        "score_dtype": str(coarsest_dtype(model)).removeprefix("torch."),
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "probed_parameters": sum(p.numel() for p in chosen.values()),
        "probed_tensors": len(chosen),
        "probed_kind": kind,
    }


def _commit(model: PreTrainedModel) -> str | None:
    """The hub commit that a model was loaded from; transformers keeps it only where there is one."""
    return getattr(model.config, "_commit_hash", None)

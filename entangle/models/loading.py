"""Weights and tokenizers read from safetensors, and LoRA put on a base: complete, or refused."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as progress

from entangle.analysis.geometry import RESOLUTION
from entangle.config.places import is_local, near
from entangle.errors import ModelError
from entangle.models.origin import LOADING_ERRORS, Origin, adapter_config, find_origin, has_file, reason

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@contextmanager
def _bars_of_downloads_only(name: str) -> Iterator[None]:
    """No progress bar for weights that are read from a folder; a download keeps its own."""
    if not is_local(name) or not progress.is_progress_bar_enabled():
        yield
        return
    progress.disable_progress_bar()
    try:
        yield
    finally:
        progress.enable_progress_bar()


@dataclass(frozen=True)
class Loading:
    """How weights are read, the same for policy and reference."""

    dtype: str = "float32"
    score_dtype: str | None = None
    device: str | None = None
    device_map: str | dict[str, Any] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False

    def __post_init__(self) -> None:
        for dtype in filter(None, (self.dtype, self.score_dtype)):
            if dtype not in DTYPES:
                raise ModelError(f"Unknown dtype {dtype!r}. Known: {', '.join(DTYPES)}.")
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (
                RuntimeError,
                AssertionError,
            ) as error:  # AssertionError: this PyTorch is built without CUDA
                raise ModelError(f"The device {self.device!r} can't be used here: {reason(error)}") from error
        if self.load_in_4bit and self.load_in_8bit:
            raise ModelError("load_in_4bit and load_in_8bit exclude each other; both were given.")
        if self.is_quantised and importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(
                "Loading in 4 or 8 bits needs the package bitsandbytes, which isn't installed. "
                "Install it with: pip install bitsandbytes"
            )

    @property
    def computing(self) -> torch.dtype:
        """The precision of the loaded weights and of all that is computed with them: at least float32 by default."""
        return DTYPES[self.score_dtype or ("float64" if self.dtype == "float64" else "float32")]

    @property
    def is_rounded(self) -> bool:
        """Whether the weights are rounded to a precision below the one that they are then computed with."""
        return RESOLUTION[DTYPES[self.dtype]] > RESOLUTION[self.computing] and not self.is_quantised

    @property
    def is_quantised(self) -> bool:
        """Whether the base is loaded in 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def target(self) -> torch.device:
        """The device asked for; by default the GPU if there is one, else the CPU."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


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
            bnb_4bit_compute_dtype=loading.computing,
        )
        options["device_map"] = loading.device_map or {"": loading.target}
    try:
        with _bars_of_downloads_only(name):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                revision=origin.base_revision,
                dtype=loading.computing,
                attn_implementation=loading.attn_implementation,
                trust_remote_code=loading.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except LOADING_ERRORS as error:
        where = "from its folder" if is_local(name) else "from the hub (there is no such folder here)"
        raise ModelError(
            f"Can't load the model {name!r} {where}: {reason(error)}{near(name)} Expected a causal language model "
            "with safetensors weights; offline, a hub model must have been downloaded before."
        ) from error
    model, report = loaded
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ModelError(
            f"The checkpoint {name!r} lacks weights of {type(model).__name__} ({len(lacking)}, such as "
            f"{lacking[0]}): it isn't a whole causal language model.{_renamed(lacking, report['unexpected_keys'])}"
        )
    if offloaded := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ModelError(
            f"{len(offloaded)} weights of {name} don't fit on the devices of device_map={loading.device_map!r} and "
            f"would be offloaded ({offloaded[0]}, ...), where scores can't reach them. Give more devices, or "
            "--load_in_4bit, or --score_dtype bfloat16 (approximate)."
        )
    # experts one by one: their joined products don't exist in float64
    model.config._experts_implementation = "eager"
    if loading.is_rounded:
        _round(model, DTYPES[loading.dtype])
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes: a kernel of its own, in bfloat16
            module.support_avx512bf16_for_cpu = False
    if options["device_map"] is None:
        try:
            model.to(loading.target)
        except torch.OutOfMemoryError as error:
            size = sum(p.nbytes for p in model.parameters()) / 1e9
            raise ModelError(
                f"The weights take {size:.3g} GB in {str(loading.computing).removeprefix('torch.')}, which doesn't "
                f"fit on {loading.target}. --device_map auto spreads them; --score_dtype bfloat16 halves them, and "
                "makes scores approximate."
            ) from error
    return model.eval()


def _renamed(lacking: Sequence[str], found: Collection[str]) -> str:
    """The prefix under which a checkpoint has what the model lacks (a wrapper's, or a compiler's), as a sentence."""
    prefixes = {
        key[: -len(name)] for key in found for name in lacking if key != name and key.endswith(f".{name}")
    }
    if not prefixes:
        return ""
    prefix = max(prefixes, key=len)
    return (
        f" It has them as {prefix}...: it was saved from inside a wrapper. Take {prefix!r} off the names in its "
        "safetensors file."
    )


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every weight the nearest value that `dtype` has, without changing its type.

    The model then computes the function of a model in `dtype`, without that precision's rounding on the way.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def load_tokenizer(origin: Origin, loading: Loading) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter (it has the chat template of the training), or else the base's."""
    name, revision = origin.base, origin.base_revision
    if origin.adapter and has_file(origin.adapter, "tokenizer_config.json", origin.adapter_revision):
        name, revision = origin.adapter, origin.adapter_revision
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=loading.trust_remote_code
        )
    except LOADING_ERRORS as error:
        raise ModelError(
            f"Can't load a tokenizer from {name!r}: {reason(error)} Save the model's tokenizer in the same "
            "folder."
        ) from error


def load_adapter(base: PreTrainedModel, name: str, revision: str = "main") -> PeftModel:
    """The adapter `name` on `base`; changes `base` in place.

    Raises:
        ModelError: it can't be read, isn't a LoRA, or was made for another base: modules are missing on
            either side, or shapes differ (PEFT alone would fill missing ones with fresh weights).
    """
    config = adapter_config(name, revision)
    if not isinstance(config, LoraConfig):
        kind = str(config.peft_type).removeprefix("PeftType.")
        raise ModelError(
            f"Expected a LoRA adapter in {name}; it is of the kind {kind}, which isn't supported."
        )
    if not has_file(name, "adapter_model.safetensors", revision):
        raise ModelError(
            f"Expected adapter_model.safetensors in {name}; there is none (pickled weights aren't read). "
            "Save the adapter with safetensors."
        )
    try:
        with _quiet_peft():
            model = PeftModel.from_pretrained(base, name, is_trainable=True, revision=revision)
        saved = set(load_peft_weights(name, device="cpu", revision=revision))
    except (*LOADING_ERRORS, TypeError) as error:
        raise ModelError(_unlike(name, base, config, error)) from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    foreign = sorted((expected - saved) | {key for key in saved - expected if "lora_" in key})
    if foreign:
        raise ModelError(
            f"The adapter {name} was made for another base than this one (for "
            f"{config.base_model_name_or_path!r}): {len(foreign)} of its weights and this base's modules "
            f"have no counterpart, such as {foreign[0]}."
        )
    return model


def _unlike(name: str, base: PreTrainedModel, config: LoraConfig, error: BaseException) -> str:
    """Why an adapter doesn't load: mostly that it is another base's."""
    text = str(error)
    resized = re.search(r"size mismatch for \S*(embed|wte|lm_head).*?torch\.Size\(\[(\d+)", text, re.DOTALL)
    if resized and int(resized[2]) > vocabulary_of(base):
        return (
            f"The adapter {name} brings embeddings for {resized[2]} tokens, and its base {base.name_or_path!r} has "
            f"them for {vocabulary_of(base)}: its training resized them. Save the base resized as it did, in Python: "
            f"model.resize_token_embeddings({resized[2]}), and give it as model_name_or_path."
        )
    if "size mismatch" in text or "not found in the base model" in text:
        return (
            f"The adapter {name} is an adapter of another base than this one: it was made for "
            f"{config.base_model_name_or_path!r}, and this is {base.name_or_path!r} ({type(base).__name__}). Give the "
            f"base that it was trained on, resized where its training added tokens. In detail: {reason(error)}"
        )
    return (
        f"The adapter {name} doesn't load onto this base (it was made for {config.base_model_name_or_path!r}): "
        f"{reason(error)}"
    )


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
        raise ModelError(f"Can't put a LoRA on {type(base).__name__}: {reason(error)}") from error
    assert isinstance(model, PeftModel)
    return model


@contextmanager
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused, not warned of
        # what PEFT makes of fused experts names patterns of modules that other models have
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match")
        # PEFT 0.21 asks transformers 5 by a name that it is renaming; nothing that a user could do about
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


def load_start(origin: Origin, adapter: str, loading: Loading) -> nn.Module:
    """The reference that a training saved as a second adapter of the policy's base. Frozen."""
    model = load_adapter(load_base(origin, loading), adapter)
    return model.eval().requires_grad_(False)


def load_second(name: str, loading: Loading, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The reference model, whole: with its adapter, if it has one. Frozen."""
    origin = find_origin(name)
    base = load_base(origin, loading)
    model = load_adapter(base, origin.adapter, origin.adapter_revision) if origin.adapter else base
    check_vocabulary(tokenizer, model, name)
    theirs = load_tokenizer(origin, loading)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"The reference {name} has another tokenizer than the policy ({len(theirs)} and {len(tokenizer)} "
            "tokens, or the same ones with other ids): its log-probs of the same ids mean other texts."
        )
    return model.eval().requires_grad_(False)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: nn.Module, name: str) -> None:
    """Raise ModelError if the tokenizer has tokens that the model has no embedding for."""
    known = vocabulary_of(model)
    if tokenizer.vocab_size > known:
        raise ModelError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, but {name} has embeddings for {known}: they "
            "don't belong together."
        )


def embedding_of(model: nn.Module) -> Any:
    """The input embedding of a model, inside an adapter or not; with a LoRA or a trained copy on it, all of that."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base.get_input_embeddings()


def vocabulary_of(model: nn.Module) -> int:
    """Tokens that a model has embeddings for."""
    return int(embedding_of(model).weight.shape[0])


def pad_id(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> int:
    """The pad token's id, else the end-of-sequence token's, else 0; 0 too for an id that the model lacks."""
    vocabulary = vocabulary_of(model)
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

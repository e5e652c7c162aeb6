"""The policy, its adapter, its reference and its probed parameters: loaded, chosen, checked."""

from entangle.errors import ModelError
from entangle.models.adam_state import (
    AdamState,
    adam_state_of,
    load_adam_state,
    optimizer_file,
)
from entangle.models.loading import (
    DTYPES,
    Loading,
    coarsest_dtype,
    fresh_lora,
    load_adapter,
    load_base,
    load_tokenizer,
    pad_id,
    vocabulary_of,
)
from entangle.models.origin import Origin, adapter_config, find_origin
from entangle.models.parameters import choose_parameters
from entangle.models.policy import (
    Policy,
    check_positions,
    check_reference,
    load_policy,
    settle_reference,
)
from entangle.models.reference import (
    AdapterOff,
    Columns,
    Itself,
    NoReference,
    RefAdapter,
    Reference,
    SecondModel,
    adapter_off,
)
from entangle.models.state import undisturbed

__all__ = [
    "AdamState",
    "AdapterOff",
    "Columns",
    "DTYPES",
    "Itself",
    "Loading",
    "ModelError",
    "NoReference",
    "Origin",
    "Policy",
    "RefAdapter",
    "Reference",
    "SecondModel",
    "adam_state_of",
    "adapter_config",
    "adapter_off",
    "check_positions",
    "check_reference",
    "choose_parameters",
    "coarsest_dtype",
    "find_origin",
    "fresh_lora",
    "load_adam_state",
    "load_adapter",
    "load_base",
    "load_policy",
    "load_tokenizer",
    "optimizer_file",
    "pad_id",
    "settle_reference",
    "undisturbed",
    "vocabulary_of",
]

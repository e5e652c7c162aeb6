"""What the options of several commands share: the model, the data, the losses, the run folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro
import yaml

from entangle.errors import ConfigError

if TYPE_CHECKING:
    from losses import PreferenceLoss

DEFAULT_LOSSES: tuple[str, ...] = (
    "dpo", "rdpo", "ipo", "ipo_avg", "simpo", "rrhf", "slic", "cpo", "dpop", "kto", "sppo_hard", "orpo", "sft",
)  # fmt: skip
"""The losses of the paper's comparison (arXiv 2410.13828, Table 2), with IPO's two forms, ORPO and SFT."""

EMBEDDED = "embedded"
"""Name of the policy and of the pair set that ship with the package."""


def parse_loss(text: str) -> str | dict[str, Any]:
    """A loss given on the command line, for `losses.build`: `dpo` as it is, `dpop:penalty=5,beta=0.2` as a mapping.

    Raises:
        ConfigError: an option isn't of the form key=value.
    """
    name, _, options = text.partition(":")
    spec: dict[str, Any] = {"name": name.strip()}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(
                f"A loss is given as name or name:key=value,key=value (for instance dpo:beta=0.05); got {text!r}."
            )
        spec[key.strip()] = read_value(value)
    return spec if len(spec) > 1 else spec["name"]


Losses = Annotated[
    tuple[Any, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME[:KEY=VALUE,...]",
        instance_from_str=tuple,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [
            loss if isinstance(loss, str) else json.dumps(loss) for loss in value
        ],
    ),
]


def build_losses(specs: Iterable[Any]) -> list[PreferenceLoss]:
    """The losses that options name.

    Raises:
        ConfigError: one isn't known, or a hyper-parameter of it isn't, or makes no sense.
    """
    from losses import build  # here, so that reading options doesn't wait for torch

    try:
        return [build(spec) for spec in specs]
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


@dataclass(frozen=True)
class ModelOptions:
    """Which model is probed, and which of its parameters."""

    model_name_or_path: str = EMBEDDED
    """Model or adapter: hub id or folder; `embedded` is the small policy that ships with the package."""
    adapter_name_or_path: str | None = None
    """LoRA adapter to load onto the model."""
    model_revision: str = "main"
    """Revision of a model from the hub."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Precision that the weights are rounded to when they are loaded."""
    score_dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    """Precision that scores are computed in. By default float32, or float64 where the weights have it; in 16 bits
    scores are approximate, and marked so."""
    device: str | None = None
    """Device to run on; by default the accelerator if there is one, else the CPU."""
    device_map: str | None = None
    """`auto` spreads one model over several devices."""
    attn_implementation: str | None = None
    """Attention of transformers: sdpa, eager, ..."""
    trust_remote_code: bool = False
    """Run code that comes with a model from the hub."""
    load_in_4bit: bool = False
    """Load the base in 4 bits (needs entangle[quantization])."""
    load_in_8bit: bool = False
    """Load the base in 8 bits (needs entangle[quantization])."""
    use_peft: bool = False
    """Put a fresh LoRA on the model. Its B factor is 0, so only B has a gradient at first."""
    lora_r: int = 16
    """Rank of a fresh LoRA."""
    lora_alpha: int = 32
    """Scale of a fresh LoRA: its output is multiplied by lora_alpha / lora_r."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Modules that a fresh LoRA is put on."""
    ref_model_name_or_path: str | None = None
    """A second model as the reference."""
    reference: Literal["auto", "adapter_off", "model", "columns", "self", "none"] = "auto"
    """The reference policy: the model with its adapter off, a second model, columns of the data set, or none."""
    parameters: str | None = None
    """Probed parameters: `lora`, `full`, or a regular expression over names. Default: the trainable ones."""


@dataclass(frozen=True)
class DataOptions:
    """Which preference pairs are probed."""

    dataset_name: str = EMBEDDED
    """Hub id, .json/.jsonl/.csv/.parquet file, or folder; `embedded` is the pair set of the package."""
    dataset_config: str | None = None
    """Configuration of a data set from the hub."""
    dataset_train_split: str = "train"
    """Split that is read."""
    columns: tuple[str, ...] = ()
    """Column names where they differ, as ours=theirs: chosen=better rejected=worse."""
    limit: int | None = None
    """Use only this many pairs: the first ones, or with --seed a random sample in dataset order."""
    seed: int | None = None
    """Seed of the sample, of a fresh LoRA, and in training of the order of the pairs."""
    max_length: int = 1024
    """Longest prompt + response in tokens; longer responses are cut at the right, longer prompts dropped."""
    skip_invalid: bool = False
    """Leave out rows that can't be used (and say how many), instead of refusing the data."""

    @property
    def column_map(self) -> dict[str, str]:
        """`columns` as a mapping from our names to the data set's."""
        return dict(_column(item) for item in self.columns)


@dataclass(frozen=True)
class InputOptions(ModelOptions, DataOptions):
    """A model, and the pairs that it is asked about."""


@dataclass(frozen=True)
class RunOptions:
    """Where a command's run folder is."""

    VERB: ClassVar[str] = ""
    UNRECORDED: ClassVar[tuple[str, ...]] = ("output_dir", "overwrite")
    """Options that don't decide the numbers: where they go and how the command behaves."""

    output_dir: str | None = None
    """Run folder; by default runs/<command>-<hash of these options>."""
    overwrite: bool = False
    """Replace a run that is already in output_dir."""

    @property
    def run_path(self) -> Path:
        """The run folder: `output_dir`, or one named after these options that aren't left at their defaults."""
        given = {name: value for name, value in self.recorded.items() if value != self.defaults[name]}
        return Path(self.output_dir or f"runs/{self.VERB}-{fingerprint(given)}")

    @property
    def recorded(self) -> dict[str, Any]:
        """What decides the numbers: every option but `UNRECORDED`."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in self.UNRECORDED}

    @property
    def defaults(self) -> dict[str, Any]:
        """The value of each option that isn't given."""
        return {field.name: field.default for field in dataclasses.fields(self)}


def read_value(text: str) -> Any:
    """A value given as text: JSON, or else YAML (in which 1e-5 would be text).

    Raises:
        ConfigError: it is neither.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Expected a value as JSON or YAML has it; got {text!r}.") from error


def fitted(kind: str, value: Any) -> Any:
    """A value for an option annotated as `kind`: lists as tuples, and one thing as a tuple where there may be more."""
    if isinstance(value, list):
        return tuple(value)
    is_one = kind.startswith(("tuple", "Losses")) and value is not None and not isinstance(value, tuple)
    return (value,) if is_one else value


def fingerprint(content: Any) -> str:
    """Eight hexadecimal digits that name a configuration."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def check_at_least(config: Any, lowest: Mapping[str, int]) -> None:
    """Refuse options below their smallest sensible value; one that is None isn't given.

    Raises:
        ConfigError: names the option, the bound and what came.
    """
    for name, bound in lowest.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise ConfigError(f"{name} must be at least {bound}; got {value}.")


def _column(item: str) -> tuple[str, str]:
    ours, equals, theirs = item.partition("=")
    if not equals:
        raise ConfigError(f"A column is given as ours=theirs (for instance chosen=better); got {item!r}.")
    return ours, theirs

"""What the options of several commands share: the model, the data, the run folder, and what each goes through."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from entangle import embedded
from entangle.config.hashing import sha256_of
from entangle.config.kinds import DataName, DeviceMap, FormatName, ModelName, RunName, Settings
from entangle.config.typed import with_types
from entangle.errors import ConfigError

DEFAULT_LOSSES: tuple[str, ...] = (
    "dpo",
    "rdpo",
    "ipo",
    "ipo_avg",
    "simpo",
    "rrhf",
    "slic",
    "cpo",
    "dpop",
    "kto",
    "sppo_hard",
    "orpo",
    "sft",
)
"""The losses of the paper's comparison (arXiv 2410.13828, Table 2), with IPO's two forms, ORPO and SFT."""

EMBEDDED = "embedded"
"""Name of the policy and of the pair set that ship with the package."""

Replaced = Literal["nothing", "another", "any"]
"""Of runs that are in a command's folder already: none is deleted, one of other options or inputs, or any."""


@dataclass(frozen=True)
class Options:
    """Options of a command, or a part of them: frozen, every value of the type that its field is annotated with."""

    TRAINING_FOLDER: ClassVar[str | None] = None
    """The option that names the folder of a training, where the command looks at one."""

    def __post_init__(self) -> None:
        with_types(self)


@dataclass(frozen=True)
class ModelOptions(Options):
    """Which model is probed, and which of its parameters."""

    model_name_or_path: ModelName = EMBEDDED
    """Model or adapter: hub id or folder; `embedded` is the small policy that ships with the package."""
    adapter_name_or_path: ModelName | None = None
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
    device_map: DeviceMap = None
    """`auto` spreads one model over several devices."""
    attn_implementation: str | None = None
    """Attention of transformers: sdpa, eager, ..."""
    trust_remote_code: bool = False
    """Run code that comes with a model from the hub."""
    load_in_4bit: bool = False
    """Load the base in 4 bits (needs bitsandbytes)."""
    load_in_8bit: bool = False
    """Load the base in 8 bits (needs bitsandbytes)."""
    use_peft: bool = False
    """Put a fresh LoRA on the model. Its B factor is 0, so only B has a gradient at first."""
    lora_r: int = 16
    """Rank of a fresh LoRA."""
    lora_alpha: int = 32
    """Scale of a fresh LoRA: its output is multiplied by lora_alpha / lora_r."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Modules that a fresh LoRA is put on."""
    ref_model_name_or_path: ModelName | None = None
    """A second model as the reference."""
    reference: Literal["auto", "adapter_off", "model", "columns", "self", "none"] = "auto"
    """The reference policy: the model with its adapter off, a second model, columns of the data set, or none."""
    parameters: str | None = None
    """Probed parameters: `lora`, `full`, or a regular expression over names. Default: the trainable ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"lora_r": 1, "lora_alpha": 1})

    @property
    def located(self) -> ModelOptions:
        """The model's options alone, with the folders that `embedded` stands for; its adapter too if none is given."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelOptions)}
        if self.model_name_or_path == EMBEDDED:
            own["model_name_or_path"] = str(embedded.POLICY)
            if self.adapter_name_or_path is None and not self.use_peft and self.parameters != "full":
                own["adapter_name_or_path"] = str(embedded.ADAPTER)
        return ModelOptions(**own)


@dataclass(frozen=True)
class DataOptions(Options):
    """Which preference pairs are probed."""

    dataset_name: DataName = EMBEDDED
    """Hub id, .json/.jsonl/.csv/.parquet file, or folder; `embedded` is the pair set of the package."""
    dataset_config: str | None = None
    """Configuration of a data set from the hub."""
    dataset_train_split: str = "train"
    """Split that is read."""
    columns: Settings = ()
    """Column names where they differ, as ours=theirs: chosen=better rejected=worse."""
    format: FormatName = "auto"
    """How rows are read (see docs/data.md); `auto` goes by the columns, and says which it took."""
    limit: int | None = None
    """Use only this many pairs: the first ones, or with --seed a random sample in dataset order."""
    seed: int | None = None
    """Seed of the sample, of a fresh LoRA, and in training of the order of the pairs."""
    max_length: int = 1024
    """Longest prompt + response in tokens; longer responses are cut at the right, longer prompts dropped."""
    skip_invalid: bool = False
    """Leave out rows that can't be used (and say how many), instead of refusing the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"limit": 1, "max_length": 2, "seed": 0})
        for item in self.columns:
            _column(item)

    @property
    def dataset_place(self) -> str:
        """`dataset_name`, or the file that `embedded` stands for."""
        return str(embedded.PAIRS) if self.dataset_name == EMBEDDED else self.dataset_name

    @property
    def column_map(self) -> dict[str, str]:
        """`columns` as a mapping from our names to the data set's."""
        return dict(_column(item) for item in self.columns)


@dataclass(frozen=True)
class InputOptions(ModelOptions, DataOptions):
    """A model, and the pairs that it is asked about."""


@dataclass(frozen=True)
class RecordedOptions(Options, ABC):
    """Options of a command that keeps what it finishes in a folder, beside a record of these options."""

    VERB: ClassVar[str] = ""
    UNRECORDED: ClassVar[tuple[str, ...]] = ()
    """Options that don't decide the numbers: where they go and how the command behaves."""

    @property
    @abstractmethod
    def run_path(self) -> Path:
        """The folder."""

    @property
    @abstractmethod
    def place(self) -> tuple[str, ...]:
        """Words of the command line that name the folder."""

    @property
    @abstractmethod
    def replaces(self) -> Replaced:
        """What is deleted if it is in the folder when the command begins."""

    @property
    def recorded(self) -> dict[str, Any]:
        """What decides the numbers: every option but `UNRECORDED`."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in self.UNRECORDED}

    @property
    def defaults(self) -> dict[str, Any]:
        """The value of each option that isn't given."""
        return {field.name: field.default for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class ExtensionOptions(RecordedOptions):
    """Options of a command that adds to the run folder of a finished probe.

    What it has while it isn't finished is kept in RUN/<command>; a measurement with other options is begun anew.
    """

    UNRECORDED: ClassVar[tuple[str, ...]] = ("run", "plots")

    run: tyro.conf.Positional[RunName] = ""
    """Run folder of a finished probe."""
    plots: bool = True
    """Draw the figure (needs matplotlib)."""

    @property
    def run_path(self) -> Path:
        """RUN/<command>."""
        return Path(self.run) / self.VERB

    @property
    def place(self) -> tuple[str, ...]:
        """The probe's run folder."""
        return (self.run,)

    @property
    def replaces(self) -> Replaced:
        """A measurement with other options or inputs."""
        return "another"


@dataclass(frozen=True)
class RunOptions(RecordedOptions):
    """Where a command's run folder is."""

    UNRECORDED: ClassVar[tuple[str, ...]] = ("output_dir", "overwrite")

    output_dir: str | None = None
    """Run folder; by default runs/<command>-<hash of these options>."""
    overwrite: bool = False
    """Replace a run that is already in output_dir."""

    @property
    def run_path(self) -> Path:
        """The run folder: `output_dir`, or one named after these options that aren't left at their defaults."""
        given = {name: value for name, value in self.recorded.items() if value != self.defaults[name]}
        return Path(self.output_dir or f"runs/{self.VERB}-{hash_options(given)}")

    @property
    def place(self) -> tuple[str, ...]:
        """`--output_dir` and the run folder."""
        return ("--output_dir", str(self.run_path))

    @property
    def replaces(self) -> Replaced:
        """Any run if `overwrite`, else nothing."""
        return "any" if self.overwrite else "nothing"


def hash_options(content: Any) -> str:
    """Eight hexadecimal digits that name a configuration."""
    return sha256_of([json.dumps(content, sort_keys=True, default=str).encode()])[:8]


def check_at_least(config: Any, lowest: Mapping[str, float]) -> None:
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
    if not (ours and equals and theirs):
        raise ConfigError(f"A column is given as ours=theirs (for instance chosen=better); got {item!r}.")
    return ours, theirs

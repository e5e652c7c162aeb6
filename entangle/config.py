"""Options of every command: one dataclass each, filled from YAML, then from flags.

Names are TRL's and transformers' where they have one. A YAML file written for `trl dpo` is accepted: keys
that only concern training are ignored, and named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml

from entangle.errors import ConfigError

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
        spec[key.strip()] = yaml.safe_load(value)
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
    """Precision of the weights. Scores from 16-bit weights are marked as approximate."""
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
    """Probe only this many pairs: the first ones, or with --seed a random sample in dataset order."""
    seed: int | None = None
    """Seed of the sample and of a fresh LoRA."""
    max_length: int = 1024
    """Longest prompt + response in tokens; longer responses are cut at the right, longer prompts dropped."""


@dataclass(frozen=True)
class ProbeConfig(ModelOptions, DataOptions):
    """Geometry of every preference pair, and what each loss would do to it."""

    losses: Losses = DEFAULT_LOSSES
    """Losses to judge, each name or name:key=value,... (`entangle losses` lists them)."""
    loss_batch_size: int = 8
    """Pairs per batch for losses whose incentives depend on the batch (kto, aot, ...), in dataset order."""
    group_by: str = "kind"
    """Column of the data set by which the tables are broken down, where it is there."""
    engine: Literal["auto", "factored", "autograd"] = "auto"
    """How scores are computed: `factored` is fast and exact, `autograd` is its slow oracle."""
    batch_size: int | None = None
    """Pairs per pass; by default as many as fit 4096 tokens."""
    shard_size: int = 64
    """Pairs per shard: what a killed run loses at most."""
    verify: int = 0
    """Check the predictions by real SGD steps on this many pairs."""
    save_text: bool = True
    """Keep the texts of the pairs in the run folder."""
    output_dir: str | None = None
    """Run folder; by default runs/probe-<hash of these options>."""
    overwrite: bool = False
    """Replace a run that is already in output_dir."""
    dry_run: bool = False
    """Say what would be computed, and stop."""

    def __post_init__(self) -> None:
        _check_at_least(self, {
            "limit": 1, "max_length": 2, "loss_batch_size": 1, "batch_size": 1, "shard_size": 1, "verify": 0,
        })  # fmt: skip
        parsed = (parse_loss(loss) if isinstance(loss, str) else loss for loss in self.losses)
        object.__setattr__(self, "losses", tuple(parsed))
        if not self.losses:
            raise ConfigError("At least one loss is needed; got none. `entangle losses` lists them.")

    @property
    def column_map(self) -> dict[str, str]:
        """`columns` as a mapping from our names to the data set's."""
        return dict(_column(item) for item in self.columns)

    @property
    def run_path(self) -> Path:
        """The run folder: `output_dir`, or one named after these options."""
        return Path(self.output_dir or f"runs/probe-{fingerprint(self.recorded)}")

    @property
    def recorded(self) -> dict[str, Any]:
        """What decides the numbers: every option but where they go and how the command behaves."""
        unrecorded = ("output_dir", "overwrite", "dry_run")
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in unrecorded}


@dataclass(frozen=True)
class WhatIfConfig:
    """Other losses and hyper-parameters on a finished probe's pairs: no model, seconds."""

    run: tyro.conf.Positional[str] = ""
    """Run folder of a finished probe."""
    losses: Losses = ()
    """Losses to judge, each name or name:key=value,...; by default every one that the probe's rows can judge."""
    grid: tuple[str, ...] = ()
    """Hyper-parameters to vary: loss.field=1,2,3, or field=1,2,3 for every judged loss that has the field."""
    base: str | None = None
    """Loss that the knobs start from; by default dpo, or without a reference cpo:nll_weight=0."""
    target: float = 0.9
    """Share of the pairs that the smallest change must make ideal."""
    knobs: tuple[str, ...] = ("nll", "dpop", "shift", "length")
    """What may be changed: nll, nll_sum, nll_batch (NLL weight per token, sequence, batch token), dpop, shift,
    length."""
    loss_batch_size: int | None = None
    """Pairs per batch for losses whose incentives depend on the batch; by default the probe's."""
    rows: int = 12
    """Rows of the table of verdicts."""
    plots: bool = True
    """Draw the figures (needs entangle[plots])."""
    output_dir: str | None = None
    """Where the result goes; by default RUN/whatif. An earlier result there is replaced."""

    def __post_init__(self) -> None:
        _check_at_least(self, {"loss_batch_size": 1, "rows": 1})
        if not 0 < self.target <= 1:
            raise ConfigError(f"target is a share of the pairs, above 0 and at most 1; got {self.target}.")

    @property
    def output_path(self) -> Path:
        """The folder of the result."""
        return Path(self.output_dir) if self.output_dir else Path(self.run) / "whatif"


@dataclass(frozen=True)
class TokensConfig:
    """Which tokens entangle a pair: a finished probe's pairs taken apart into their tokens."""

    run: tyro.conf.Positional[str] = ""
    """Run folder of a finished probe."""
    pairs: tuple[int, ...] = ()
    """Pairs by their index in the run; by default the worst ones."""
    worst: int = 3
    """Without --pairs: this many pairs whose chosen log-prob falls most, for each of the losses."""
    losses: Losses = ()
    """Losses of the run whose worst pairs are taken; tables show the changes under the first. By default the run's
    first loss."""
    matrix: bool = False
    """Also draw the cosines of all pairs of tokens as heat maps (needs entangle[plots]): a backward pass per token."""
    dtype: Literal["float32", "float64"] | None = None
    """Precision of the computation; by default the probe's."""
    rows: int = 8
    """Rows of the table, per response."""

    def __post_init__(self) -> None:
        _check_at_least(self, {"worst": 1, "rows": 1})


@dataclass(frozen=True)
class LossesConfig:
    """The catalogue of losses; `entangle losses NAME` explains one."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A loss to explain: name or name:key=value,..."""
    family: str | None = None
    """Only this family: margin, normalised, anchored, pointwise, divergence, batch, tokens, compose."""
    needs_reference: bool | None = None
    """Only losses that compare with a reference policy (True), or that don't (False)."""
    batch_coupled: bool | None = None
    """Only losses whose incentives depend on the rest of the batch (True), or don't (False)."""
    needs_tokens: bool | None = None
    """Only losses that weigh tokens one by one (True), or don't (False)."""
    markdown: bool = False
    """Print the table as Markdown."""


Reward = Annotated[
    Any,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME[:KEY=VALUE,...]|MODULE:FUNCTION",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: True,
        str_from_instance=lambda value: [value if isinstance(value, str) else json.dumps(value)],
    ),
]


@dataclass(frozen=True)
class RftConfig(ModelOptions, DataOptions):
    """Spread of the rewards of sampled answers, and the reward gradient that it leaves."""

    rollouts: str | None = None
    """File with answers drawn before (prompt, completions[, rewards], or a row per answer); else they are sampled."""
    reward: Reward = None
    """rouge_l, chrf, length, format, reward_model, implicit, file, each with :key=value,..., or module:function.
    Default: rouge_l against the column chosen; with --rollouts, the file's own rewards."""
    reward_range: tuple[float, float] | None = None
    """Smallest and largest possible reward, where the reward doesn't say itself."""
    num_generations: int = 16
    """K, answers sampled per prompt."""
    max_completion_length: int = 48
    """Tokens of a sampled answer at most."""
    temperature: float = 1.0
    """Temperature of the sampling."""
    top_k: int = 0
    """Draw among this many most probable tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together have this probability."""
    group_size: int = 8
    """Answers per group in the GRPO and RLOO views; their expected gradients need twice as many answers."""
    std_threshold: float = 0.1
    """A std below this share of the rewards' half-range is small."""
    mean_threshold: float | None = None
    """A mean reward below this is low; by default the middle of the rewards' range."""
    before: str | None = None
    """Finished run of this command before a fine-tuning: compare it with --after, without a model."""
    after: str | None = None
    """Finished run on the same prompts with the same reward, after the fine-tuning."""
    gamma_positions: int = 0
    """Prompts at one answer token of which gamma of the paper's bound is estimated (from below); 0: leave it out."""
    engine: Literal["auto", "factored", "autograd"] = "auto"
    """How scores are computed: `factored` is fast and exact, `autograd` is its slow oracle."""
    batch_size: int = 64
    """Answers sampled at a time."""
    shard_size: int = 8
    """Prompts per shard: what a killed run loses at most."""
    save_text: bool = True
    """Keep prompts and answers in the run folder."""
    plots: bool = True
    """Draw the figures (needs entangle[plots])."""
    output_dir: str | None = None
    """Run folder; by default runs/rft-<hash of these options>."""
    overwrite: bool = False
    """Replace a run that is already in output_dir."""

    def __post_init__(self) -> None:
        _check_at_least(self, {
            "limit": 1, "max_length": 2, "num_generations": 2, "max_completion_length": 1, "top_k": 0,
            "group_size": 2, "gamma_positions": 0, "batch_size": 1, "shard_size": 1,
        })  # fmt: skip
        if not (self.temperature > 0 and 0 < self.top_p <= 1 and 0 < self.std_threshold <= 1):
            raise ConfigError(
                "Expected temperature > 0, 0 < top_p <= 1 and 0 < std_threshold <= 1; got "
                f"{self.temperature}, {self.top_p} and {self.std_threshold}."
            )
        if (self.before is None) != (self.after is None):
            raise ConfigError(f"--before and --after belong together; got {self.before} and {self.after}.")
        if self.reward_range is not None and not self.reward_range[0] < self.reward_range[1]:
            raise ConfigError(f"reward_range needs the smaller number first; got {self.reward_range}.")

    @property
    def column_map(self) -> dict[str, str]:
        """`columns` as a mapping from our names to the data set's."""
        return dict(_column(item) for item in self.columns)

    @property
    def run_path(self) -> Path:
        """The run folder: `output_dir`, or one named after these options."""
        return Path(self.output_dir or f"runs/rft-{fingerprint(self.recorded)}")

    @property
    def recorded(self) -> dict[str, Any]:
        """What decides the numbers: every option but where they go and how the command behaves."""
        unrecorded = ("output_dir", "overwrite", "plots")
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in unrecorded}


def fingerprint(content: Any) -> str:
    """Eight hexadecimal digits that name a configuration."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _column(item: str) -> tuple[str, str]:
    ours, equals, theirs = item.partition("=")
    if not equals:
        raise ConfigError(f"A column is given as ours=theirs (for instance chosen=better); got {item!r}.")
    return ours, theirs


def _check_at_least(config: Any, lowest: Mapping[str, int]) -> None:
    for name, bound in lowest.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise ConfigError(f"{name} must be at least {bound}; got {value}.")


Config = TypeVar("Config")

_ALIASES = {
    "model_name": "model_name_or_path",
    "torch_dtype": "dtype",
    "split": "dataset_train_split",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "adapter": "adapter_name_or_path",
    "lora_rank": "lora_r",
    "cutoff_len": "max_length",
}
"""Names that other trainers use for the same option."""


@dataclass(frozen=True)
class YamlOptions:
    """What a YAML file gave: values by our names, and the keys that don't concern us."""

    values: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def read_yaml(path: str | Path, cls: type) -> YamlOptions:
    """Read options for the dataclass `cls` from a flat YAML file, ours or TRL's.

    Raises:
        ConfigError: the file is missing or isn't a mapping, or a key is known neither to us nor to TRL.
    """
    content = _load_mapping(Path(path))
    known = {f.name for f in fields(cls)}
    values: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for key, value in content.items():
        name = key if key in known else _ALIASES.get(key, key)
        (values if name in known else unknown)[name] = value
    if "losses" in known and "losses" not in values and "loss_type" in unknown:
        values["losses"] = _losses_of_trl(unknown)
    unexplained = sorted(set(unknown) - _training_keys()) if unknown else []
    if unexplained:
        raise ConfigError(
            f"{path}: unknown key {', '.join(map(repr, unexplained))}. Known keys: {', '.join(sorted(known))}; "
            "keys of TRL's DPOConfig, ModelConfig and ScriptArguments are accepted and ignored."
        )
    return YamlOptions({key: _tuples(value) for key, value in values.items()}, tuple(sorted(unknown)))


def _load_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"Expected a YAML file at {path}; found none.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} isn't valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` lines; it holds {type(content).__name__}.")
    return content


def _losses_of_trl(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """TRL's `loss_type` as one loss of ours, with TRL's values of its hyper-parameters.

    Several loss types are one loss in TRL, their sum weighted by `loss_weights`.
    """
    from losses import CATALOGUE

    by_trl_name = {cls.trl: cls for cls in reversed(CATALOGUE.values()) if cls.trl}

    def spec(trl_name: str) -> dict[str, Any]:
        cls = by_trl_name.get(trl_name) or CATALOGUE.get(trl_name)
        if cls is None:
            raise ConfigError(f"loss_type {trl_name!r} isn't known. Known: {', '.join(sorted(by_trl_name))}.")
        own = {f.name for f in fields(cls)}
        ours = {cls.trl_options.get(key, key): value for key, value in options.items()}
        return {"name": cls.name} | {key: value for key, value in ours.items() if key in own}

    types = options["loss_type"]
    parts = tuple(map(spec, [types] if isinstance(types, str) else types))
    if len(parts) == 1:
        return parts
    weights = tuple(options.get("loss_weights") or [1.0] * len(parts))
    return ({"name": "weighted_sum", "losses": parts, "weights": weights},)


def _training_keys() -> set[str]:
    """Option names of TRL's `trl dpo` (of transformers' trainer where TRL isn't installed)."""
    from transformers import TrainingArguments

    keys = {f.name for f in fields(TrainingArguments)} | {"datasets", "env", "loss_type", "beta"}
    try:
        from trl.scripts.utils import ScriptArguments
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.model_config import ModelConfig
    except ImportError:
        return keys
    return keys.union(*({f.name for f in fields(cls)} for cls in (DPOConfig, ModelConfig, ScriptArguments)))


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):  # columns: {chosen: better}
        return tuple(f"{key}={item}" for key, item in value.items())
    return tuple(value) if isinstance(value, list) else value


def parse(cls: type[Config], arguments: Sequence[str], *, prog: str) -> tuple[Config, tuple[str, ...]]:
    """Options of a command from its arguments, `--config FILE` first, then flags over it.

    Returns:
        The options, and the keys of the file that were ignored.

    Raises:
        ConfigError: the file or a value can't be used. A flag that can't be parsed exits with status 2.
    """
    arguments = list(arguments)
    loaded = YamlOptions()
    if "--config" in arguments:
        place = arguments.index("--config")
        if place + 1 == len(arguments):
            raise ConfigError("--config needs a file name.")
        loaded = read_yaml(arguments[place + 1], cls)
        del arguments[place : place + 2]
    config = tyro.cli(
        cls,
        prog=prog,
        description=f"{cls.__doc__}\n\nOptions may stand in a YAML file: --config FILE.",
        args=arguments,
        default=cls(**loaded.values),
        use_underscores=True,
    )
    return config, loaded.ignored

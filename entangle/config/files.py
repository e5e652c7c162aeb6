"""Reading options: a YAML file first, then flags over it.

A YAML file written for `trl dpo` is accepted: keys that only concern training are ignored, and named.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from entangle.config.base import fitted
from entangle.errors import ConfigError

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
    "warmup_ratio": "warmup_steps",
}
"""Names that other trainers use for the same option."""


_NOT_DONE = ("datasets", "use_rslora", "use_dora", "lora_modules_to_save", "lora_target_parameters")
"""Options of TRL's command line that would change a training and that no option of ours stands for."""


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
    known = {f.name: str(f.type) for f in fields(cls)}
    values: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for key, value in content.items():
        name = key if key in known else _ALIASES.get(key, key)
        (values if name in known else unknown)[name] = value
    if "losses" in known and "losses" not in values and "loss_type" in unknown:
        values["losses"] = losses_of_trl(unknown)
    if "trainer_options" in known:
        _take_training_options(values, unknown, path)
    unexplained = sorted(set(unknown) - _training_keys()) if unknown else []
    if unexplained:
        raise ConfigError(
            f"{path}: unknown key {', '.join(_with_likeness(key, known) for key in unexplained)}. Known keys: "
            f"{', '.join(sorted(known))}; keys of TRL's DPOConfig, ModelConfig and ScriptArguments are accepted too."
        )
    whole = {key for key in values if isinstance(values[key], Mapping) and not known[key].startswith("tuple")}
    values = {
        key: fitted(known[key], value if key in whole else _tuples(value)) for key, value in values.items()
    }
    return YamlOptions(values, tuple(sorted(unknown)))


def _with_likeness(key: str, known: Collection[str]) -> str:
    """An unknown key, and the known one that may be meant."""
    near = get_close_matches(key, known, n=1)
    return f"{key!r} (is {near[0]} meant?)" if near else repr(key)


def _load_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"Expected a YAML file at {path}; found none.")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} isn't valid YAML: {error}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path} must hold `key: value` lines; it holds {found}.")
    return content


def losses_of_trl(options: Mapping[str, Any]) -> tuple[Any, ...]:
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


def _take_training_options(values: dict[str, Any], unknown: dict[str, Any], path: str | Path) -> None:
    """For a command that trains: TRL's loss becomes `loss`, other options of its trainer `trainer_options`.

    Moves them from `unknown` to `values`. What would change the training and has no counterpart is refused.
    """
    if "loss" not in values and ("loss_type" in unknown or "beta" in unknown):
        (spec,) = losses_of_trl({"loss_type": "sigmoid"} | unknown)
        values["loss"] = spec
        for key in {"loss_type", "loss_weights", *names_in_trl(spec)} & set(unknown):
            del unknown[key]
    refused = [key for key in _NOT_DONE if unknown.get(key)]
    if refused:
        raise ConfigError(
            f"{path}: {', '.join(refused)} would change the training and isn't supported. Drop it."
        )
    own = _trainer_fields() & set(unknown)
    given = values.get("trainer_options") or []
    further = _tuples({key: unknown.pop(key) for key in sorted(own)})
    values["trainer_options"] = [*_tuples(given), *further]


def names_in_trl(spec: Mapping[str, Any]) -> set[str]:
    """TRL's names of the hyper-parameters that a loss was given."""
    from losses import CATALOGUE

    names = {ours: trl for trl, ours in CATALOGUE[spec["name"]].trl_options.items()}
    parts = [names_in_trl(part) for part in spec.get("losses", ())]
    return set().union({names.get(key, key) for key in spec}, *parts)


def _trainer_fields() -> set[str]:
    from trl import DPOConfig, SFTConfig  # pyright: ignore[reportPrivateImportUsage]

    return {f.name for cls in (DPOConfig, SFTConfig) for f in fields(cls)}


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
    if isinstance(value, Mapping):  # columns: {chosen: better}, vary: {learning_rate: [1e-5, 1e-4]}
        return tuple(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in value.items())
    return tuple(value) if isinstance(value, list) else value


def parse(cls: type[Config], arguments: Sequence[str], *, prog: str) -> tuple[Config, tuple[str, ...]]:
    """Options of a command from its arguments: `--config FILE` (or FILE.yaml as the first word), then flags over it.

    Returns:
        The options, and the keys of the file that were ignored.

    Raises:
        ConfigError: the file or a value can't be used. A flag that can't be parsed exits with status 2.
    """
    arguments = list(arguments)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments.insert(0, "--config")
    takes_words = any("Positional" in str(option.type) for option in fields(cls))  # pyright: ignore[reportArgumentType]
    if arguments and not arguments[0].startswith("-") and not takes_words:
        raise ConfigError(
            f"Expected options or a .yaml file first; got {arguments[0]!r}. Data is named by --dataset_name, a "
            "model by --model_name_or_path, and a run goes on with --config RUN/config.yaml --output_dir RUN."
        )
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

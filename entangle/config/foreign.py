"""Keys of other trainers' YAML files: which option of ours stands for each, and what becomes of those without one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from entangle.config.declared import declared_losses, script_fields, trainer_fields
from entangle.config.specs import spec_text
from entangle.errors import ConfigError

ALIASES = {
    "model_name": "model_name_or_path",
    "torch_dtype": "dtype",
    "split": "dataset_train_split",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "adapter": "adapter_name_or_path",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "target_parameters": "lora_target_parameters",
    "task_type": "lora_task_type",
    "cutoff_len": "max_length",
    "warmup_ratio": "warmup_steps",
}
"""Names that TRL, PEFT or LLaMA-Factory have, or had, for the same option."""

REPLACEMENTS = {
    "base_model": "model_name_or_path",
    "adapter": "use_peft: true",
    "datasets": "dataset_name",
    "dataset": "dataset_name",
    "dataset_mixer": "dataset_name, one data set",
    "dataset_splits": "dataset_train_split",
    "sequence_len": "max_length",
    "max_prompt_length": "max_length; longer prompts are dropped",
    "max_completion_length": "max_length",
    "rl": "loss",
    "rl_beta": "loss: {name: dpo, beta: ...}",
    "pref_ftx": "loss: {name: with_sft, loss: dpo, alpha: ...}",
    "rpo_alpha": "loss: {name: with_sft, loss: dpo, alpha: ...}",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "val_set_size": "eval_share",
    "val_size": "eval_share",
    "max_samples": "limit",
    "finetuning_type": "use_peft",
    "lora_target": "lora_target_modules",
    "lora_target_linear": "lora_target_modules: all-linear",
    "flash_attention": "attn_implementation: flash_attention_2",
    "flash_attn": "attn_implementation: flash_attention_2",
    "overwrite_output_dir": "overwrite",
    "template": "nothing: the tokenizer's own chat template is used",
    "chat_template": "nothing: the tokenizer's own chat template is used",
    "field_messages": "columns",
    "preprocessing_num_workers": "nothing: drop it",
    "overwrite_cache": "nothing: drop it",
    "plot_loss": "nothing: drop it",
    "sample_packing": "nothing: drop it",
    "wandb_project": "report_to: wandb",
}
"""Keys of axolotl, LLaMA-Factory and the alignment handbook, with what stands for them here."""

NO_LIMIT = 2**31 - 1
"""max_length where TRL has none (null)."""

_REFUSED = (
    "datasets",
    "use_rslora",
    "use_dora",
    "lora_modules_to_save",
    "lora_target_parameters",
    "use_bnb_nested_quant",
)
"""Options of TRL's command line that would change a training and that no option of ours stands for."""

_PEFT = ("bias", "init_lora_weights", "peft_type", "inference_mode", "fan_in_fan_out")
"""PEFT's own names of settings of a LoRA, where they aren't TRL's."""

_ONLY_AS = {"lora_task_type": "CAUSAL_LM", "bnb_4bit_quant_type": "nf4", "peft_type": "LORA", "bias": "none"}
"""Options that have one value here; another one would change the training."""

_UNNEEDED = {
    "dataset_streaming": "the data is read whole",
    "ignore_bias_buffers": "it isn't needed",
    "disable_tqdm": "the run shows one bar of its own",
    "bnb_4bit_quant_storage": "it changes no number",
    "resume_from_checkpoint": "the same command, run again, goes on from its last checkpoint",
    "lora_dropout": "TRL switches dropout off in preference training",
    "inference_mode": "the adapter is trained",
    "env": "give environment variables before the command",
}
"""Keys that a training does without, and why."""


@dataclass
class Content:
    """A YAML file on its way to options.

    Args:
        values: by our names.
        unknown: keys that aren't options of the command.
        notes: what the user should know about keys that are read otherwise than they stand there.
    """

    values: dict[str, Any]
    unknown: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def training_keys() -> Collection[str]:
    """Every key of `trl dpo`, of PEFT's LoRA and of `entangle train`: what a file of a training may hold."""
    from entangle.config.train import TrainConfig

    own = {option.name for option in fields(TrainConfig)}
    return {
        *trainer_fields(),
        *script_fields(),
        *own,
        *_PEFT,
        "datasets",
        "env",
        "loss_type",
        "beta",
        "simpo_gamma",
    }


def sort_keys(content: Mapping[str, Any], known: Collection[str]) -> Content:
    """The keys of a file by our names, those of the command apart from the others."""
    found = Content({})
    for key, value in content.items():
        is_alias = (
            key not in known and key in ALIASES and not (key == "adapter" and value in ("lora", "qlora"))
        )
        name = ALIASES[key] if is_alias else key
        (found.values if name in known else found.unknown)[name] = value
    return found


def read_as_ours(found: Content) -> None:
    """Values that other trainers have for options of ours: dtype auto, max_length null, LLaMA-Factory's stage dpo."""
    values = found.values
    if values.get("dtype") == "auto":
        values["dtype"] = "float32"
        found.notes.append("dtype: auto is read as float32, which holds a checkpoint's weights as they are.")
    if "max_length" in values and values["max_length"] is None:
        values["max_length"] = NO_LIMIT
        found.notes.append("max_length: null is read as no limit.")
    if values.get("stage") == "dpo":
        values["stage"] = "preference"


def take_losses(found: Content) -> None:
    """For a command that judges losses: the one that the file trains with."""
    unknown = found.unknown
    if "losses" in found.values or not {"loss", "loss_type", "beta", "loss_weights"} & set(unknown):
        return
    if "loss" in unknown:
        found.values["losses"] = [unknown["loss"]]
    else:
        found.values["losses"] = losses_of_trl({"loss_type": "sigmoid"} | unknown)
    found.notes.append(
        f"Judged is the loss that the file trains with: {spec_text(found.values['losses'][0])}."
    )


def take_as_several(found: Content) -> None:
    """For a comparison: the loss and the seed of a training's file are what is compared, until more are given."""
    for one, several in (("loss", "losses"), ("seed", "seeds")):
        if one in found.values and several not in found.values:
            found.values[several] = [found.values.pop(one)]


def leave_folder(found: Content, option: str | None) -> None:
    """For a command that measures: a training's folder isn't where the result goes, but may be what is looked at.

    Args:
        found: what the file holds.
        option: the option of the command that is a training's folder, if it has one.
    """
    if not found.unknown or "output_dir" not in found.values:
        return  # a file of this command
    folder = found.values.pop("output_dir")
    if option is not None:
        found.values.setdefault(option, folder)
    else:
        found.notes.append(
            f"output_dir: {folder} is the training's own folder, so the result doesn't go there."
        )


def take_training_options(found: Content, where: str) -> None:
    """For a command that trains: TRL's loss becomes `loss`, other options of its trainer `trainer_options`.

    Raises:
        ConfigError: a key would change the training and nothing here stands for it.
    """
    values, unknown = found.values, found.unknown
    if "loss" not in values and ("loss_type" in unknown or "beta" in unknown):
        (spec,) = losses_of_trl({"loss_type": "sigmoid"} | unknown)
        values["loss"] = spec
        for key in {"loss_type", "loss_weights", *names_in_trl(spec)} & set(unknown):
            del unknown[key]
    refused = [key for key in _REFUSED if unknown.get(key)]
    refused += [
        f"{key}: {unknown[key]}" for key, only in _ONLY_AS.items() if unknown.get(key) not in (None, only)
    ]
    if unknown.get("init_lora_weights") not in (None, True):
        refused.append(f"init_lora_weights: {unknown['init_lora_weights']}")
    if unknown.get("model_init_kwargs"):
        refused.append("model_init_kwargs (here: dtype, attn_implementation, device_map)")
    if refused:
        raise ConfigError(
            f"{where}: {', '.join(refused)} would change the training and isn't supported. Drop it."
        )
    _answer(found)
    own = set(unknown) & trainer_fields()
    further = {key: unknown.pop(key) for key in sorted(own)}
    given = values.get("trainer_options")
    if further:
        values["trainer_options"] = {**_as_mapping(given), **further}


def _answer(found: Content) -> None:
    """Keys of TRL that an option of ours stands for, or that a run does without."""
    values, unknown = found.values, found.unknown
    strategy = unknown.pop("save_strategy", None)
    if strategy in ("no", False):  # YAML 1.1 reads no as false
        values["save_steps"] = 0
    elif strategy not in (None, "steps"):
        found.notes.append(
            f"save_strategy: {strategy} isn't done here: checkpoints are written every save_steps optimiser steps."
        )
    if unknown.pop("use_cpu", False):
        values.setdefault("device", "cpu")
    if unknown.pop("dataset_test_split", None) is not None:
        found.notes.append(
            "dataset_test_split isn't read: eval_share of the training data is held out, or give eval_dataset_name "
            "with eval_dataset_split."
        )
    for key in [key for key in _ONLY_AS if key in unknown]:
        del unknown[key]
    unknown.pop("init_lora_weights", None)
    for key in [key for key in _REFUSED if key in unknown]:  # false or empty: as here
        del unknown[key]
    unknown.pop("model_init_kwargs", None)
    for key, reason in _UNNEEDED.items():
        if unknown.pop(key, None) not in (None, False, 0, 0.0):
            found.notes.append(f"{key} is left out: {reason}.")


def losses_of_trl(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """TRL's `loss_type` as one loss of ours, with TRL's values of its hyper-parameters.

    Several loss types are one loss in TRL, their sum weighted by `loss_weights`.
    """
    from losses import CATALOGUE

    by_trl_name = {cls.trl: cls for cls in reversed(CATALOGUE.values()) if cls.trl}

    def spec(trl_name: Any) -> dict[str, Any]:
        cls = (by_trl_name.get(trl_name) or CATALOGUE.get(trl_name)) if isinstance(trl_name, str) else None
        if cls is None:
            raise ConfigError(f"loss_type {trl_name!r} isn't known. Known: {', '.join(sorted(by_trl_name))}.")
        own = {f.name for f in fields(cls)}
        ours = {cls.trl_options.get(key, key): value for key, value in options.items()}
        return {"name": cls.name} | {key: value for key, value in ours.items() if key in own}

    types = options["loss_type"]
    parts = tuple(map(spec, types if isinstance(types, list | tuple) else [types]))
    if len(parts) == 1:
        return parts
    weights = options.get("loss_weights") or [1.0] * len(parts)
    weights = tuple(weights) if isinstance(weights, list | tuple) else (weights,)
    return ({"name": "weighted_sum", "losses": parts, "weights": weights},)


def names_in_trl(spec: Mapping[str, Any]) -> set[str]:
    """TRL's names of the hyper-parameters that a loss was given."""
    from losses import CATALOGUE

    names = {ours: trl for trl, ours in CATALOGUE[spec["name"]].trl_options.items()}
    parts = [names_in_trl(part) for part in spec.get("losses", ())]
    return set().union({names.get(key, key) for key in spec}, *parts)


def check_loss_type(options: Mapping[str, Any]) -> None:
    """Refuse a misspelt `loss_type` before torch is imported for it.

    Raises:
        ConfigError: TRL has no such loss that is known here.
    """
    known = {name for pair in declared_losses().items() for name in pair if name}
    types = options.get("loss_type")
    for name in types if isinstance(types, list | tuple) else [types]:
        if not (name is None or (isinstance(name, str) and name in known)):
            trl = sorted(filter(None, declared_losses().values()))
            raise ConfigError(f"loss_type {name!r} isn't known. Known: {', '.join(trl)}.")


def _as_mapping(given: Any) -> dict[str, Any]:
    """Trainer options that stand in the file beside TRL's own keys."""
    if isinstance(given, Mapping):
        return dict(given)
    items = given if isinstance(given, list | tuple) else [] if given is None else [given]
    return {key: value for key, _, value in (str(item).partition("=") for item in items)}

"""What was given and what was left at its default, where the two mean different things."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from entangle.config.base import EMBEDDED, InputOptions
from entangle.errors import ConfigError


def named_flags(arguments: Sequence[str]) -> set[str]:
    """Names of the options among a command's arguments."""
    return {
        word.lstrip("-").partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")
    }


def check_inputs(config: Any, given: Collection[str]) -> None:
    """Refuse a model of the user's beside pairs that nobody named, and the other way round.

    Both default to what ships with the package, which is a first try; a mixture of the two is a mistake.

    Args:
        config: the options of a command.
        given: the names of those that were given, in a file or on the command line.

    Raises:
        ConfigError: one of model and data is given, and the other isn't.
    """
    if not isinstance(config, InputOptions) or config.TRAINING_FOLDER is not None:  # its run names the model
        return
    has_model = config.model_name_or_path != EMBEDDED or config.adapter_name_or_path is not None
    has_data = config.dataset_name != EMBEDDED
    sources = {"dataset_name", "rollouts"} if getattr(config, "VERB", "") == "rft" else {"dataset_name"}
    if has_model and not has_data and not sources & set(given):
        raise ConfigError(
            f"A model is given ({config.adapter_name_or_path or config.model_name_or_path}) and no data, so it would "
            "be asked about the pairs that ship with the package. Name the data: --dataset_name NAME "
            f"({EMBEDDED} for those)."
        )
    if has_data and not has_model and "model_name_or_path" not in given:
        raise ConfigError(
            f"Data is given ({config.dataset_name}) and no model, so the numbers would be those of the small policy "
            f"that ships with the package. Name the model: --model_name_or_path NAME ({EMBEDDED} for that one)."
        )
